"""What the endpoint does with tokens, fields and messages, without a server."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaForCausalLM, LogitsProcessorList

from tee_worker.serving.answers import TextStream
from tee_worker.serving.fields import ChatRequest, CompletionRequest, Refused, ResponseRequest, parsed
from tee_worker.serving.messages import messages_of
from tee_worker.serving.sampling import Choices, Chooser, Sampling
from tests.tiny_models import tiny_llama


class Letters:
    """A tokenizer whose tokens are characters."""

    class _tokenizer:
        pass

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, tokens))


class LetterStream(TextStream):
    def __init__(self, stops: list[str]) -> None:
        super().__init__(Letters(), stops)  # type: ignore[arg-type]

        class Stream:
            def step(self, tokenizer: Any, token: int) -> str:
                return chr(token)

        self._stream = Stream()  # type: ignore[assignment]


def streamed(text: str, stops: list[str]) -> list[str]:
    """The pieces, up to where it stops."""
    stream = LetterStream(stops)
    pieces = []
    for letter in text:
        pieces.append(stream.feed(ord(letter)))
        if stream.stopped:
            return pieces
    return [*pieces, stream.rest()]


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_is_cut_before_the_first_stop_string_wherever_tokens_end(text: str, stops: list[str]) -> None:
    cuts = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if cuts:  # the first to be whole; of several, the one that begins first
        whole = text[: min(cuts)]
        text = whole[: min(whole.find(stop) for stop in stops if stop in whole)]
    assert "".join(streamed(text, stops) if not cuts else streamed(whole, stops)) == text


def test_what_cannot_begin_a_stop_string_is_not_held_back() -> None:
    assert streamed("abcd", ["cx"]) == ["a", "b", "", "cd", ""]


# --- fields -----------------------------------------------------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (ChatRequest, {"messages": MESSAGES, "audio": {"voice": "x"}}, "audio"),
        (ChatRequest, {"messages": MESSAGES, "store": True}, "store"),
        (ChatRequest, {"messages": MESSAGES, "store": 0}, "store"),
        (ChatRequest, {"messages": MESSAGES, "reasoning_effort": "high"}, "reasoning_effort"),
        (ChatRequest, {"messages": MESSAGES, "frequency_penalty": -3}, "frequency_penalty"),
        (ChatRequest, {"messages": MESSAGES, "temperature": float("nan")}, "temperature"),
        (ChatRequest, {"messages": MESSAGES, "n": 0}, "n"),
        (ChatRequest, {"messages": MESSAGES, "n": True}, "n"),
        (ChatRequest, {"messages": MESSAGES, "stop": 3}, "stop"),
        (ChatRequest, {"messages": MESSAGES, "tool_choice": "required"}, "tool_choice"),
        (ChatRequest, {"messages": MESSAGES, "stream_options": {"odd": 1}}, "stream_options.odd"),
        (ChatRequest, {}, "messages"),
        (ChatRequest, {"messages": "hello"}, "messages"),
        (CompletionRequest, {"prompt": "x", "best_of": 2}, "best_of"),
        (CompletionRequest, {"prompt": "x", "suffix": "y"}, "suffix"),
        (CompletionRequest, {"prompt": 3}, "prompt"),
        (CompletionRequest, {"prompt": "x", "logprobs": True}, "logprobs"),
        (ResponseRequest, {"input": "x", "previous_response_id": "y"}, "previous_response_id"),
        (ResponseRequest, {"input": "x", "store": True}, "store"),
    ],
)
def test_a_field_that_cannot_be_is_refused_by_name(kind: Any, body: dict[str, Any], param: str) -> None:
    with pytest.raises(Refused) as refused:
        parsed(kind, body)
    assert refused.value.param == param
    assert str(refused.value).startswith(param.rsplit(".", 1)[-1]) or str(refused.value).startswith(param)


def test_a_field_at_the_value_that_changes_nothing_is_taken() -> None:
    asked = parsed(ChatRequest, {"messages": MESSAGES, "store": False, "modalities": ["text"], "metadata": {}, "audio": None} | {"n": 1})
    assert asked.n == 1


@pytest.mark.parametrize("body", [[], "x", None, 3])
def test_a_body_that_is_no_object_is_refused(body: object) -> None:
    with pytest.raises(Refused, match="JSON object"):
        parsed(ChatRequest, body)


# --- messages ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": 3}, "messages.0.content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages.0.content.0.type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages.0.content.0.text"),
        ({"role": "user", "content": ["x"]}, "messages.0.content.0.type"),
        ({"role": "user"}, "messages.0.content"),
        ({"role": "king", "content": "x"}, "messages.0.role"),
        ({"content": "x"}, "messages.0.role"),
        ({"role": "user", "content": "x", "audio": {"id": 1}}, "messages.0.audio"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "messages.0.tool_calls.0.function.arguments",
        ),
        ({"role": "assistant", "tool_calls": [3]}, "messages.0.tool_calls.0.function"),
    ],
)
def test_a_message_that_cannot_be_is_refused_by_place(message: dict[str, Any], param: str) -> None:
    with pytest.raises(Refused) as refused:
        messages_of([message])
    assert refused.value.param == param


def test_what_clients_send_back_of_an_answer_is_taken() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": json.dumps({"x": 1})}}
    told = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    ]
    first, second, third = messages_of(told)
    assert first == {"role": "system", "content": "a b"}
    assert second["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert third == {"role": "tool", "tool_call_id": "1", "content": "3"}


# --- choosing ---------------------------------------------------------------------------------------------------------------------------


def choose(sampling: Sampling, logits: torch.Tensor, times: int = 1, *, sampled: bool = False) -> list[int]:
    chooser = Chooser([1, 2], sampling, LogitsProcessorList(), sampled=sampled)
    return [chooser.choose(logits) for _ in range(times)]


def test_bias_and_penalties_are_openais() -> None:
    logits = torch.tensor([1.0, 0.9, 0.5])
    assert choose(Sampling(), logits, 3) == [0, 0, 0]
    assert choose(Sampling(logit_bias={2: 0.6}), logits) == [2]
    assert choose(Sampling(logit_bias={0: -100}), logits) == [1]
    assert choose(Sampling(presence_penalty=0.3), logits, 4) == [0, 1, 0, 0], "once each: the prompt does not count"
    assert choose(Sampling(frequency_penalty=0.3), logits, 5) == [0, 1, 0, 1, 2]


def test_a_seed_repeats_and_is_of_its_own_sequence() -> None:
    logits = torch.zeros(1000)
    first = choose(Sampling(seed=7), logits, 5, sampled=True)
    torch.rand(3)  # somebody else's numbers
    assert choose(Sampling(seed=7), logits, 5, sampled=True) == first
    assert choose(Sampling(seed=8), logits, 5, sampled=True) != first
    assert choose(Sampling(), logits, 5, sampled=True) != choose(Sampling(), logits, 5, sampled=True)
    assert Sampling(seed=7).of(0).seed == 7
    assert Sampling(seed=7).of(2).seed == 9
    assert Sampling().of(2).seed is None


def test_log_probabilities_are_the_models_own_before_anything_is_changed() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    chooser = Chooser([1], Sampling(logit_bias={0: 50}, logprobs=2), LogitsProcessorList(), sampled=False)
    assert chooser.choose(logits) == 0
    (chosen,) = chooser.chosen
    expected = torch.log_softmax(logits, 0)
    assert chosen.logprob == pytest.approx(float(expected[0]))
    assert [token for token, _ in chosen.top] == [2, 1]


def test_a_models_own_generation_configuration_is_kept_and_a_request_overrides_it() -> None:
    model = LlamaForCausalLM(tiny_llama())
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.5, top_k=3, repetition_penalty=1.5, eos_token_id=[4, 5])
    choices = Choices(model)
    assert choices.ends == {4, 5}
    assert not model.generation_config.do_sample, "generate() leaves choosing to the choosers"
    assert not choices.chooser([1], Sampling()).plain
    greedy = choices.chooser([1, 2], Sampling(temperature=0.0))
    logits = torch.zeros(128)
    logits[1], logits[3] = 1.4, 1.0
    assert greedy.choose(logits) == 3, "1 is in the prompt, and the model's own penalty holds"
    model.generation_config = GenerationConfig(eos_token_id=4)
    assert Choices(model).chooser([1], Sampling()).plain


def test_what_is_taken_of_the_librarys_batching_is_there() -> None:
    """Its interface is young: where this fails after an upgrade, tee_worker/serving/batched.py and paged_attention.py are to be looked at."""
    import inspect

    from transformers.generation.configuration_utils import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.cache import PagedAttentionCache
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, ContinuousBatchProcessor

    for name in ("switch_to_cb_friendly_attn", "start", "_generation_step", "stop"):
        assert hasattr(ContinuousBatchingManager, name), name
    taken = {
        ContinuousBatchingManager: (
            "_run_generation_loop",
            "add_request",
            "cancel_request",
            "register_result_handler",
            "pause",
            "is_running",
        ),
        ContinuousBatchProcessor: ("_generation_step", "update_batch"),
        PagedAttentionCache: ("update", "compute_free_capacity"),
    }
    for kind, names in taken.items():
        assert [name for name in names if not hasattr(kind, name)] == []
    assert "logit_processor_kwargs" in inspect.signature(ContinuousBatchingManager.add_request).parameters
    assert {"key_states", "value_states", "layer_idx", "kwargs"} < set(inspect.signature(PagedAttentionCache.update).parameters)
    assert {"page_size", "num_blocks", "max_batch_tokens", "allow_block_sharing"} <= set(
        inspect.signature(ContinuousBatchingConfig).parameters
    )
