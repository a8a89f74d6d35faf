"""Serving a split model over HTTP on loopback, until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from shmbroker.control.status import ask
from shmbroker.errors import BadInput
from shmbroker.models import Checkpoint
from tee_worker.own_peers import own_peers
from tee_worker.planning.splits import Splits
from tee_worker.run_options import LOOPBACK, ServeOptions
from tee_worker.split_run import check

if TYPE_CHECKING:
    import uvicorn

    from tee_worker.serving.endpoint import Endpoint

DRAIN_SECONDS = 10
"""How long requests may take to finish after SIGTERM or SIGINT; then they are told that the server ends."""

_TOLD_SECONDS = 5
"""In which they are told."""

_LOOK_SECONDS = 0.2
"""Between two looks whether a signal has come, where something else is waited for."""

READY = "ready: "
"""Begins the line that tells the endpoint's address."""

Signal = Callable[[], object]


def serve(
    options: ServeOptions,
    on_ready: Signal = lambda: None,
    on_alive: Signal = lambda: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> None:
    """Serve until SIGTERM or SIGINT. Raises :class:`ShmBrokerError`, OSError when the port is taken.

    ``on_ready`` is called in the event loop once requests are answered, ``on_alive`` every second from then on; ``on_note`` is told what goes on
    before.
    """
    _check_host(options.host)
    _check_key(options.api_key)
    check(options)
    try:
        from tee_worker.serving.engines import places
        from tee_worker.serving.served_model import context_of, served_model
    except ImportError as error:
        raise BadInput(f"serving needs packages that are not installed ({error}): pip install 'shmbroker[serve]'") from None
    places(Splits.named(options.split), options)
    checkpoint = Checkpoint.at(options.model)
    if not options.local:
        ask(options.instance)  # before anything is loaded: a missing broker is told at once
    context_of(checkpoint, options.max_context)
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(_listen(options.host, options.port))
        for number in (signal.SIGTERM, signal.SIGINT):
            stack.callback(signal.signal, number, signal.signal(number, _end))
        peers = own_peers(options, on_note, "--model", options.model) if options.local else None
        served = stack.enter_context(served_model(options, on_note, peers=peers))
        running = served.running
        host, port = listening.getsockname()[:2]
        url = f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"

        async def endpoint() -> Endpoint:
            return await served.endpoint(stack, on_note)

        def ready(most: int) -> None:
            trust = running.trust
            print(
                f"{READY}{url} serves {served.name!r}, split {running.splits}, at most {served.max_context} tokens, {most} at once, trust {trust}: {trust.told()}",
                flush=True,
            )
            on_ready()

        import uvicorn

        config = uvicorn.Config(
            _nothing_yet,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=DRAIN_SECONDS + _TOLD_SECONDS,
            lifespan="off",
            loop="asyncio",
            http="h11",
        )
        server = uvicorn.Server(config)

        def stop(number: int, frame: FrameType | None) -> None:
            server.should_exit = True

        # Uvicorn has handlers of its own meanwhile, and raises at its end once more what came, for whoever was there before.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        asyncio.run(_run(server, listening, endpoint, ready, on_alive, running.channel.close))


async def _run(
    server: uvicorn.Server,
    listening: socket.socket,
    endpoint: Callable[[], Awaitable[Endpoint]],
    on_ready: Callable[[int], object],
    on_alive: Signal,
    close_channel: Callable[[], None],
) -> None:
    """Make the endpoint and serve until a signal. ``close_channel``: fails every call, also one that waits for a worker."""
    made: Endpoint | None = None

    async def end() -> None:
        """Whoever generates, or waits for a worker, is told so."""
        if made is not None:
            made.stop()
        await asyncio.to_thread(close_channel)

    try:
        making = asyncio.ensure_future(endpoint())
        while not making.done():
            await asyncio.wait([making], timeout=_LOOK_SECONDS)
            if server.should_exit:
                await end()
                await asyncio.gather(making, return_exceptions=True)
                return
        made = making.result()
        server.config.app = made
        serving = asyncio.ensure_future(server.serve(sockets=[listening]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if server.started:
            on_ready(made.at_once)
        over: float | None = None
        while not serving.done():
            on_alive()
            await asyncio.wait([serving], timeout=_LOOK_SECONDS if server.should_exit else 1.0)
            if server.should_exit and over is None:
                over = time.monotonic() + DRAIN_SECONDS
            if over is not None and time.monotonic() > over:
                over = math.inf
                await end()
        await serving
    finally:
        await end()


async def _nothing_yet(scope: Any, receive: Any, send: Any) -> None:
    """In the application's place, until it is made."""
    raise AssertionError("the application is set before the server starts")


def _end(number: int, frame: FrameType | None) -> None:
    """While the model is loaded: what is open is closed on the way out."""
    raise SystemExit(0)


def _check_host(host: str) -> None:
    if host not in LOOPBACK:
        raise BadInput(
            f"--host {host!r} is not this machine's loopback: whoever reaches the endpoint could use it, and prompts and answers would cross "
            "the network as they are; serve on 127.0.0.1 and put a proxy with TLS and authentication before it"
        )


def _check_key(key: str | None) -> None:
    if key is not None and (not key or key.strip() != key or not key.isascii() or not key.isprintable()):
        raise BadInput("--api-key must be printable ASCII characters, without blanks before or after: no client could send another")


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise BadInput(f"cannot listen on {host} port {port}: {error.strerror or error}; choose another --port (0: any free one)") from None
