"""The HTTP application: OpenAI's endpoints over one split model. Every error is an OpenAI error object, in streams too."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
import traceback
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

import msgspec
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from shmbroker.errors import ShmBrokerError
from tee_worker.run_options import LOOPBACK
from tee_worker.serving.answers import Answer
from tee_worker.serving.chat import Chat
from tee_worker.serving.completions import Completion
from tee_worker.serving.endpoint_metrics import EndpointMetrics
from tee_worker.serving.fields import ChatRequest, CompletionRequest, Refused, ResponseRequest, parsed
from tee_worker.serving.responses import Response as ModelResponse
from tee_worker.serving.resumption import EXTENSION, Journal, Step
from tee_worker.serving.service import Service
from tee_worker.serving.wire import INTERNAL_ERROR, MOST_BYTES, REQUEST_ID, error_event, error_object, event

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_NOT_LOGGED = ("/health", "/metrics")
"""Paths that others ask for all the time."""

_GONE = 499
"""The status, in log and metrics, of a request whose client went away: as nginx has it."""


class Work(Protocol):
    """A request that is generated."""

    answers: list[Answer]
    created: int

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts."""

    async def whole(self) -> dict[str, Any]:
        """The response, once all is there."""

    def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The response as a stream."""


class Gone(Exception):
    """The client is not there any more."""


class Endpoint:
    """Answers requests, as an ASGI application. ``api_key``: that they must carry; ``access``: told one line of each."""

    def __init__(self, service: Service, *, api_key: str | None = None, access: Callable[[str], None] = lambda line: None) -> None:
        self._service = service
        self._api_key = api_key
        self._access = access
        self.at_once = service.engine.most
        """Sequences that are computed at once."""
        self._metrics = EndpointMetrics(service.engine.load, service.engine.most)
        self._app = Starlette(
            routes=[
                Route("/v1/chat/completions", self._of(ChatRequest, Chat), methods=["POST"]),
                Route("/v1/completions", self._of(CompletionRequest, Completion), methods=["POST"]),
                Route("/v1/responses", self._of(ResponseRequest, ModelResponse, named=True), methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/health", self._health),
                Route("/metrics", self._render_metrics),
            ],
            exception_handlers={HTTPException: _not_served, Exception: _unexpected},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request: let in, answered, counted and logged."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.monotonic()
        headers = Headers(scope=scope)
        name = scope["request_id"] = headers.get(REQUEST_ID) or uuid.uuid4().hex
        status = _GONE

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = name
            await send(message)

        try:
            refusal = self._refusal(scope, headers)
            await (refusal or self._app)(scope, receive, sending)
        finally:
            work: Work | None = scope.get("work")
            for answer in work.answers if work is not None else []:
                answer.generation.cancel()  # nobody reads it any more, however it came to that
            self._count(scope, status, begun)

    def stop(self) -> None:
        """Have what is generated fail at its next token: the server ends."""
        self._service.engine.stop()

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """What is answered to who is not let in; None to who is."""
        if self._api_key is not None and scope["path"] != "/health":
            kind, _, key = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._api_key.encode()):
                return _told(
                    401, "this server wants its API key: 'Authorization: Bearer KEY'", "authentication_error", code="invalid_api_key"
                )
        if self._api_key is None and _host_of(headers.get("host", "")) not in LOOPBACK:
            told = "without an API key this server answers to names of this machine's loopback alone: a page in a browser could ask it"
            return _told(403, told, "permission_error")
        if scope["method"] == "POST" and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return _told(415, "requests are JSON: 'Content-Type: application/json'", "invalid_request_error")
        return None

    def _count(self, scope: Scope, status: int, begun: float) -> None:
        seconds = time.monotonic() - begun
        work: Work | None = scope.get("work")
        if scope.get("gone"):
            status = _GONE
        route = scope.get("route")
        path = route.path if isinstance(route, Route) else "other"
        self._metrics.requests.labels(path, str(status)).inc()
        line = f"{scope['method']} {scope['path']!a:.200} {status} {seconds:.3f} s id {scope['request_id']!a:.100}"
        if work is not None:
            generated = sum(answer.tokens for answer in work.answers)
            self._metrics.prompt_tokens.inc(work.prompt_tokens)
            self._metrics.generated_tokens.inc(generated)
            self._metrics.duration.observe(seconds)
            line += f", {work.prompt_tokens} tokens of prompt, {generated} generated"
            first = [answer.generation.first_at for answer in work.answers if answer.generation.first_at]
            if first:
                self._metrics.first_token.observe(min(first) - begun)
                line += f", the first after {min(first) - begun:.3f} s"
        if scope["path"] not in _NOT_LOGGED:
            self._access(line)

    def _of(self, fields: type[Any], kind: Callable[..., Work], *, named: bool = False) -> Callable[[Request], Awaitable[Response]]:
        """What answers at one path. ``named``: events of a stream have their type before them, and it has no last one of its own."""

        async def answer(request: Request) -> Response:
            try:
                asked = parsed(fields, await _body(request))
                self._service.check_model(asked.model)
                journal = _journal(request)
                work = kind(self._service, asked, request.scope["request_id"], journal.resumption)
                request.scope["work"] = work
                if asked.stream:
                    greedy = all(answer.generation.sequence.chooser.greedy for answer in work.answers)
                    journal.begin(work.created, work.answers, resumable=greedy)
                    return await _streaming(request, work, journal, named=named)
                return JSONResponse(await _unless_gone(request, work.whole()))
            except Gone:
                return Response(status_code=_GONE)
            except Exception as error:
                status, told = _error(error)
                return JSONResponse({"error": told}, status)

        return answer

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._service.name:
            return _told(
                404, f"this server serves {self._service.name!r}, not {name!r}", "invalid_request_error", "model", "model_not_found"
            )
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        service = self._service
        return {
            "id": service.name,
            "object": "model",
            "created": service.created,
            "owned_by": "shmbroker",
            "max_model_len": service.max_context,
        }

    def _health(self, request: Request) -> Response:
        reason = self._service.trouble()
        trust = msgspec.to_builtins(self._service.trust())
        if reason:
            return JSONResponse({"status": "unavailable", "reason": reason, "trust": trust}, status_code=503)
        return JSONResponse({"status": "ok", "worker": self._service.worker(), "trust": trust})

    def _render_metrics(self, request: Request) -> Response:
        return Response(self._metrics.render(), media_type=CONTENT_TYPE_LATEST)


async def _body(request: Request) -> object:
    """What was sent, as JSON. Raises :class:`Refused`."""
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                raise Refused(f"the request is larger than {MOST_BYTES} bytes", status=413)
    except ClientDisconnect:
        raise Gone from None
    try:
        found = json.loads(body)
        json.dumps(found, ensure_ascii=False).encode()
        return found
    except UnicodeEncodeError:
        raise Refused("the request's text has half a character: a surrogate without its other one") from None
    except (ValueError, RecursionError) as error:
        raise Refused(f"the request's body is no JSON: {error}") from None


async def _unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Its result. Raises :class:`Gone`, and cancels it, when the client goes away first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            request.scope["gone"] = True
            raise Gone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _journal(request: Request) -> Journal:
    """Of whoever calls the application and keeps one, else one that nobody reads."""
    kept = (request.scope.get("extensions") or {}).get(EXTENSION)
    return kept if isinstance(kept, Journal) else Journal()


async def _streaming(request: Request, work: Work, journal: Journal, *, named: bool) -> Response:
    """Its status is sent with the first token: what fails before that has a status of its own."""
    chunks = work.chunks()
    first: list[tuple[dict[str, Any], list[Step]]] = []

    async def begin() -> None:
        while not any([answer.generation.first_at for answer in work.answers]):
            try:
                first.append((await anext(chunks), journal.steps_to(work.answers)))
            except StopAsyncIteration:
                return

    await _unless_gone(request, begin())

    async def events() -> AsyncGenerator[str, None]:
        told = 0 if journal.resumption is None else journal.resumption.chunks
        try:
            for chunk, steps in first:
                told += 1
                journal.note(steps)
                yield event(chunk, named=named)
            async with contextlib.aclosing(chunks):
                async for chunk in chunks:
                    told += 1
                    journal.note(journal.steps_to(work.answers))
                    yield event(chunk, named=named)
        except (asyncio.CancelledError, GeneratorExit):
            request.scope["gone"] = True
            raise
        except Exception as error:
            journal.failed = isinstance(error, ShmBrokerError)
            yield error_event(_error(error)[1], named=named, number=told)
            return
        if not named:
            yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream", headers={"cache-control": "no-cache"})


def _error(error: Exception) -> tuple[int, dict[str, Any]]:
    """What is told of an error, and its status."""
    if isinstance(error, Refused):
        return error.status, error_object(str(error), "invalid_request_error", error.param, error.code)
    if isinstance(error, ShmBrokerError):
        return 503, error_object(str(error), type(error).__name__)
    # Not its words: they may be of what was asked or answered.
    log.error("a request failed: %s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
    return 500, error_object(f"this is a fault of the server, which has logged it: {type(error).__name__}", INTERNAL_ERROR)


def _told(status: int, message: str, kind: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    return JSONResponse({"error": error_object(message, kind, param, code)}, status)


def _host_of(host: str) -> str:
    """Without its port."""
    return host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0].lower()


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    status, told = _error(error)
    return JSONResponse({"error": told}, status)


async def _not_served(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path} is not served here"
    return _told(error.status_code, what, "not_found_error")
