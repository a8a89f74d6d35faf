"""An OpenAI-compatible HTTP endpoint: Hugging Face's own server, given a model whose heavy modules are computed by a GPU worker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import msgspec
import torch

from shmbroker.client.client import connect
from shmbroker.control.status import ask
from shmbroker.errors import BadInput
from shmbroker.models.checkpoint import Checkpoint, model_dtype
from tee_worker.offloading.offload import offload
from tee_worker.planning.own_part import own_part
from tee_worker.planning.splits import Split, Splits
from tee_worker.planning.structure import structure_of
from tee_worker.planning.traffic import generation_traffic
from tee_worker.split_run import arena_bytes

if TYPE_CHECKING:
    import uvicorn

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
DEFAULT_MAX_CONTEXT = 4096
DRAIN_SECONDS = 10
"""How long requests may take to finish after SIGTERM or SIGINT; then they are cut off."""

READY = "ready: "
"""Begins the line that tells the endpoint's address."""

Signal = Callable[[], object]


class Options(msgspec.Struct, frozen=True):
    """What is served, and how."""

    model: str
    split: str = Split.FUSED.value
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    max_context: int | None = None
    pipeline: int = 1
    dtype: str = "float32"
    instance: str | None = None
    service: str = "gpu"
    lane: str = "auto"
    failover: float = 30.0
    timeout: float = 60.0
    threads: int | None = None
    arena: str | None = None
    trace: str | None = None


def serve(options: Options, on_ready: Signal = lambda: None, on_alive: Signal = lambda: None) -> None:
    """Serve until SIGTERM or SIGINT. Raises :class:`ShmBrokerError`, OSError when the port is taken.

    ``on_ready`` is called in the event loop once requests are answered, ``on_alive`` every second from then on.
    """
    _check_host(options.host)
    split = Splits.named(options.split)
    dtype = model_dtype(options.dtype)
    if options.failover < 0:
        raise BadInput(f"--failover {options.failover:g} must be 0 or more seconds")
    try:
        from tee_worker.serving.endpoint import Line, SplitModels, application
    except ImportError as error:
        raise BadInput(f"serving needs packages that are not installed ({error}): pip install 'shmbroker[serve]'") from None
    checkpoint = Checkpoint.at(options.model)
    ask(options.instance)  # before anything is loaded: a missing broker is told at once
    if options.threads:
        torch.set_num_threads(options.threads)
    max_context = _max_context(checkpoint, options.max_context)
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(_listen(options.host, options.port))
        for number in (signal.SIGTERM, signal.SIGINT):
            stack.callback(signal.signal, number, signal.signal(number, _end))
        tokenizer = checkpoint.tokenizer()
        model = own_part(checkpoint, dtype, split)
        structure = structure_of(model, split)
        planned = generation_traffic(structure, split, prompt_tokens=max_context, new_tokens=1, pipeline=options.pipeline)
        arena = arena_bytes(options.arena, planned, options.pipeline)
        client = stack.enter_context(
            connect(options.instance, arena=arena, name="tee-worker serve", timeout=options.timeout, trace=options.trace)
        )
        channel = client.failover_channel(options.service, lane=options.lane, patience=options.failover)
        offload(model, channel, split, pipeline=options.pipeline, structure=structure)
        name = options.served_model_name or _name_of(checkpoint)
        line = Line(channel, max_context)
        stack.callback(line.close)
        app = application(SplitModels(name, model, tokenizer), line)
        host, port = listening.getsockname()[:2]
        url = f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"

        def ready() -> None:
            print(f"{READY}{url} serves {name!r}, split {split}, at most {max_context} tokens", flush=True)
            on_ready()

        import uvicorn

        config = uvicorn.Config(
            app, log_config=None, access_log=False, timeout_graceful_shutdown=DRAIN_SECONDS, lifespan="off", loop="asyncio", http="h11"
        )
        server = uvicorn.Server(config)

        def stop(number: int, frame: FrameType | None) -> None:
            server.should_exit = True

        # Uvicorn has handlers of its own meanwhile, and raises at its end once more what came, for whoever was there before.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        asyncio.run(_run(server, listening, ready, on_alive))


async def _run(server: uvicorn.Server, listening: socket.socket, on_ready: Signal, on_alive: Signal) -> None:
    serving = asyncio.ensure_future(server.serve(sockets=[listening]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        on_ready()
    while not serving.done():
        on_alive()
        await asyncio.wait([serving], timeout=1.0)
    await serving


def _end(number: int, frame: FrameType | None) -> None:
    """While the model is loaded: what is open is closed on the way out."""
    raise SystemExit(0)


def _check_host(host: str) -> None:
    if host not in LOOPBACK:
        raise BadInput(
            f"--host {host!r} is not this machine's loopback: whoever reaches the endpoint could use it, and prompts and answers would cross "
            "the network as they are; serve on 127.0.0.1 and put a proxy with TLS and authentication before it"
        )


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise BadInput(f"cannot listen on {host} port {port}: {error.strerror or error}; choose another --port (0: any free one)") from None


def _max_context(checkpoint: Checkpoint, told: int | None) -> int:
    of_model = getattr(checkpoint.config().get_text_config(), "max_position_embeddings", None) or DEFAULT_MAX_CONTEXT
    if told is None:
        return int(min(of_model, DEFAULT_MAX_CONTEXT))
    if not 2 <= told <= of_model:
        raise BadInput(f"--max-context {told}: this model sees up to {of_model} tokens; give 2 to {of_model}")
    return told


def _name_of(checkpoint: Checkpoint) -> str:
    return (checkpoint.gguf_file or checkpoint.folder.resolve().name).removesuffix(".gguf")
