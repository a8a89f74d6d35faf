"""The process at the other end of a benchmark: started, ready, ended.

A peer is a module that is run: ``python -m benchmarks.contenders.NAME ARGUMENT ...``. At its end stands ``be_peer(serve, ...)``, and ``serve`` calls
:func:`ready` once calls may come.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.machine import PEER_CPU, pin
from shmbroker.client.local_broker import stop_process

ROOT = Path(__file__).parents[1]
READY = "ready"


@contextlib.contextmanager
def peer(module: str, *arguments: str, pass_fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs ``module`` of this package, ready."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, env=environment, pass_fds=pass_fds)
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != READY.encode():
            raise RuntimeError(f"the peer {module} did not start; its own words are above")
        yield process
    finally:
        if process.stdin is not None:
            process.stdin.close()
        stop_process(process)


def be_peer(serve: Callable[..., None], *arguments: str) -> None:
    """Serve in this process, on the peer's core."""
    pin(PEER_CPU)
    serve(*arguments)


def ready() -> None:
    """Tell the starter that calls may come."""
    print(READY, flush=True)
