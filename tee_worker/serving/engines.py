"""Which engine serves a model: many sequences at once where its split and its attention allow that, else one after the other."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessorList

from shmbroker.errors import BadInput, ShmBrokerError
from tee_worker.offloading.self_check import TOLERANCE
from tee_worker.planning.splits import Split, Splits
from tee_worker.run_options import MOST_AT_ONCE, ServeOptions
from tee_worker.serving.engine import Engine, Generation, SequenceToGenerate
from tee_worker.serving.paged_attention import PagedAttention
from tee_worker.serving.sampling import Chooser, Sampling
from tee_worker.serving.sequential import SequentialEngine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tee_worker.serving.batched import BatchedEngine

log = logging.getLogger(__name__)

CHECKED_PROMPTS = 7, 4
"""Tokens of the prompts that are computed together and alone before anybody else's are."""

CHECKED_TOKENS = 3

_TURNING_WITH_LENGTH = ("longrope", "dynamic")

_LONGEST_REASON = 300
"""Characters of another library's words that are passed on."""


def why_not_at_once(splits: Splits, options: ServeOptions) -> str:
    """Why sequences are served one after the other, as far as options tell; empty where they need not be."""
    if splits.used() - {Split.LINEAR, Split.FUSED, Split.OP} or len(splits.used()) > 1:
        return f"at split {splits} the GPU worker keeps keys and values, by sequence: many at once need split 'linear', 'fused' or 'op' for all layers"
    if options.pipeline > 1:
        return "with --pipeline a pass is in parts already"
    return ""


def places(splits: Splits, options: ServeOptions) -> int:
    """How many sequences are computed at once. Raises :class:`BadInput` for more than the options allow."""
    reason = why_not_at_once(splits, options)
    if options.max_concurrency is None:
        return 1 if reason else MOST_AT_ONCE
    if reason and options.max_concurrency > 1:
        raise BadInput(f"--max-concurrency {options.max_concurrency}: {reason}; or give --max-concurrency 1")
    return options.max_concurrency


async def engine_for(model: PreTrainedModel, at_once: int, max_context: int, *, asked: bool, on_note: Callable[[str], None]) -> Engine:
    """The engine, checked. ``asked``: whether so many at once were asked for; else one at a time will do, and is told.

    Raises :class:`BadInput` for a model that cannot be served as asked, :class:`ShmBrokerError` without a worker.
    """
    if at_once == 1:
        return SequentialEngine(model)
    engine = attention = None
    try:
        from tee_worker.serving.batched import BatchedEngine  # here: what it takes of the library moves

        if turns_with_length(model):
            raise BadInput("its rotary embedding depends on how long the longest sequence of a pass is")
        attention = PagedAttention(model)
        engine = BatchedEngine(model, attention, most=at_once, max_context=max_context)
        await _check(model, engine)
        return engine
    except Exception as error:
        if engine is not None:
            engine.close()
        if attention is not None:
            attention.remove()
        if isinstance(error, ShmBrokerError) and not isinstance(error, BadInput):
            raise
        reason = f"{type(model).__name__} cannot be computed for several requests at once: {str(error)[:_LONGEST_REASON]}"
        if asked:
            raise BadInput(f"{reason}; give --max-concurrency 1") from error
        on_note(f"one request at a time: {reason}")
        return SequentialEngine(model)


def turns_with_length(model: PreTrainedModel) -> bool:
    """Whether the rotary embedding of a token depends on the length of what it is computed with (longrope, dynamic)."""
    config: Any = model.config.get_text_config()
    told = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [told, *[one for one in told.values() if isinstance(one, dict)]]
    return any(kind.get("rope_type", kind.get("type")) in _TURNING_WITH_LENGTH for kind in kinds)


class _Recorder(Chooser):
    """Keeps the logits."""

    def __init__(self, prompt: list[int]) -> None:
        super().__init__(prompt, Sampling(), LogitsProcessorList(), sampled=False)
        self.plain = False
        self.logits: list[torch.Tensor] = []

    def choose(self, logits: torch.Tensor) -> int:
        self.logits.append(logits.clone())
        return super().choose(logits)


async def _check(model: PreTrainedModel, engine: BatchedEngine) -> None:
    """Compute sequences together, and each by itself. Raises :class:`BadInput` where that gives other numbers."""
    size = model.config.get_text_config().vocab_size
    prompts = [[(7919 * (index + 1) + length) % size for index in range(length)] for length in CHECKED_PROMPTS]
    recorders = [_Recorder(prompt) for prompt in prompts]

    async def generate(prompt: list[int], recorder: _Recorder) -> list[int]:
        generation = Generation(SequenceToGenerate(prompt, CHECKED_TOKENS, frozenset(), recorder))
        engine.start(generation)
        async for _ in generation.arrivals():
            pass
        return generation.tokens

    found = await asyncio.gather(*[generate(*both) for both in zip(prompts, recorders, strict=True)])

    def alone() -> list[torch.Tensor]:
        with torch.inference_mode():
            return [
                model(input_ids=torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :].float().clone()
                for prompt, tokens in zip(prompts, found, strict=True)
            ]

    for expected, recorder in zip(await engine.alone(alone), recorders, strict=True):
        together = torch.stack(recorder.logits)
        difference = float((together - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        if not difference <= TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16]):
            raise BadInput(f"together it gives other numbers than alone (they differ by {difference:.2g} of the largest)")
