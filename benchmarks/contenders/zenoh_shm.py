"""zenoh's shared memory: a buffer loaned in its own, published to the peer, and one published back.

What the Python binding (1.10) carries: it loans a buffer, hands it over without a copy, and gives its receiver a handle on the same bytes. It has no view of
them: neither handle has the buffer protocol, nor tells an address. They are written by ``buffer[i:j] = bytes`` and read by ``bytes(buffer)``, a copy each. So
there are two ways here: ``buffers``, in which neither end has a tensor and nothing is copied, and ``tensors``, in which each receiver makes one of what
came, by one copy. No sender's copy is counted in either, as no sender here writes its tensor anew.

Client and peer are two processes of this file: zenoh's own threads are those of a process, and its files in ``/dev/shm`` are there until it ends.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import zenoh
from zenoh import shm

from benchmarks.driven import Driven, drive
from benchmarks.measure import Call
from benchmarks.peer import be_peer, peer, ready

MODULE = "contenders.zenoh_shm"
THERE, BACK = "shmbroker-benchmark/there", "shmbroker-benchmark/back"
BLOCKS = 8
"""Buffers that there is room for at each end."""

ROOM_BYTES = 1 << 20
"""Beside them."""


@contextlib.contextmanager
def calls(nbytes: int) -> Iterator[dict[str, Call]]:
    """``buffers`` and ``tensors``."""
    with contextlib.ExitStack() as stack:
        files: set[Path] = set()
        stack.callback(unlink_files, files)
        ways: dict[str, Call] = {}
        for way in ("buffers", "tensors"):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            arguments = way, f"unixsock-stream/{folder}/s", str(nbytes)
            processes = [stack.enter_context(peer(MODULE, role, *arguments, leaves=True)) for role in ("serve", "call")]
            ways[way] = Driven(processes[1])
            ways[way]()
            files.update(*[files_of(process.pid) for process in processes])
        yield ways


def files_of(pid: int) -> set[Path]:
    """Zenoh's files in shared memory that a process has mapped."""
    parts = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return {Path(part[5]) for part in parts if len(part) == 6 and part[5].startswith("/dev/shm/") and part[5].endswith(".zenoh")}


def unlink_files(files: set[Path]) -> None:
    """Zenoh leaves its own behind when a Python process ends."""
    for file in files:
        file.unlink(missing_ok=True)


class End:
    """A session that sends buffers under one key and has the other's come to ``handler``."""

    def __init__(self, way: str, listen: str, connect: str, nbytes: int, sends: str, receives: str, handler: Any = None) -> None:
        config = zenoh.Config()
        for key, value in (
            ("mode", '"peer"'),
            ("scouting/multicast/enabled", "false"),
            ("scouting/gossip/enabled", "false"),
            ("listen/endpoints", f'["{listen}"]' if listen else "[]"),
            ("connect/endpoints", f'["{connect}"]' if connect else "[]"),
            ("transport/shared_memory/enabled", "true"),
        ):
            config.insert_json5(key, value)
        self._session = zenoh.open(config)
        self._provider = shm.ShmProvider.default_backend(BLOCKS * nbytes + ROOM_BYTES)
        self._nbytes = nbytes
        self._as_tensor = way == "tensors"
        self.publisher = self._session.declare_publisher(sends, express=True, congestion_control=zenoh.CongestionControl.BLOCK)
        self.subscriber = self._session.declare_subscriber(receives, handler or zenoh.handlers.FifoChannel(1))

    def send(self) -> None:
        """A buffer, as it was loaned."""
        self.publisher.put(self._provider.alloc(self._nbytes, shm.GarbageCollect()))

    def receive(self, sample: Any) -> object:
        """What came: a handle on the sender's bytes, or a tensor of a copy. Raises where they did not come through shared memory."""
        buffer = sample.payload.as_shm()
        if buffer is None:
            raise RuntimeError("zenoh has copied a buffer over its socket")
        return torch.frombuffer(bytes(buffer), dtype=torch.uint8) if self._as_tensor else buffer

    def close(self) -> None:
        """End the session."""
        self._session.close()


def serve(way: str, endpoint: str, nbytes: str) -> None:
    """The peer, until its standard input is closed."""
    torch.set_num_threads(1)

    def answer(sample: Any) -> None:
        end.receive(sample)
        end.send()

    end = End(way, endpoint, "", int(nbytes), BACK, THERE, answer)
    ready()
    sys.stdin.read()
    end.close()


def call(way: str, endpoint: str, nbytes: str) -> None:
    """The client, until nothing more is asked."""
    torch.set_num_threads(1)
    end = End(way, "", endpoint, int(nbytes), THERE, BACK)
    while not end.publisher.matching_status.matching:
        pass  # what is published before is lost

    def round_trip() -> object:
        end.send()
        return end.receive(end.subscriber.recv())

    drive(round_trip)
    end.close()


ROLES: dict[str, Callable[[str, str, str], None]] = {"serve": serve, "call": call}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="The given buffer is not writable")
    role, *arguments = sys.argv[1:]
    if role == "serve":
        be_peer(serve, *arguments)
    else:
        ROLES[role](*arguments)
