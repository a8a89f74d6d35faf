"""Processes at the other end of a benchmark: ``python -m benchmarks.echo KIND ARGUMENT ...``. Each takes a tensor and gives one back, computing nothing.

A peer holds a torch tensor of what it was sent, and answers with a tensor of its own of the same size.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
from multiprocessing import connection, shared_memory
from typing import Any

import torch

from benchmarks.measure import PEER_CPU, pin

READY = "ready"


def ready() -> None:
    """Tell the starter that calls may come."""
    print(READY, flush=True)


def serve_shmbroker(spin: str) -> None:
    """A worker whose op does nothing: its output is a fresh block that it could have written."""
    import shmbroker
    from shmbroker import TensorSpec

    worker = shmbroker.Worker("echo", spin=float(spin))

    @worker.op(out_spec=lambda x: TensorSpec(x.shape, x.dtype))
    def echo(x: torch.Tensor, *, out: torch.Tensor) -> None:
        pass

    @worker.op(out_spec=lambda *inputs, shapes: [TensorSpec(shape, torch.float32) for shape in shapes])
    def replay(*inputs: torch.Tensor, out: Any, shapes: list[list[int]]) -> None:
        pass

    @worker.op(out_spec=lambda *inputs, shapes: [TensorSpec(shape, torch.float32) for shape in shapes])
    def copied(*inputs: torch.Tensor, out: Any, shapes: list[list[int]]) -> None:
        """The worker's own results lie elsewhere and are copied out."""
        for room in [out] if isinstance(out, torch.Tensor) else out:
            room.view(-1).copy_(ELSEWHERE[: room.numel()])

    @worker.op(out_spec=lambda *inputs, shapes, number: [*(TensorSpec(s, torch.float32) for s in shapes), TensorSpec((), torch.float64)])
    def touched(*inputs: torch.Tensor, out: Any, shapes: list[list[int]], number: int) -> None:
        """Reads every byte of every input and writes every byte of every output."""
        *rooms, checksum = out
        for room in rooms:
            room.fill_(number % 7)
        checksum.fill_(sum(checksum_of(x) for x in inputs))

    worker.serve(ready)


ELSEWHERE = torch.zeros(0)


def checksum_of(tensor: torch.Tensor) -> float:
    """A sum over all of a tensor's bytes as 32-bit integers, exact in a double for the sizes used here."""
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor.transpose(-1, -2).reshape(-1)
    return float(flat.view(torch.int32).sum(dtype=torch.int64))


def serve_msgpack(endpoint: str) -> None:
    """What the prototype did: msgpack bytes over ZeroMQ REQ/REP."""
    import msgpack
    import zmq

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


def serve_shared_memory(name: str, pipe: connection.Connection) -> None:
    """Two shared buffers and views made by hand; a Pipe to take turns. Started by ``multiprocessing``."""
    pin(PEER_CPU)
    block = shared_memory.SharedMemory(name)
    pipe.send(READY)
    while (size := pipe.recv()) is not None:
        torch.frombuffer(block.buf, dtype=torch.uint8, count=size)
        torch.frombuffer(block.buf, dtype=torch.uint8, count=size, offset=size)
        pipe.send(size)
    os._exit(0)  # the views outlive the block's own bookkeeping, which would complain


def serve_torch_queue(there: Any, back: Any) -> None:
    """``torch.multiprocessing`` queues. Started by ``torch.multiprocessing``."""
    pin(PEER_CPU)
    answers: dict[int, torch.Tensor] = {}
    back.put(READY)
    while (tensor := there.get()) is not None:
        size = tensor.numel()
        del tensor
        back.put(answers.setdefault(size, torch.zeros(size, dtype=torch.uint8)))


def serve_iceoryx2(service_name: str, size: str) -> None:
    """Request and response as slices of bytes in iceoryx2's own shared memory; busy-waiting."""
    import iceoryx2 as iox2

    iox2.set_log_level(iox2.LogLevel.Error)
    nbytes = int(size)
    node = iox2.NodeBuilder.new().create(iox2.ServiceType.Ipc)
    service = (
        node.service_builder(iox2.ServiceName.new(service_name))
        .request_response(iox2.Slice[ctypes.c_uint8], iox2.Slice[ctypes.c_uint8])
        .open_or_create()
    )
    server = service.server_builder().initial_max_slice_len(nbytes).create()
    ready()
    parent = os.getppid()
    turns = 0
    while True:
        request = server.receive()
        if request is None:
            turns += 1
            if turns % 1_000_000 == 0 and os.getppid() != parent:
                return
            continue
        payload = request.payload()
        torch.frombuffer((ctypes.c_uint8 * payload.len()).from_address(payload.as_ptr()), dtype=torch.uint8)
        response = request.loan_slice_uninit(payload.len())
        room = response.payload()
        torch.frombuffer((ctypes.c_uint8 * room.len()).from_address(room.as_ptr()), dtype=torch.uint8)
        response.assume_init().send()


def serve_spin(path: str) -> None:
    """The floor: one word in shared memory each way, both spin."""
    with open(path, "r+b") as file:
        words = memoryview(mmap.mmap(file.fileno(), 4096)).cast("Q")
    ready()
    expected = 1
    while True:
        while words[0] != expected:
            if words[1]:
                return
        words[8] = expected
        expected += 1


def serve_semaphore(there: str, back: str) -> None:
    """The floor of blocking: one semaphore each way."""
    import posix_ipc

    mine, other = posix_ipc.Semaphore(there), posix_ipc.Semaphore(back)
    ready()
    while True:
        mine.acquire()
        other.release()


def serve_eventfd(there: str, back: str) -> None:
    """The floor of blocking with file descriptors."""
    mine, other = int(there), int(back)
    ready()
    while True:
        os.eventfd_read(mine)
        os.eventfd_write(other, 1)


KINDS = {
    "shmbroker": serve_shmbroker,
    "msgpack": serve_msgpack,
    "iceoryx2": serve_iceoryx2,
    "spin": serve_spin,
    "semaphore": serve_semaphore,
    "eventfd": serve_eventfd,
}


def main() -> None:
    """Run one peer. Options after the arguments, as JSON: ``threads``, ``elsewhere`` (elements to hold)."""
    kind, *arguments = sys.argv[1:]
    options = json.loads(os.environ.get("BENCHMARK_PEER", "{}"))
    torch.set_num_threads(options.get("threads", 1))
    pin(PEER_CPU)
    global ELSEWHERE
    ELSEWHERE = torch.ones(options.get("elsewhere", 0))
    KINDS[kind](*arguments)  # type: ignore[operator]


if __name__ == "__main__":
    main()
