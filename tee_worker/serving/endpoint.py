"""The HTTP application: Hugging Face's server around one split model."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server

from shmbroker.errors import ShmBrokerError
from tee_worker.serving.model_server import ModelServer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NOT_SERVED = ("/v1/audio/transcriptions", "/v1/systemone", "/load_model", "/reset")
"""What Hugging Face's server does besides, and a server of one text model does not."""


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


def application(models: SplitModels, server: ModelServer) -> FastAPI:
    """What answers: with text that ``server`` generates, or with an error in OpenAI's form."""
    unused: Any = None
    inner = build_server(
        models,
        Chat(models, server),
        completion_handler=Completion(models, server),
        response_handler=Response(models, server),
        transcription_handler=unused,
        systemone_handler=unused,
        generation_state=server,
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
        reason = server.trouble()
        trust = msgspec.to_builtins(server.trust())
        if reason:
            return JSONResponse({"status": "unavailable", "reason": reason, "trust": trust}, status_code=503)
        return JSONResponse({"status": "ok", "worker": server.worker(), "trust": trust})

    async def not_served(request: Request) -> JSONResponse:
        return _told(404, f"{request.url.path} is not served here", "not_found_error")

    for path in NOT_SERVED:
        app.add_route(path, not_served, methods=["GET", "POST"])
    app.mount("/", inner)
    return app


def _told(status: int, message: str, kind: str) -> JSONResponse:
    """An error in OpenAI's form."""
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status_code=status)
