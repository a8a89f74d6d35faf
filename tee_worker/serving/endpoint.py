"""Hugging Face's server with one split model in it: what it asks for a model, what it generates with, and what it answers when it cannot."""

from __future__ import annotations

import json
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerateManager, GenerationState, _GenerationCancelled

from shmbroker.client.failover import FailoverChannel
from shmbroker.errors import ShmBrokerError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

NOT_SERVED = ("/v1/audio/transcriptions", "/v1/systemone", "/load_model", "/reset")
"""What Hugging Face's server does besides, and a server of one text model does not."""

_LAST_CALL_SECONDS = 5.0
"""How long the end waits for the generating thread: a call on its way is failed when the channel closes."""


class SplitModels(ModelManager):
    """The one model that is served, which is there already."""

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(model_timeout=-1)
        self.force_model = name
        self._model = model
        self._tokenizer = tokenizer
        self._created = int(time.time())

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> tuple[PreTrainedModel, Any]:
        """Whatever is asked for: a name that is not ours is refused before."""
        return self._model, self._tokenizer

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """A local model has no revisions."""
        return model_id

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
        """What ``/v1/models`` lists."""
        return [{"id": self.force_model, "object": "model", "created": self._created, "owned_by": "shmbroker"}]

    def shutdown(self) -> None:
        """The model goes with the process."""


class Line(GenerationState):
    """Generates, one request at a time: all share one arena and one channel. Also knows whether a GPU worker is there."""

    def __init__(self, channel: FailoverChannel, max_context: int) -> None:
        super().__init__()
        self._channel = channel
        self.stopping = threading.Event()
        self._queue = Queue(self, max_context)

    def get_manager(self, model_id: str, use_cb: bool = False) -> Queue:
        """The one queue."""
        return self._queue

    def trouble(self) -> str:
        """Why no call can be made now; empty when one can. A worker that can take over from a dead one does so here."""
        return self._channel.trouble()

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

    def __init__(self, line: Line, max_context: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._line = line
        self._max_context = max_context

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any) -> Any:
        """As Hugging Face's; errors come as text that the stream can carry."""
        self._fit(inputs, gen_config)
        return super().generate_streaming(_Model(model, self._line, escaped=True), processor, inputs, gen_config, *args, **kwargs)  # type: ignore[arg-type]

    async def generate_non_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any) -> Any:
        """As Hugging Face's."""
        self._fit(inputs, gen_config)
        return await super().generate_non_streaming(_Model(model, self._line), processor, inputs, gen_config, *args, **kwargs)  # type: ignore[arg-type]

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

    def __init__(self, model: PreTrainedModel, line: Line, *, escaped: bool = False) -> None:
        self._model = model
        self._line = line
        self._escaped = escaped

    def generate(self, **options: Any) -> Any:
        """As the model's."""
        from transformers import StoppingCriteriaList

        stopping = self._line.stopping

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


class _Checked:
    """What a request's numbers must be. Mixed into Hugging Face's handlers, which raise whatever Python does over them."""

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        limits = [body.get(name) for name in ("max_tokens", "max_completion_tokens", "max_output_tokens")]
        try:
            if any(limit is not None and int(limit) < 1 for limit in limits):
                raise ValueError("at least one token must be asked for")
            config = super()._build_generation_config(body, *args, **kwargs)  # type: ignore[misc]
        except (TypeError, ValueError, AttributeError) as error:
            raise HTTPException(400, f"the request's parameters cannot be used: {error}") from None
        if body.get("temperature") is not None and body.get("generation_config") is None:
            config.do_sample = float(body["temperature"]) > 0
            if not config.do_sample:
                config.temperature = config.top_p = config.top_k = None
        return config


class Chat(_Checked, ChatCompletionHandler):
    """``/v1/chat/completions``."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """As Hugging Face's, once the messages are messages."""
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) and "role" in one for one in messages):
            raise HTTPException(400, "'messages' must be a list of messages with 'role' and 'content'")
        _, _, tokenizer = self._resolve_model(body)
        if getattr(tokenizer, "chat_template", None) is None:
            raise HTTPException(400, "this model has no chat template: use /v1/completions")
        return await super().handle_request(body, request_id)


class Completion(_Checked, CompletionHandler):
    """``/v1/completions``."""


class Response(_Checked, ResponseHandler):
    """``/v1/responses``."""


def application(models: SplitModels, line: Line) -> FastAPI:
    """The server."""
    unused: Any = None
    inner = build_server(
        models,
        Chat(models, line),
        completion_handler=Completion(models, line),
        response_handler=Response(models, line),
        transcription_handler=unused,
        systemone_handler=unused,
        generation_state=line,
    )

    async def failed(request: Request, error: Exception) -> JSONResponse:
        return _told(503, str(error), type(error).__name__)

    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return _told(error.status_code, str(error.detail), "invalid_request_error")

    inner.add_exception_handler(ShmBrokerError, failed)
    inner.add_exception_handler(HTTPException, refused)
    app = FastAPI()

    @app.get("/health")
    def health() -> JSONResponse:
        reason = line.trouble()
        if reason:
            return JSONResponse({"status": "unavailable", "reason": reason}, status_code=503)
        return JSONResponse({"status": "ok", "worker": line.worker()})

    async def not_served(request: Request) -> JSONResponse:
        return _told(404, f"{request.url.path} is not served here", "not_found_error")

    for path in NOT_SERVED:
        app.add_route(path, not_served, methods=["GET", "POST"])
    app.mount("/", inner)
    return app


def _told(status: int, message: str, kind: str) -> JSONResponse:
    """An error in OpenAI's form."""
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status_code=status)
