"""Serving a split model over HTTP on loopback, until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from shmbroker.control.status import ask
from shmbroker.errors import BadInput
from shmbroker.models import Checkpoint
from tee_worker.own_peers import own_peers
from tee_worker.planning.splits import Splits
from tee_worker.run_options import LONGEST_CONTEXT, LOOPBACK, ServeOptions
from tee_worker.split_run import check, failover_channel, split_run

if TYPE_CHECKING:
    import uvicorn

    from tee_worker.serving.endpoint import Endpoint

DRAIN_SECONDS = 10
"""How long requests may take to finish after SIGTERM or SIGINT; then they are told that the server ends."""

_TOLD_SECONDS = 5
"""In which they are told."""

_LOOK_SECONDS = 0.2
"""Between two looks whether a signal has come, where something else is waited for."""

_PROGRESS_SECONDS = 10.0
"""Between two words of what takes long."""

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
    splits = Splits.named(options.split)
    try:
        from tee_worker.serving.endpoint import Endpoint
        from tee_worker.serving.engines import engine_for, places
        from tee_worker.serving.sampling import Choices
        from tee_worker.serving.service import Service
    except ImportError as error:
        raise BadInput(f"serving needs packages that are not installed ({error}): pip install 'shmbroker[serve]'") from None
    at_once = places(splits, options)
    checkpoint = Checkpoint.at(options.model)
    if not options.local:
        ask(options.instance)  # before anything is loaded: a missing broker is told at once
    max_context = _max_context(checkpoint, options.max_context)
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(_listen(options.host, options.port))
        for number in (signal.SIGTERM, signal.SIGINT):
            stack.callback(signal.signal, number, signal.signal(number, _end))
        tokenizer = checkpoint.tokenizer()
        loading = stack.enter_context(told_while(f"loading {checkpoint.name}", on_note))
        running = stack.enter_context(
            split_run(
                options,
                checkpoint,
                failover_channel,
                prompt_tokens=max_context,
                new_tokens=1,
                spare=_spare(checkpoint, at_once, max_context),
                name="tee-worker serve",
                peers=own_peers(options, on_note, "--model", options.model) if options.local else None,
                on_note=on_note,
            )
        )
        loading()
        name = options.served_model_name or _name_of(checkpoint)
        host, port = listening.getsockname()[:2]
        url = f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
        choices = Choices(running.model)

        def trouble() -> str:
            return (running.sealed.session.trouble if running.sealed is not None else "") or running.channel.trouble()

        async def endpoint() -> Endpoint:
            engine = await engine_for(running.model, at_once, max_context, asked=options.max_concurrency is not None, on_note=on_note)
            stack.callback(engine.close)
            service = Service(
                name,
                running.model,
                tokenizer,
                engine,
                choices,
                max_context,
                trouble,
                lambda: running.channel.worker_name,
                running.trust_report,
            )
            return Endpoint(service, api_key=options.api_key, access=on_note)

        def ready(most: int) -> None:
            trust = running.trust
            print(
                f"{READY}{url} serves {name!r}, split {running.splits}, at most {max_context} tokens, {most} at once, trust {trust}: {trust.told()}",
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


@contextlib.contextmanager
def told_while(what: str, on_note: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Tell ``what`` goes on, with the seconds so far, every few seconds until the block ends or what is yielded is called."""
    begun, over = time.monotonic(), threading.Event()

    def tell() -> None:
        while not over.wait(_PROGRESS_SECONDS):
            on_note(f"{what} ({time.monotonic() - begun:.0f} s so far)")

    thread = threading.Thread(target=tell, name="shmbroker-progress", daemon=True)
    thread.start()
    try:
        yield over.set
    finally:
        over.set()
        thread.join()


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


def _spare(checkpoint: Checkpoint, at_once: int, max_context: int) -> int:
    """So many largest tensors more than one request's: a pass has the logits of ``at_once``."""
    config = checkpoint.config().get_text_config()
    return int(-(-2 * (at_once - 1) * config.vocab_size // (max_context * config.hidden_size)))


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise BadInput(f"cannot listen on {host} port {port}: {error.strerror or error}; choose another --port (0: any free one)") from None


def _max_context(checkpoint: Checkpoint, told: int | None) -> int:
    of_model = getattr(checkpoint.config().get_text_config(), "max_position_embeddings", None) or LONGEST_CONTEXT
    if told is None:
        return int(min(of_model, LONGEST_CONTEXT))
    if not 2 <= told <= of_model:
        raise BadInput(f"--max-context {told}: this model sees up to {of_model} tokens; give 2 to {of_model}")
    return told


def _name_of(checkpoint: Checkpoint) -> str:
    return (checkpoint.gguf_file or checkpoint.folder.resolve().name).removesuffix(".gguf")
