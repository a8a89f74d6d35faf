"""The core in C without any Python: two processes of ``core_floor.c``, built on the spot, hand blocks over by offset and spin."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import shmbroker
from benchmarks.driven import Driven
from benchmarks.machine import PEER_CPU
from benchmarks.measure import Call
from benchmarks.peer import started
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.layout import PAGE, round_up
from shmbroker.memory.names import new_id, segment_name
from shmbroker.memory.segment import make_segment, unlink_segment

SOURCE = Path(__file__).with_suffix(".c")
COMPILER = "gcc"
ROOM_BYTES = 1 << 20
"""Of the arena, beside the two blocks: for their alignment, and for blocks of a few bytes."""


def no_compiler() -> str | None:
    """Why it is left out, if it is."""
    return None if shutil.which(COMPILER) else f"there is no {COMPILER} here to build it with"


def built(folder: str) -> str:
    """The program, built as whoever uses the core builds his own."""
    program = str(Path(folder) / "core_floor")
    subprocess.run([COMPILER, "-std=c11", "-O2", "-I", shmbroker.get_include(), str(SOURCE), "-o", program, "-pthread"], check=True)
    return program


@contextlib.contextmanager
def calls(nbytes: int) -> Iterator[Call]:
    """A submission there and a completion back."""
    name = segment_name("floor", new_id())
    with contextlib.ExitStack() as stack:
        program = built(stack.enter_context(tempfile.TemporaryDirectory()))
        hold = make_segment(name, Geometry(round_up(2 * nbytes, PAGE) + ROOM_BYTES), instance="floor", owner="00", owner_pid=os.getpid())
        stack.callback(unlink_segment, name)
        stack.callback(hold.release)
        worker = stack.enter_context(started([program, "worker", f"/dev/shm{name}"]))
        if (os.cpu_count() or 1) > 1:
            os.sched_setaffinity(worker.pid, {PEER_CPU})
        client = stack.enter_context(started([program, "client", f"/dev/shm{name}", str(nbytes)]))
        stack.callback(os.kill, worker.pid, signal.SIGCONT)
        yield Driven(client, worker.pid)
