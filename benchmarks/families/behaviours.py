"""What Hugging Face's models are asked for besides greedy generation: each in one process and split, on the same model."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.generation.streamers import BaseStreamer

from benchmarks.families.tiny import lively

IDS = torch.tensor([[5, 17, 3, 88, 41, 2, 60, 9, 33, 71, 12]])
TWO = torch.tensor([[0, 0, 0, 5, 17, 3, 88, 41, 2, 60, 9], [71, 12, 44, 17, 30, 8, 51, 64, 9, 27, 38]])
"""The first one with three tokens of padding before it."""

Behaviour = Callable[[PreTrainedModel], Any]

BEHAVIOURS: dict[str, Behaviour] = {}
"""By name: what is done with a model, and what came of it, tensors or tuples of them."""

EAGER: set[str] = set()
"""Those that need attention that is computed step by step (``attn_implementation="eager"``)."""


def behaviour(name: str, *, eager: bool = False) -> Callable[[Behaviour], Behaviour]:
    """Register one."""

    def register(function: Behaviour) -> Behaviour:
        BEHAVIOURS[name] = function
        if eager:
            EAGER.add(name)
        return function

    return register


def _generate(model: PreTrainedModel, ids: torch.Tensor | None = IDS, **options: Any) -> torch.Tensor:
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    if ids is not None:
        settings.setdefault("attention_mask", (ids != 0).long())
    with torch.no_grad():
        result: torch.Tensor = model.generate(ids, **settings)  # type: ignore[operator]
    return result


def _forward(model: PreTrainedModel, **options: Any) -> Any:
    with torch.no_grad():
        return model(**{"input_ids": IDS, **options})


@behaviour("greedy")
def _greedy(model: PreTrainedModel) -> Any:
    output: Any = _generate(model, return_dict_in_generate=True, output_logits=True)
    return output.sequences, torch.stack(output.logits)


@behaviour("greedy in inference mode")
def _inference_mode(model: PreTrainedModel) -> Any:
    with torch.inference_mode():
        return _generate(model).clone()


@behaviour("sampling with a seed")
def _sampling(model: PreTrainedModel) -> Any:
    torch.manual_seed(3)
    return _generate(model, do_sample=True, temperature=0.8, top_k=20, top_p=0.9)


@behaviour("several samples of one prompt")
def _samples(model: PreTrainedModel) -> Any:
    torch.manual_seed(3)
    return _generate(model, do_sample=True, num_return_sequences=3)


@behaviour("beam search")
def _beams(model: PreTrainedModel) -> Any:
    return _generate(model, num_beams=3)


@behaviour("beam sampling")
def _beam_sampling(model: PreTrainedModel) -> Any:
    torch.manual_seed(3)
    return _generate(model, num_beams=2, do_sample=True)


@behaviour("assisted generation")
def _assisted(model: PreTrainedModel) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        helper = lively(AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation="eager"))  # type: ignore[no-untyped-call]
    return _generate(model, assistant_model=helper.eval())


@behaviour("prompt look-up")
def _look_up(model: PreTrainedModel) -> Any:
    return _generate(model, torch.cat([IDS, IDS], dim=1), prompt_lookup_num_tokens=3)


@behaviour("contrastive search")
def _contrastive(model: PreTrainedModel) -> Any:
    return _generate(model, penalty_alpha=0.6, top_k=4)


@behaviour("classifier-free guidance")
def _guidance(model: PreTrainedModel) -> Any:
    return _generate(model, guidance_scale=1.5, negative_prompt_ids=IDS[:, :4])


@behaviour("padding on the left")
def _left(model: PreTrainedModel) -> Any:
    return _generate(model, TWO)


@behaviour("padding on the right")
def _right(model: PreTrainedModel) -> Any:
    ids = TWO.flip(1)
    mask = (ids != 0).long()
    return _forward(model, input_ids=ids, attention_mask=mask).logits[mask.bool()]


@behaviour("inputs_embeds")
def _embeds(model: PreTrainedModel) -> Any:
    with torch.no_grad():
        embeds = model.get_input_embeddings()(IDS)  # type: ignore[no-untyped-call]
        if isinstance(embeds, torch.Tensor) and embeds.is_inference():
            embeds = embeds.clone()
    return _generate(model, None, inputs_embeds=embeds, attention_mask=torch.ones_like(IDS))


@behaviour("a cache that is gone on with")
def _continued(model: PreTrainedModel) -> Any:
    cache = DynamicCache(config=model.config)
    first = _generate(model, past_key_values=cache)
    longer = torch.cat([first, IDS[:, :3]], dim=1)
    return first, _generate(model, longer, past_key_values=cache, attention_mask=torch.ones_like(longer))


@behaviour("a prompt in chunks")
def _chunks(model: PreTrainedModel) -> Any:
    return _generate(model, prefill_chunk_size=4)


@behaviour("a cache filled chunk by chunk")
def _chunk_by_chunk(model: PreTrainedModel) -> Any:
    cache = DynamicCache(config=model.config)
    return tuple(_forward(model, input_ids=part, past_key_values=cache).logits.clone() for part in IDS.split(4, dim=1))


@behaviour("two generations in turns")
def _turns(model: PreTrainedModel) -> Any:
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    tokens = [IDS, IDS.flip(1)]
    seen: list[torch.Tensor] = []
    for _ in range(4):
        for index, cache in enumerate(caches):
            logits = _forward(model, input_ids=tokens[index], past_key_values=cache).logits[:, -1:].clone()
            tokens[index] = logits.argmax(-1)
            seen.append(logits)
    return tuple(seen)


@behaviour("two threads")
def _threads(model: PreTrainedModel) -> Any:
    found: dict[int, Any] = {}

    def run(index: int) -> None:
        try:
            found[index] = _generate(model, IDS if index else IDS.flip(1))
        except BaseException as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found.values():
        if isinstance(one, BaseException):
            raise one
    return found[0], found[1]


@behaviour("processors of logits")
def _processors(model: PreTrainedModel) -> Any:
    class Forbid(LogitsProcessor):
        """Never the first three tokens."""

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            scores[:, :3] = -torch.inf
            return scores

    return _generate(
        model, repetition_penalty=1.3, no_repeat_ngram_size=2, bad_words_ids=[[7]], logits_processor=LogitsProcessorList([Forbid()])
    )


@behaviour("a streamer")
def _streamer(model: PreTrainedModel) -> Any:
    class Keep(BaseStreamer):
        """Keeps what comes."""

        def __init__(self) -> None:
            self.seen: list[torch.Tensor] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen.append(value.reshape(-1).clone())

        def end(self) -> None:
            pass

    keep = Keep()
    _generate(model, streamer=keep)
    return torch.cat(keep.seen)


@behaviour("labels and loss")
def _loss(model: PreTrainedModel) -> Any:
    return _forward(model, labels=IDS).loss


@behaviour("hidden states")
def _hidden(model: PreTrainedModel) -> Any:
    return tuple(one.clone() for one in _forward(model, output_hidden_states=True).hidden_states)


@behaviour("attention weights", eager=True)
def _attentions(model: PreTrainedModel) -> Any:
    return tuple(one.clone() for one in _forward(model, output_attentions=True).attentions)


@behaviour("the decoder alone")
def _decoder(model: PreTrainedModel) -> Any:
    with torch.no_grad():
        return model.get_decoder()(input_ids=IDS).last_hidden_state.clone()  # type: ignore[no-untyped-call]


@behaviour("without a cache")
def _uncached(model: PreTrainedModel) -> Any:
    return _generate(model, use_cache=False)


@behaviour("a static cache")
def _static(model: PreTrainedModel) -> Any:
    return _generate(model, cache_implementation="static")


@behaviour("logits of the last token")
def _last(model: PreTrainedModel) -> Any:
    return _forward(model, logits_to_keep=1).logits


@behaviour("positions that are given")
def _positions(model: PreTrainedModel) -> Any:
    return _forward(model, position_ids=torch.arange(4, 4 + IDS.shape[1])[None]).logits


@behaviour("a mask of numbers, [1, 1, tokens, tokens]")
def _additive(model: PreTrainedModel) -> Any:
    return _forward(model, attention_mask=_banded(torch.finfo(torch.float32).min)).logits


@behaviour("a mask of booleans, [1, 1, tokens, tokens]")
def _boolean(model: PreTrainedModel) -> Any:
    return _forward(model, attention_mask=_banded(None)).logits


def _banded(number: float | None) -> torch.Tensor:
    """Each token sees itself and the four before it."""
    size = IDS.shape[1]
    seen = torch.ones(size, size, dtype=torch.bool).tril().triu(-4)[None, None]
    return seen if number is None else torch.zeros(seen.shape).masked_fill(~seen, number)


@behaviour("torch.compile")
def _compile(model: PreTrainedModel) -> Any:
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        return compiled(input_ids=IDS).logits.clone()
