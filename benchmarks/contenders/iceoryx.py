"""The request and response of iceoryx2, slices of bytes loaned in its own shared memory; both sides busy-wait."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import iceoryx2 as iox2
import torch

from benchmarks.measure import Call
from benchmarks.peer import be_peer, peer, ready
from shmbroker.memory.names import new_id

TURNS_BETWEEN_LOOKS = 1_000_000
"""After so many turns in vain the peer looks whether who started it still lives."""


@contextlib.contextmanager
def calls(nbytes: int) -> Iterator[Call]:
    """One slice there and one back."""
    name = f"shmbroker-benchmark-{new_id()}"
    with peer("contenders.iceoryx", name, str(nbytes)) as process:
        client = _service(name).client_builder().initial_max_slice_len(nbytes).create()
        array = ctypes.c_uint8 * nbytes

        def call() -> torch.Tensor:
            request = client.loan_slice_uninit(nbytes)
            torch.frombuffer(array.from_address(request.payload().as_ptr()), dtype=torch.uint8)
            pending = request.assume_init().send()
            response = pending.receive()
            while response is None:
                response = pending.receive()
            return torch.frombuffer(array.from_address(response.payload().as_ptr()), dtype=torch.uint8)

        yield Call(call, process.pid)
        os.kill(process.pid, signal.SIGCONT)


def _service(name: str) -> Any:
    iox2.set_log_level(iox2.LogLevel.Error)
    node = iox2.NodeBuilder.new().create(iox2.ServiceType.Ipc)
    return (
        node.service_builder(iox2.ServiceName.new(name))
        .request_response(iox2.Slice[ctypes.c_uint8], iox2.Slice[ctypes.c_uint8])
        .open_or_create()
    )


def serve(name: str, nbytes: str) -> None:
    """The peer, until who started it is gone."""
    torch.set_num_threads(1)
    server = _service(name).server_builder().initial_max_slice_len(int(nbytes)).create()
    ready()
    parent = os.getppid()
    turns = 0
    while True:
        request = server.receive()
        if request is None:
            turns += 1
            if turns % TURNS_BETWEEN_LOOKS == 0 and os.getppid() != parent:
                return
            continue
        payload = request.payload()
        torch.frombuffer((ctypes.c_uint8 * payload.len()).from_address(payload.as_ptr()), dtype=torch.uint8)
        response = request.loan_slice_uninit(payload.len())
        room = response.payload()
        torch.frombuffer((ctypes.c_uint8 * room.len()).from_address(room.as_ptr()), dtype=torch.uint8)
        response.assume_init().send()


if __name__ == "__main__":
    be_peer(serve, *sys.argv[1:])
