"""What no Python program can be below: two processes that only tell each other that it is the other's turn."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator

import posix_ipc

from benchmarks.measure import Call
from benchmarks.peer import be_peer, peer, ready
from shmbroker.memory.names import new_id

PEER = "contenders.floors"


@contextlib.contextmanager
def spin() -> Iterator[Call]:
    """Both spin: of a shared page, word 0 is this side's turn, word 8 (another cache line) the peer's, word 1 tells it to end."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.truncate(mmap.PAGESIZE)
        words = memoryview(mmap.mmap(file.fileno(), mmap.PAGESIZE)).cast("Q")
        with peer(PEER, "spin", file.name) as process:
            turn = 0

            def call() -> None:
                nonlocal turn
                turn += 1
                words[0] = turn
                while words[8] != turn:
                    pass

            yield Call(call, process.pid)
            os.kill(process.pid, signal.SIGCONT)
            words[1] = 1


def serve_spin(path: str) -> None:
    """The peer of :func:`spin`."""
    with open(path, "r+b") as file:
        words = memoryview(mmap.mmap(file.fileno(), mmap.PAGESIZE)).cast("Q")
    ready()
    expected = 1
    while True:
        while words[0] != expected:
            if words[1]:
                return
        words[8] = expected
        expected += 1


@contextlib.contextmanager
def semaphore() -> Iterator[Call]:
    """Both block: a POSIX semaphore each way."""
    names = [f"/shmbroker-benchmark.{new_id()}" for _ in range(2)]
    there, back = (posix_ipc.Semaphore(name, posix_ipc.O_CREX) for name in names)
    try:
        with peer(PEER, "semaphore", *names):

            def call() -> None:
                there.release()
                back.acquire()

            yield Call(call)
    finally:
        there.unlink()
        back.unlink()


def serve_semaphore(there: str, back: str) -> None:
    """The peer of :func:`semaphore`."""
    mine, other = posix_ipc.Semaphore(there), posix_ipc.Semaphore(back)
    ready()
    while True:
        mine.acquire()
        other.release()


@contextlib.contextmanager
def eventfd() -> Iterator[Call]:
    """Both block, with file descriptors."""
    there, back = os.eventfd(0), os.eventfd(0)
    try:
        with peer(PEER, "eventfd", str(there), str(back), pass_fds=(there, back)):

            def call() -> None:
                os.eventfd_write(there, 1)
                os.eventfd_read(back)

            yield Call(call)
    finally:
        os.close(there)
        os.close(back)


def serve_eventfd(there: str, back: str) -> None:
    """The peer of :func:`eventfd`."""
    mine, other = int(there), int(back)
    ready()
    while True:
        os.eventfd_read(mine)
        os.eventfd_write(other, 1)


KINDS: dict[str, Callable[..., None]] = {"spin": serve_spin, "semaphore": serve_semaphore, "eventfd": serve_eventfd}


if __name__ == "__main__":
    kind, *arguments = sys.argv[1:]
    be_peer(KINDS[kind], *arguments)
