"""What generates for the endpoint: the split model, one request at a time."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from fastapi import HTTPException
from transformers.cli.serving.utils import GenerateManager, GenerationState, _GenerationCancelled

from shmbroker.client import FailoverChannel
from shmbroker.errors import ShmBrokerError
from tee_worker.trust.moves import Sealed
from tee_worker.trust.session import TrustReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

_LAST_CALL_SECONDS = 5.0
"""How long the end waits for the generating thread: a call on its way is failed when the channel closes."""


class ModelServer(GenerationState):
    """Generates, one request at a time: all share one arena and one channel. Also knows whether a GPU worker is there."""

    def __init__(self, channel: FailoverChannel, max_context: int, sealed: Sealed | None, trust: Callable[[], TrustReport]) -> None:
        """``sealed``: the session with workers that are not trusted, if they are not; ``trust``: tells of it."""
        super().__init__()
        self._channel = channel
        self._sealed = sealed
        self.trust = trust
        self.stopping = threading.Event()
        self._queue = Queue(self, max_context)

    def get_manager(self, model_id: str, use_cb: bool = False) -> Queue:
        """The one queue."""
        return self._queue

    def trouble(self) -> str:
        """Why no call can be made now; empty when one can. A worker that can take over from a dead one does so here."""
        return (self._sealed.session.trouble if self._sealed is not None else "") or self._channel.trouble()

    def worker(self) -> str:
        """The GPU worker's name."""
        return self._channel.worker_name

    def close(self) -> None:
        """End what generates, and wait for that."""
        self.stopping.set()
        self._channel.close()
        try:
            self._queue.submit(lambda: None).result(_LAST_CALL_SECONDS)
        except TimeoutError:
            log.warning("a generation still runs %g s after the end was asked for", _LAST_CALL_SECONDS)


class Queue(GenerateManager):
    """Hugging Face's generation on one thread, with requests checked against the context that there is memory for."""

    def __init__(self, server: ModelServer, max_context: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._server = server
        self._max_context = max_context

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any) -> Any:
        """As Hugging Face's; errors come as text that the stream can carry."""
        self._fit(inputs, gen_config)
        return super().generate_streaming(_Model(model, self._server, escaped=True), processor, inputs, gen_config, *args, **kwargs)  # type: ignore[arg-type]

    async def generate_non_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any) -> Any:
        """As Hugging Face's."""
        self._fit(inputs, gen_config)
        return await super().generate_non_streaming(_Model(model, self._server), processor, inputs, gen_config, *args, **kwargs)  # type: ignore[arg-type]

    def _fit(self, inputs: Any, gen_config: Any) -> None:
        prompt = int(inputs["input_ids"].shape[-1])
        left = self._max_context - prompt
        if prompt == 0:
            raise HTTPException(400, "the prompt is empty")
        if left < 1:
            raise HTTPException(
                400, f"the prompt has {prompt} tokens; this server takes {self._max_context} with the answer (--max-context): shorten it"
            )
        gen_config.max_new_tokens = min(gen_config.max_new_tokens or left, left)


class _Model:
    """The model as the generating thread calls it: it can be stopped, and its errors told."""

    def __init__(self, model: PreTrainedModel, server: ModelServer, *, escaped: bool = False) -> None:
        self._model = model
        self._server = server
        self._escaped = escaped

    def generate(self, **options: Any) -> Any:
        """As the model's."""
        from transformers import StoppingCriteriaList

        stopping = self._server.stopping

        def end(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            if stopping.is_set():
                raise ShmBrokerError("the server is shutting down")
            return torch.zeros(ids.shape[0], dtype=torch.bool)

        try:
            if stopping.is_set():
                raise ShmBrokerError("the server is shutting down")
            return self._model.generate(**options, stopping_criteria=StoppingCriteriaList([end]))  # type: ignore[operator]
        except _GenerationCancelled:
            raise
        except Exception as error:
            log.warning("a request failed: %s", error)
            if self._escaped:  # the server puts the text between quotation marks
                raise RuntimeError(json.dumps(str(error))[1:-1]) from error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
