"""The process at the other end of a benchmark: started, ready, ended.

A peer is a module that is run: ``python -m benchmarks.contenders.NAME ARGUMENT ...``. At its end stands ``be_peer(serve, ...)``, and ``serve`` calls
:func:`ready` once calls may come. Of a contender whose client is a process of its own too, that one is started in the same way.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.machine import PEER_CPU, pin
from shmbroker.client.local_broker import stop_process

ROOT = Path(__file__).parents[1]
READY = "ready"

LEAVING_SECONDS = 30.0
"""In which a process that tidies up once its standard input is closed has done so, on a machine that does much else."""


@contextlib.contextmanager
def started(
    command: Sequence[str], environment: Mapping[str, str] | None = None, pass_fds: tuple[int, ...] = (), *, leaves: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has said that it is ready. At the end its standard input is closed, and it is ended: at once, unless it ``leaves`` by itself."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, env=environment, pass_fds=pass_fds)
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != READY.encode():
            raise RuntimeError(f"{' '.join(command)} did not start; its own words are above")
        yield process
    finally:
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        if leaves:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LEAVING_SECONDS)
        stop_process(process)


@contextlib.contextmanager
def peer(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None, pass_fds: tuple[int, ...] = (), leaves: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs ``module`` of this package, ready, with ``environment`` beside this one's. Else as :func:`started`."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with started(command, {**os.environ, "PYTHONPATH": path, **(environment or {})}, pass_fds, leaves=leaves) as process:
        yield process


def be_peer(serve: Callable[..., None], *arguments: str) -> None:
    """Serve in this process, on the peer's core."""
    pin(PEER_CPU)
    serve(*arguments)


def ready() -> None:
    """Tell the starter that calls may come."""
    print(READY, flush=True)
