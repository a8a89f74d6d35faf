"""The prototype's way: msgpack bytes over ZeroMQ REQ/REP on a unix socket."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

import msgpack
import torch
import zmq

from benchmarks.measure import Call
from benchmarks.peer import be_peer, peer, ready

Exchange = Callable[[Sequence[torch.Tensor], Sequence[int]], list[bytes]]
"""Tensors to the peer, and so many bytes for each of its answers back."""


@contextlib.contextmanager
def exchanges() -> Iterator[Exchange]:
    """A peer, and what sends tensors to it and takes its answers."""
    with tempfile.TemporaryDirectory() as folder, peer("contenders.msgpack_socket", f"ipc://{folder}/s"), zmq.Context() as context:
        socket = context.socket(zmq.REQ)
        socket.connect(f"ipc://{folder}/s")

        def exchange(tensors: Sequence[torch.Tensor], answers: Sequence[int]) -> list[bytes]:
            socket.send(msgpack.packb({"tensors": [tensor.numpy().tobytes() for tensor in tensors], "answer": list(answers)}))
            received: list[bytes] = msgpack.unpackb(socket.recv())["tensors"]
            return received

        yield exchange
        socket.send(msgpack.packb({}))
        socket.close()


@contextlib.contextmanager
def calls(nbytes: int) -> Iterator[Call]:
    """One tensor there and one back."""
    tensor = torch.ones(nbytes, dtype=torch.uint8)
    with exchanges() as exchange:
        yield Call(lambda: torch.frombuffer(bytearray(exchange([tensor], [nbytes])[0]), dtype=torch.uint8))


def serve(endpoint: str) -> None:
    """The peer, until an empty message comes."""
    torch.set_num_threads(1)
    socket = zmq.Context().socket(zmq.REP)
    socket.bind(endpoint)
    ready()
    answers: dict[int, torch.Tensor] = {}
    while True:
        request = msgpack.unpackb(socket.recv())
        if not request:
            return
        for data in request["tensors"]:
            torch.frombuffer(bytearray(data), dtype=torch.uint8)
        outputs = [answers.setdefault(size, torch.zeros(size, dtype=torch.uint8)) for size in request["answer"]]
        socket.send(msgpack.packb({"tensors": [output.numpy().tobytes() for output in outputs]}))


if __name__ == "__main__":
    be_peer(serve, *sys.argv[1:])
