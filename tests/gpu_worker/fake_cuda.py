"""A driver for machines without a GPU, at the boundary of :class:`Cuda`: its device memory is files that processes share, its handles their names."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from gpu_worker.cuda.streams import StreamKind
from shmbroker.errors import CudaRefused

NOT_SUPPORTED = 801
"""cudaErrorNotSupported: what confidential computing answers to cudaHostRegister."""

INVALID_HANDLE = 400


class _Owned(np.ndarray):  # type: ignore[type-arg]
    owner: object


class FakeCuda:
    """``refuse``: names of functions that fail, with the code; ``refuse_after``: so many registrations succeed first."""

    def __init__(self, folder: Path, refuse: dict[str, int] | None = None, refuse_after: int = 0) -> None:
        self.folder = folder
        self.refuse = refuse or {}
        self.refuse_after = refuse_after
        self.registered: dict[int, int] = {}
        self.log: list[tuple[str, int, int]] = []
        self.mapped: dict[int, tuple[mmap.mmap, str]] = {}
        self.synchronized = 0

    def _asked(self, name: str) -> None:
        if name in self.refuse:
            raise CudaRefused(f"{name}: refused ({self.refuse[name]})", self.refuse[name])

    def register(self, address: int, nbytes: int) -> None:
        assert nbytes > 0
        if len(self.registered) >= self.refuse_after:
            self._asked("cudaHostRegister")
        assert address not in self.registered
        self.registered[address] = nbytes
        self.log.append(("register", address, nbytes))

    def unregister(self, address: int) -> None:
        self.log.append(("unregister", address, self.registered.pop(address)))

    def allocate(self, nbytes: int) -> int:
        self._asked("cudaMalloc")
        name = f"{os.getpid()}-{time.monotonic_ns()}"
        (self.folder / name).write_bytes(bytes(nbytes))
        return self._map(name)

    def _map(self, name: str) -> int:
        try:
            with (self.folder / name).open("r+b") as file:
                memory = mmap.mmap(file.fileno(), 0)
        except OSError:
            raise CudaRefused(f"cudaIpcOpenMemHandle: cudaErrorInvalidResourceHandle ({INVALID_HANDLE})", INVALID_HANDLE) from None
        pointer = int(np.frombuffer(memory, np.uint8).ctypes.data)
        self.mapped[pointer] = memory, name
        return pointer

    def free(self, pointer: int) -> None:
        (self.folder / self.mapped.pop(pointer)[1]).unlink()

    def export(self, pointer: int) -> bytes:
        self._asked("cudaIpcGetMemHandle")
        return self.mapped[pointer][1].encode().ljust(64, b"\0")

    def open(self, handle: bytes) -> int:
        self._asked("cudaIpcOpenMemHandle")
        return self._map(handle.rstrip(b"\0").decode())

    def close(self, pointer: int) -> None:
        del self.mapped[pointer]

    def size(self, pointer: int) -> int:
        return len(self.mapped[pointer][0])

    def tensor(self, pointer: int, nbytes: int, owner: object) -> tuple[torch.Tensor, object]:
        base, memory = next((start, memory) for start, (memory, _) in self.mapped.items() if start <= pointer < start + len(memory))
        array = np.ndarray.__new__(_Owned, (nbytes,), np.uint8, memory, pointer - base)
        array.owner = owner
        return torch.from_numpy(array), array

    def synchronize(self) -> None:
        self.synchronized += 1

    def holds(self, tensor: torch.Tensor) -> bool:
        return any(start <= tensor.data_ptr() < start + len(memory) for start, (memory, _) in self.mapped.items())


class FakeEvent:
    def __init__(self, streams: FakeStreams, kind: StreamKind, number: int) -> None:
        self.streams = streams
        self.kind = kind
        self.number = number

    def synchronize(self) -> None:
        time.sleep(self.streams.seconds)
        self.streams.log.append(f"wait {self.kind.value} {self.number}")
        if self.streams.fail:
            raise RuntimeError(self.streams.fail)


class FakeStreams:
    """Work is done at once; what was asked is written down. An event takes ``seconds`` to come, or fails."""

    def __init__(self, seconds: float = 0.0, fail: str = "") -> None:
        self.seconds = seconds
        self.fail = fail
        self.log: list[str] = []
        self.marks = 0

    @contextlib.contextmanager
    def on(self, kind: StreamKind) -> Iterator[None]:
        self.log.append(f"on {kind.value}")
        yield

    def mark(self, kind: StreamKind) -> FakeEvent:
        self.marks += 1
        self.log.append(f"mark {kind.value} {self.marks}")
        return FakeEvent(self, kind, self.marks)

    def after(self, kind: StreamKind, event: object) -> None:
        assert isinstance(event, FakeEvent)
        self.log.append(f"{kind.value} after {event.kind.value} {event.number}")
