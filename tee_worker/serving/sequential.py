"""One sequence at a time, by the model's own ``generate()``, in a thread of its own: for splits at which keys and values are the GPU worker's."""

from __future__ import annotations

import asyncio
import functools
import logging
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from shmbroker.errors import ShmBrokerError
from tee_worker.serving.engine import Generation, Load, Result
from tee_worker.serving.sampling import Chooser

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

_LAST_CALL_SECONDS = 5.0
"""How long the end waits for the generating thread: a call on its way is failed when the channel closes."""


class SequentialEngine:
    """Generates one sequence after the other, in the order in which they came. Its methods are called in the event loop's thread."""

    most = 1

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._stopping = threading.Event()
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._running = 0
        self._thread = threading.Thread(target=self._run, name="shmbroker-generate", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            self._running = 1
            work()
            self._running = 0
            del work

    def start(self, generation: Generation) -> None:
        """Begin to generate, when its turn comes."""
        gone = threading.Event()
        generation.cancel = gone.set
        self._work.put(functools.partial(self._generate, generation, gone, asyncio.get_running_loop()))

    async def alone(self, work: Callable[[], Result]) -> Result:
        """Do ``work`` in the generating thread."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Result] = loop.create_future()

        def run() -> None:
            try:
                result = work()
            except BaseException as error:
                loop.call_soon_threadsafe(_settle, done, None, error)
            else:
                loop.call_soon_threadsafe(_settle, done, result, None)

        self._work.put(run)
        return await done

    def load(self) -> Load:
        """How much it has to do now."""
        return Load(self._running, self._work.qsize())

    def stop(self) -> None:
        """Have what generates fail at its next token."""
        self._stopping.set()

    def close(self) -> None:
        """End what generates, and wait a moment for that."""
        self.stop()
        self._work.put(None)
        self._thread.join(_LAST_CALL_SECONDS)
        if self._thread.is_alive():
            log.warning("a generation still runs %g s after the end was asked for", _LAST_CALL_SECONDS)

    def _generate(self, generation: Generation, gone: threading.Event, loop: asyncio.AbstractEventLoop) -> None:
        """In the generating thread."""
        tell = functools.partial(_tell, loop)
        if gone.is_set():
            return
        sequence = generation.sequence
        ids = torch.tensor([list(sequence.prompt)])
        stopping = _Stopping(self._stopping, gone)
        try:
            stopping.check()
            self._model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=sequence.new_tokens,
                do_sample=False,
                eos_token_id=sorted(sequence.ends) or None,
                logits_processor=LogitsProcessorList([] if sequence.chooser.plain else [_Choice(sequence.chooser)]),
                stopping_criteria=StoppingCriteriaList([stopping]),
                streamer=_Streamer(functools.partial(tell, generation.put)),
            )
        except Exception as error:
            log.warning("a request failed: %s", error)
            tell(generation.fail, error)
        else:
            tell(generation.put, [])


def _tell(loop: asyncio.AbstractEventLoop, action: Callable[..., None], *arguments: Any) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(action, *arguments)


def _settle(future: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


class _Stopping(StoppingCriteria):
    """Ends a generation that nobody reads, and raises in one that the server cannot finish."""

    def __init__(self, stopping: threading.Event, gone: threading.Event) -> None:
        self._stopping = stopping
        self._gone = gone

    def check(self) -> None:
        if self._stopping.is_set():
            raise ShmBrokerError("the server is shutting down")

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.check()
        return torch.full((input_ids.shape[0],), self._gone.is_set(), dtype=torch.bool)


class _Choice(LogitsProcessor):
    """Has the sequence's chooser choose, and leaves logits with that one token."""

    def __init__(self, chooser: Chooser) -> None:
        self._chooser = chooser

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = self._chooser.choose(scores[0])
        only = torch.full_like(scores, -torch.inf)
        only[0, token] = 0.0
        return only


class _Streamer:
    """Hands on the tokens as they come, but for the prompt."""

    def __init__(self, put: Callable[[list[int]], None]) -> None:
        self._put = put
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._put(value.reshape(-1).tolist())
        self._prompt_seen = True

    def end(self) -> None:
        """What follows tells it."""
