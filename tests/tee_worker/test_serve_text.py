"""What the endpoint does with tokens, fields and messages, without a server."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaForCausalLM, LogitsProcessorList

from benchmarks.families.names import FAMILIES
from benchmarks.families.tiny import tiny_family, whole_model
from shmbroker.errors import BadInput
from tee_worker.serving.answers import Answer, TextStream
from tee_worker.serving.batched import BatchedEngine
from tee_worker.serving.engine import Engine, Generation, SequenceToGenerate
from tee_worker.serving.engines import engine_for, turns_with_length
from tee_worker.serving.fields import ChatRequest, CompletionRequest, Refused, ResponseRequest, parsed
from tee_worker.serving.messages import messages_of
from tee_worker.serving.paged_attention import PagedAttention
from tee_worker.serving.sampling import Choices, Chooser, Chosen, Sampling
from tee_worker.serving.sequential import SequentialEngine
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


def test_log_probabilities_of_what_may_be_cut_are_held_back() -> None:
    """The tokens of a stop string are in no answer, and neither are their log probabilities."""

    async def read() -> list[tuple[str, list[int]]]:
        chooser = Chooser([1], Sampling(logprobs=0), LogitsProcessorList(), sampled=False)
        generation = Generation(SequenceToGenerate([1], 10, frozenset(), chooser))
        for letter in "xyab!":
            chooser.chosen.append(Chosen(ord(letter), -1.0))
            generation.put([ord(letter)])
        generation.put([])
        answer = Answer(0, generation, LetterStream(["ab"]))
        return [(piece.text, [one.token for one, _ in piece.logprobs]) async for piece in answer.pieces()]

    assert asyncio.run(read()) == [("x", [ord("x")]), ("y", [ord("y")])]


class CallParser:
    """Takes all after ``<`` for a call, as the library's does: nothing is told of it until ``>``, where it raises if it is no JSON."""

    def __init__(self) -> None:
        self.call = ""

    def feed(self, text: str) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        for letter in text:
            if letter == ">":
                json.loads(self.call[1:])
            elif self.call or letter == "<":
                self.call += letter
            else:
                events.append({"type": "region_chunk", "field": "content", "text": letter})
        return events

    def finalize(self) -> tuple[object, list[dict[str, Any]]]:
        if self.call:
            raise ValueError("the end, within a call")
        return None, []


@pytest.mark.parametrize("text", ["well <no JSON> then", "<no JSON>", "well <it ends her", "well", "a a<a a>"])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_call_that_is_none_is_said_as_it_was_written(text: str, size: int) -> None:
    """All of it, wherever tokens end."""
    generation = Generation(SequenceToGenerate([1], 100, frozenset(), Chooser([1], Sampling(), LogitsProcessorList(), sampled=False)))
    answer = Answer(0, generation, LetterStream([]), CallParser())  # type: ignore[arg-type]

    async def read() -> str:
        for first in range(0, len(text), size):
            generation.put([ord(letter) for letter in text[first : first + size]])
        generation.put([])
        return (await answer.all()).whole

    assert asyncio.run(read()) == text


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
    assert Choices(model).chooser([1], Sampling(temperature=1e-40)).plain, "nothing but the likeliest has any probability"


# --- together ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_windows_and_passes_shorter_than_a_text_change_nothing(tmp_path: Path, family: str) -> None:
    """A window of 8 tokens, passes of 16, texts of 40 and more: the logits of each pass are those of the sequence alone."""
    model = whole_model(tiny_family(tmp_path / family, family, **({} if family == "llama" else {"sliding_window": 8})))
    prompts = [[(7 * place + length) % 90 + 3 for place in range(length)] for length in (41, 3, 23)]
    expected = [
        model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :].tolist()  # type: ignore[operator]
        for prompt in prompts
    ]

    async def together() -> list[list[int]]:
        engine = BatchedEngine(model, PagedAttention(model), most=4, max_context=64, pass_tokens=16)

        async def one(prompt: list[int]) -> list[int]:
            generation = Generation(
                SequenceToGenerate(prompt, 6, frozenset(), Chooser(prompt, Sampling(), LogitsProcessorList(), sampled=False))
            )
            engine.start(generation)
            async for _ in generation.arrivals():
                pass
            return generation.tokens

        try:
            return await asyncio.gather(*[one(prompt) for prompt in prompts])
        finally:
            engine.close()

    assert asyncio.run(together()) == expected


class Failing(Chooser):
    """Cannot choose its third token."""

    def choose(self, logits: torch.Tensor) -> int:
        if len(self.chosen) == 2:
            raise RuntimeError("no such luck")
        return super().choose(logits)


def test_one_that_cannot_be_chosen_for_fails_alone(tmp_path: Path) -> None:
    model = whole_model(tiny_family(tmp_path / "llama", "llama"))
    prompt = [5, 6, 7]
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, 3:].tolist()  # type: ignore[operator]

    async def together() -> tuple[list[int], Generation]:
        engine = BatchedEngine(model, PagedAttention(model), most=4, max_context=64)
        failing = Failing(prompt, Sampling(logprobs=0), LogitsProcessorList(), sampled=False)
        both = [
            Generation(SequenceToGenerate(prompt, 8, frozenset(), one)) for one in (failing, Choices(model).chooser(prompt, Sampling()))
        ]

        async def read(generation: Generation) -> list[int]:
            engine.start(generation)
            async for _ in generation.arrivals():
                pass
            return generation.tokens

        try:
            failed, whole = await asyncio.gather(*[read(one) for one in both], return_exceptions=True)
            assert isinstance(failed, RuntimeError)
            assert isinstance(whole, list), whole
            while engine.load().running:
                await asyncio.sleep(0.01)
            assert engine.load().blocks_used == 0
            return whole, both[0]
        finally:
            engine.close()

    whole, failed = asyncio.run(together())
    assert whole == expected
    assert failed.tokens == expected[:2], "nothing that was not chosen came out"


@pytest.mark.parametrize(("family", "words"), [("bloom", "other numbers than alone"), ("mamba", "layer type"), ("nemotron", "paged cache")])
def test_a_model_that_cannot_be_computed_together_is_as_it_was(tmp_path: Path, family: str, words: str) -> None:
    model = whole_model(tiny_family(tmp_path / family, family, **FAMILIES.get(family, {})))
    before, notes = model.config._attn_implementation, list[str]()

    async def made(*, asked: bool) -> Engine:
        engine = await engine_for(model, 4, 64, asked=asked, on_note=notes.append)
        engine.close()
        return engine

    assert isinstance(asyncio.run(made(asked=False)), SequentialEngine)
    assert words in notes[0]
    assert model.config._attn_implementation == before
    with pytest.raises(BadInput, match="give --max-concurrency 1"):
        asyncio.run(made(asked=True))


def test_an_embedding_that_turns_with_length_is_served_one_by_one() -> None:
    config = tiny_llama()
    assert not turns_with_length(LlamaForCausalLM(config))
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert turns_with_length(LlamaForCausalLM(config))


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
