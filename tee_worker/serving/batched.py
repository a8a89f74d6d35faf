"""Many sequences at once: Hugging Face's continuous batching around a split model, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import FutureRequestState, GenerationOutput

from shmbroker.errors import ShmBrokerError, anew
from tee_worker.serving.engine import Generation, Load, Result
from tee_worker.serving.paged_attention import PagedAttention, paged
from tee_worker.serving.sampling import Chooser

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # it has tokens of prompts in its words; what happens is told here

BLOCK_TOKENS = 32
"""Of keys and values that are reserved together."""

PASS_TOKENS = 512
"""In one pass at most: a longer prompt is read in several, between which those that decode get their tokens."""

_SHUTTING_DOWN = "the server is shutting down"

_LAST_PASS_SECONDS = 5.0
"""How long the end waits for a pass: a call on its way is failed when the channel closes."""


class BatchedEngine:
    """Generates up to ``most`` sequences at once. Its methods are called in the event loop's thread."""

    def __init__(
        self, model: PreTrainedModel, attention: PagedAttention, *, most: int, max_context: int, pass_tokens: int = PASS_TOKENS
    ) -> None:
        """``attention``: of the model, installed. ``pass_tokens``: in one pass at most."""
        self.most = most
        self._attention = attention
        self._pass_tokens = max(most, min(pass_tokens, max_context))
        self._model = model
        self._max_context = max_context
        self._stopping = threading.Event()
        self._generations: dict[str, Generation] = {}
        self._one_alone = asyncio.Lock()
        self._batch = self._new_batch()

    def start(self, generation: Generation) -> None:
        """Begin to generate, when its turn comes. Raises :class:`ShmBrokerError` when the server ends."""
        batch, sequence = self._present(), generation.sequence
        self._generations[generation.name] = generation
        generation.cancel = functools.partial(self._cancel, batch, generation)
        batch.register_result_handler(generation.name, functools.partial(self._arrived, batch, generation))
        added = batch.add_request(
            list(sequence.prompt),
            request_id=generation.name,
            max_new_tokens=sequence.new_tokens,
            streaming=True,
            eos_token_id=sorted(sequence.ends) or -1,
            chooser=sequence.chooser,
        )
        # It may have ended since it was looked at: then nobody else tells the sequence.
        if (added is None or batch.failure is not None) and self._generations.pop(generation.name, None) is not None:
            generation.fail(ShmBrokerError(_SHUTTING_DOWN) if batch.failure is None else anew(batch.failure))

    def _arrived(self, batch: Batch, generation: Generation, output: GenerationOutput) -> None:
        if generation.name not in self._generations:
            if not output.is_finished():
                batch.forget(generation.name)  # it was cancelled before the batch knew of it
            return
        if output.is_finished():
            del self._generations[generation.name]
        if generation.sequence.chooser.error is not None:
            generation.cancel()
            generation.fail(generation.sequence.chooser.error)
            return
        if output.error is not None:
            generation.fail(ShmBrokerError(output.error) if batch.failure is None else anew(batch.failure))
            return
        seen = generation.seen
        generation.seen = len(output.generated_tokens)
        if generation.seen > seen:
            generation.put(output.generated_tokens[seen:])
        if output.is_finished():
            generation.put([])

    def _cancel(self, batch: Batch, generation: Generation) -> None:
        if self._generations.pop(generation.name, None) is not None:
            batch.forget(generation.name)

    async def alone(self, work: Callable[[], Result]) -> Result:
        """Do ``work`` with the model in another thread while the batch stands still. Raises :class:`ShmBrokerError` when the server ends."""
        async with self._one_alone:  # the batch would stand still for as long as any of several is at it
            return await asyncio.to_thread(self._present().while_paused, functools.partial(self._as_it_was, work))

    def _as_it_was(self, work: Callable[[], Result]) -> Result:
        with self._attention.without():
            return work()

    def load(self) -> Load:
        """How much it has to do now."""
        return self._batch.load()

    def stop(self) -> None:
        """Have what generates fail at its next token."""
        self._stopping.set()

    def close(self) -> None:
        """End what generates, and wait a moment for that."""
        self.stop()
        self._batch.stop()

    def _present(self) -> Batch:
        """The batch, made anew where something has ended it."""
        if self._stopping.is_set():
            raise ShmBrokerError(_SHUTTING_DOWN)
        if self._batch.over:
            self._batch.stop()
            if self._batch.failure is not None:
                self._batch.failure.__traceback__ = None  # it has the old one's cache in hand
            self._batch = self._new_batch()
        return self._batch

    def _new_batch(self) -> Batch:
        batch = Batch(self._model, self._stopping, most=self.most, max_context=self._max_context, pass_tokens=self._pass_tokens)
        batch.start()
        return batch


class Batch(ContinuousBatchingManager):
    """Hugging Face's, with the sequences' own choosers, attention sequence by sequence, and room for all of them from the start."""

    def __init__(self, model: PreTrainedModel, stopping: threading.Event, *, most: int, max_context: int, pass_tokens: int) -> None:
        config = ContinuousBatchingConfig(
            page_size=BLOCK_TOKENS,
            num_blocks=most * math.ceil(max_context / BLOCK_TOKENS),
            max_batch_tokens=pass_tokens,
            max_requests_per_batch=most,
            max_blocks_per_request=0,
            max_memory_percent=1.0,
            allow_block_sharing=False,  # who shares a prompt's beginning with somebody else would learn it from the time to the first token
            use_async_batching=False,
            use_cuda_graph=False,
            safety_margin=0.0,  # there are blocks for all
            auto_switch_to_flash=False,
        )
        super().__init__(model, GenerationConfig(do_sample=False), config)  # type: ignore[arg-type, no-untyped-call]
        self._stopping = stopping
        self.failure: Exception | None = None
        """What ended it."""
        self.output_router.output_queue = _Unread()
        self.passes = 0
        self.logit_processor.logits_processor.append(_Choice())
        self.logit_processor.tensors_required = 1
        self.logit_processor.do_processing = True
        self.logit_processor._retrieve_processors_kwargs()

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """It has ours."""

    def start(self) -> None:
        """Begin: in a thread that keeps no process alive."""
        self.background_thread_status.clear()
        thread = threading.Thread(target=self._run_generation_loop, name="shmbroker-batch", daemon=True)
        self._generation_thread = thread  # type: ignore[assignment]
        thread.start()

    @property
    def over(self) -> bool:
        """Whether it takes no more sequences."""
        return self.failure is not None or not self.is_running()

    def _generation_step(self) -> None:
        try:
            if self._stopping.is_set():
                raise ShmBrokerError(_SHUTTING_DOWN)
            with paged():
                super()._generation_step()
            self.passes += 1
        except Exception as error:
            log.warning("the sequences of a pass failed: %s", error)
            self.failure = error
            raise

    def _handle_critical_error(self, error: Exception, batch_processor: Any) -> None:
        if self.failure is None:  # before the first pass: of what it is made of
            self.failure = error
        super()._handle_critical_error(error, batch_processor)

    def forget(self, name: str) -> None:
        """Generate no more of a sequence, and give its blocks back."""
        with self.output_router._lock:
            self.output_router.result_handlers.pop(name, None)
        self.cancel_request(name)

    def while_paused(self, work: Callable[[], Result]) -> Result:
        """Do ``work`` between two passes. Raises what has ended the batch, where something has."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.pause())
            except RuntimeError as error:
                raise ShmBrokerError(str(error)) if self.failure is None else anew(self.failure) from None
            return work()

    def load(self) -> Load:
        """How much it has to do now."""
        processor = self.batch_processor
        if processor is None:
            return Load(0, self.input_queue.qsize(), 0, 0)
        scheduler, cache = processor.scheduler, processor.cache
        free = cache.compute_free_capacity()
        return Load(
            len(scheduler.active_requests),
            len(scheduler.waiting_requests) + self.input_queue.qsize(),
            round((1 - free) * cache.num_blocks),
            cache.num_blocks,
            self.passes,
        )

    def stop(self, *args: Any, **kwargs: Any) -> None:
        """End at the next pass, and wait a moment for that."""
        with contextlib.suppress(RuntimeError):
            super().stop(block=True, timeout=_LAST_PASS_SECONDS, hard_stop=True)
        if self.is_running():
            log.warning("a pass still runs %g s after the end was asked for", _LAST_PASS_SECONDS)


class _Unread(queue.Queue[GenerationOutput]):
    """For what comes of a sequence that nobody reads any more: it keeps nothing."""

    def put(self, item: GenerationOutput, block: bool = True, timeout: float | None = None) -> None:
        pass


def _chosen(chooser: Chooser, logits: torch.Tensor) -> int:
    """The next token; where it cannot be chosen any, and the chooser says so: the other sequences of the pass have nothing to do with it."""
    if chooser.error is None:
        try:
            return chooser.choose(logits)
        except Exception as error:
            chooser.error = error
    return 0


class _Choice(ContinuousBatchingLogitsProcessor):
    """Has each sequence's chooser choose, and leaves a row of logits with that one token."""

    def __init__(self) -> None:
        self.supported_kwargs = {"chooser": Chooser}
        self.ignored_kwargs = ()
        self._choosers: list[Chooser] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> torch.Tensor:
        self._choosers = [one.state.logit_processor_kwargs["chooser"] for one in requests_with_new_token]
        return torch.zeros(len(self._choosers), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        if all([chooser.plain for chooser in self._choosers]):
            return scores
        scores = scores.clone()
        for row, chooser in enumerate(self._choosers):
            if not chooser.plain:
                token = _chosen(chooser, scores[row])
                scores[row] = -torch.inf
                scores[row, token] = 0.0
        return scores
