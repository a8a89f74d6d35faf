"""What clients reach: takes a request to a replica and its answer back, and to another replica when the first is lost.

A request of which nothing was answered yet is asked anew, whole. A stream of likeliest tokens goes on where it was: the next replica is given what was
told, and says the rest. A stream that is sampled cannot: it ends with an error object. Needs no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, MutableMapping
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from tee_worker.scale_out.messages import Begun, Here, Part, Question, answering_of, encode
from tee_worker.serving.resumption import AnswerSoFar, Resumption
from tee_worker.serving.wire import INTERNAL_ERROR, MOST_BYTES, REQUEST_ID, error_event, error_object, error_response

log = logging.getLogger(__name__)

MOST_LOSSES = 3
"""Replicas that one request may be lost with: it might be what ends them."""

UNAVAILABLE = 503

REPLICA_HEADER = b"x-shmbroker-replica"
"""Of a response: Ray's name of the replica that began it, as in its logs."""

_NAMED = "/v1/responses"
"""The path whose streams have their events' types before them."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Any]
Send = Callable[[dict[str, Any]], Any]


class Answer(Protocol):
    """Parts of a replica's answer as they come; ``cancel``: nobody reads it any more."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """The parts."""

    def cancel(self) -> None:
        """Have the replica end it."""


Ask = Callable[[bytes, list[str]], Answer]
"""Takes an encoded question to a replica, if possible to none of those that are named."""


class Lost(Exception):
    """The replica is gone, or cannot go on; its words. ``replica``: which, where that is known and it still answers."""

    def __init__(self, words: str, replica: str | None = None) -> None:
        super().__init__(words)
        self.replica = replica


class Gone(Exception):
    """The client is not there any more."""


class Relay:
    """The application. ``patience``: seconds for a replica to take a request; ``is_loss``: whether an error of the transport is a replica's end."""

    def __init__(self, ask: Ask, patience: float, is_loss: Callable[[Exception], bool]) -> None:
        self.ask = ask
        self.patience = patience
        self.is_loss = is_loss
        self._registry = CollectorRegistry()
        name = "shmbroker_ray_"
        self.requests = Counter(f"{name}requests", "Requests, by status.", ["status"], registry=self._registry)
        self.resumed = Counter(f"{name}resumed", "Streams that went on at another replica.", registry=self._registry)
        self.repeated = Counter(f"{name}repeated", "Requests asked anew, of which nothing had been answered.", registry=self._registry)
        self.cut = Counter(f"{name}cut", "Streams that ended with an error, as they could not go on.", registry=self._registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the server's beginning and end."""
        if scope["type"] == "lifespan":
            for word in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{word}.complete"})
            return
        if scope["type"] != "http":
            raise ValueError(f"{scope['type']} is not served here")
        if scope["path"] == "/metrics":
            await _whole(send, 200, generate_latest(self._registry), CONTENT_TYPE_LATEST)
            return
        try:
            body = await _body(receive)
        except Gone:
            return
        if body is None:
            await self.refuse(send, 413, error_object(f"the request is larger than {MOST_BYTES} bytes", "invalid_request_error"))
            return
        await _Request(self, scope, body, send).answer()

    async def refuse(self, send: Send, status: int, error: dict[str, Any]) -> None:
        """Answer with an error, of which nothing else was sent."""
        self.requests.labels(str(status)).inc()
        await _whole(send, status, error_response(error), "application/json")


class _Request:
    """One request on its way to an answer."""

    def __init__(self, relay: Relay, scope: Scope, body: bytes, send: Send) -> None:
        self._relay = relay
        self._send = send
        headers = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
        if not any(name == REQUEST_ID.encode() for name, _ in headers):
            headers.append((REQUEST_ID.encode(), uuid.uuid4().hex.encode()))  # the same wherever it is answered
        self._question = Question(scope["method"], scope["path"], scope["query_string"], headers, body)
        self._named = scope["path"] == _NAMED
        self._sending = False
        """Whether the client has its status."""
        self._so_far: Resumption | None = None
        self._resumable = False
        self._avoid: list[str] = []

    async def answer(self) -> None:
        """Until it is answered, one way or the other."""
        losses = 0
        while True:
            try:
                await self._through_one()
                return
            except Lost as lost:
                losses += 1
                log.warning("a request was lost with its replica: %s", lost)
                if lost.replica is not None:
                    self._avoid.append(lost.replica)
                what = error_object(f"the replica that answered is lost: {lost}", "ReplicaLost")
                if losses == MOST_LOSSES:
                    what = error_object(
                        f"the request was lost with {losses} replicas, one after the other; the last one: {lost}", "ReplicaLost"
                    )
                elif not self._sending:
                    self._relay.repeated.inc()
                    continue
                elif self._resumable and self._so_far is not None:
                    self._relay.resumed.inc()
                    self._question.resumption = self._so_far
                    continue
                else:
                    what["message"] += "; its text was sampled, and another replica would go on with another one: ask again"
            except (TimeoutError, asyncio.TimeoutError):
                what = error_object(
                    f"no replica took the request within {self._relay.patience:g} s: all are busy, or none is running", "ReplicaLost"
                )
            except Exception as error:
                log.error("a request failed: %s", type(error).__name__)
                what = error_object(f"this is a fault of the server, which has logged it: {type(error).__name__}", INTERNAL_ERROR)
                await self._fail(what, 500)
                return
            await self._fail(what, UNAVAILABLE)
            return

    async def _fail(self, what: dict[str, Any], status: int) -> None:
        if not self._sending:
            await self._relay.refuse(self._send, status, what)
            return
        self._relay.cut.inc()
        number = 0 if self._so_far is None else self._so_far.chunks
        data = error_event(what, named=self._named, number=number).encode()
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def _through_one(self) -> None:
        """Ask a replica and hand on what it says. Raises :class:`Lost`, TimeoutError where none takes it."""
        answer = self._relay.ask(encode(self._question), list(self._avoid))
        whole = False
        try:
            async with contextlib.aclosing(self._said(answer)) as said:
                replica = ""
                head: Begun | None = None
                async for one in said:
                    if isinstance(one, Here):
                        replica = one.replica
                    elif isinstance(one, Begun):
                        head = self._head(one, replica)
                    else:
                        assert head is not None
                        await self._part(one, head, replica)
                        whole = one.last
            if not whole:
                raise Lost("its answer ended before its end")
        finally:
            if not whole:
                answer.cancel()

    async def _said(self, answer: Answer) -> AsyncGenerator[Here | Begun | Part, None]:
        parts = aiter(answer)
        try:
            data = await asyncio.wait_for(anext(parts), self._relay.patience)
            while True:
                for one in answering_of(data):
                    yield one
                data = await anext(parts)
        except StopAsyncIteration:
            return
        except Exception as error:
            if not self._relay.is_loss(error):
                raise
            raise Lost(f"{type(error).__name__}") from None

    def _head(self, head: Begun, replica: str) -> Begun:
        if head.status == UNAVAILABLE and replica not in self._avoid and not self._sending:
            raise Lost("it can answer nothing now", replica)
        if self._sending and head.status != 200:
            raise Lost(f"it does not go on with what another one began (status {head.status})", replica)
        if self._so_far is None and head.answers:
            self._so_far = Resumption(head.created, 0, [AnswerSoFar() for _ in range(head.answers)])
            self._resumable = head.resumable
        return head

    async def _part(self, part: Part, head: Begun, replica: str) -> None:
        if part.failed and self._resumable and replica not in self._avoid:
            raise Lost("it could not go on", replica)
        if not self._sending:
            self._relay.requests.labels(str(head.status)).inc()
            headers = [*head.headers, (REPLICA_HEADER, replica.encode())]
            await self._send({"type": "http.response.start", "status": head.status, "headers": headers})
            self._sending = True
        await self._send({"type": "http.response.body", "body": part.data, "more_body": not part.last})
        if part.steps is not None and self._so_far is not None:
            self._so_far.add(part.steps)


async def _body(receive: Receive) -> bytes | None:
    """What was sent; None for too much. Raises :class:`Gone`."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        body += message.get("body", b"")
        if len(body) > MOST_BYTES:
            return None
        if not message.get("more_body", False):
            return bytes(body)


async def _whole(send: Send, status: int, body: bytes, kind: str) -> None:
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
