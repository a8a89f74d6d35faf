"""Ways to hand a tensor to another process and get one back. Each starts its own peer and stops it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing import shared_memory
from pathlib import Path

import torch

import shmbroker
from benchmarks import echo
from benchmarks.measure import size_text
from shmbroker.client.local_broker import stop_process
from shmbroker.memory.names import new_id


class Call:
    """One round trip. ``busy`` is the pid of a peer that spins without end, to be stopped while others are measured."""

    def __init__(self, call: Callable[[], object], busy: int = 0) -> None:
        self._call = call
        self.busy = busy

    def __call__(self) -> object:
        """Do it."""
        return self._call()


ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def peer(kind: str, *arguments: str, pass_fds: tuple[int, ...] = (), **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """A peer process of :mod:`benchmarks.echo`, ready."""
    environment = {**os.environ, "BENCHMARK_PEER": json.dumps(options), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.echo", kind, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, env=environment, pass_fds=pass_fds)
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != echo.READY.encode():
            raise RuntimeError(f"the peer of {kind} did not start; its own words are above")
        yield process
    finally:
        if process.stdin is not None:
            process.stdin.close()
        stop_process(process)


@contextlib.contextmanager
def shmbroker_calls(nbytes: int, lane: str = "shm", doorbell: str = "auto", spin: float = 50e-6) -> Iterator[dict[str, Call]]:
    """Ours: ``call`` (input in the arena, fresh output), ``replay`` (captured), ``copied in`` (input outside the arena)."""
    with shmbroker.local_broker(), peer("shmbroker", str(spin)), shmbroker.connect(arena=8 * nbytes + (64 << 20), spin=spin) as client:
        channel = client.channel("echo", lane=lane, doorbell=doorbell)
        op = channel.bind("echo", out_spec=lambda x: x)
        inside = client.empty((nbytes,), torch.uint8).fill_(1)
        outside = torch.ones(nbytes, dtype=torch.uint8)
        captured = op.capture(inside)
        yield {"call": Call(lambda: op(inside)), "replay": Call(captured.replay), "copied in": Call(lambda: op(outside))}


@contextlib.contextmanager
def msgpack_calls(nbytes: int) -> Iterator[Call]:
    """The prototype's way: msgpack bytes over ZeroMQ REQ/REP on a unix socket."""
    import msgpack
    import zmq

    with tempfile.TemporaryDirectory() as folder, peer("msgpack", f"ipc://{folder}/s"), zmq.Context() as context:
        socket = context.socket(zmq.REQ)
        socket.connect(f"ipc://{folder}/s")
        tensor = torch.ones(nbytes, dtype=torch.uint8)

        def call() -> torch.Tensor:
            socket.send(msgpack.packb({"tensors": [tensor.numpy().tobytes()], "answer": [nbytes]}))
            return torch.frombuffer(bytearray(msgpack.unpackb(socket.recv())["tensors"][0]), dtype=torch.uint8)

        yield Call(call)
        socket.send(msgpack.packb({}))
        socket.close()


@contextlib.contextmanager
def torch_queue_calls(nbytes: int) -> Iterator[dict[str, Call]]:
    """``torch.multiprocessing`` queues, with a new tensor each time and with the same one."""
    context = torch.multiprocessing.get_context("spawn")
    there, back = context.SimpleQueue(), context.SimpleQueue()
    process = context.Process(target=echo.serve_torch_queue, args=(there, back), daemon=True)
    process.start()
    try:
        while back.empty():
            process.join(0.01)
            if not process.is_alive():
                raise RuntimeError("the peer of torch.multiprocessing did not start; its own words are above")
        back.get()
        same = torch.ones(nbytes, dtype=torch.uint8).share_memory_()

        def new() -> torch.Tensor:
            there.put(torch.ones(nbytes, dtype=torch.uint8))
            answer: torch.Tensor = back.get()
            return answer

        def reused() -> torch.Tensor:
            there.put(same)
            answer: torch.Tensor = back.get()
            return answer

        yield {"new": Call(new), "reused": Call(reused)}
    finally:
        there.put(None)
        process.join(5)
        process.kill()


@contextlib.contextmanager
def shared_memory_calls(nbytes: int) -> Iterator[Call]:
    """``multiprocessing.shared_memory`` with views made by hand, and a Pipe to take turns."""
    context = multiprocessing.get_context("spawn")
    block = shared_memory.SharedMemory(create=True, size=2 * nbytes)
    pipe, other = context.Pipe()
    process = context.Process(target=echo.serve_shared_memory, args=(block.name, other), daemon=True)
    process.start()
    try:
        pipe.recv()

        def call() -> tuple[torch.Tensor, torch.Tensor]:
            sent = torch.frombuffer(block.buf, dtype=torch.uint8, count=nbytes)
            pipe.send(nbytes)
            pipe.recv()
            return sent, torch.frombuffer(block.buf, dtype=torch.uint8, count=nbytes, offset=nbytes)

        yield Call(call)
    finally:
        pipe.send(None)
        process.join(5)
        process.kill()
        block.close()
        block.unlink()


@contextlib.contextmanager
def iceoryx2_calls(nbytes: int) -> Iterator[Call]:
    """iceoryx2's request and response, both loaned in its shared memory; both sides busy-wait."""
    import iceoryx2 as iox2

    iox2.set_log_level(iox2.LogLevel.Error)
    name = f"shmbroker-benchmark-{new_id()}"
    with peer("iceoryx2", name, str(nbytes)) as process:
        node = iox2.NodeBuilder.new().create(iox2.ServiceType.Ipc)
        service = (
            node.service_builder(iox2.ServiceName.new(name))
            .request_response(iox2.Slice[ctypes.c_uint8], iox2.Slice[ctypes.c_uint8])
            .open_or_create()
        )
        client = service.client_builder().initial_max_slice_len(nbytes).create()
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


@contextlib.contextmanager
def ray_calls(nbytes: int) -> Iterator[Call]:
    """``ray.put`` and an actor's method."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")

    @ray.remote
    class Echo:
        """Answers with a tensor of its own."""

        def echo(self, tensor: torch.Tensor) -> torch.Tensor:
            """Of the same size."""
            return torch.zeros_like(tensor)

    try:
        actor = Echo.remote()  # type: ignore[attr-defined]
        tensor = torch.ones(nbytes, dtype=torch.uint8)
        yield Call(lambda: ray.get(actor.echo.remote(ray.put(tensor))))
    finally:
        ray.shutdown()


@contextlib.contextmanager
def spin_calls() -> Iterator[Call]:
    """The floor: two Python processes, one word each way, both spin."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.truncate(4096)
        words = memoryview(mmap.mmap(file.fileno(), 4096)).cast("Q")
        with peer("spin", file.name) as process:
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


@contextlib.contextmanager
def semaphore_calls() -> Iterator[Call]:
    """The floor of blocking: a POSIX semaphore each way."""
    import posix_ipc

    names = [f"/shmbroker-benchmark.{new_id()}" for _ in range(2)]
    there, back = (posix_ipc.Semaphore(name, posix_ipc.O_CREX) for name in names)
    try:
        with peer("semaphore", *names):

            def call() -> None:
                there.release()
                back.acquire()

            yield Call(call)
    finally:
        there.unlink()
        back.unlink()


@contextlib.contextmanager
def eventfd_calls() -> Iterator[Call]:
    """The floor of blocking with file descriptors."""
    there, back = os.eventfd(0), os.eventfd(0)
    try:
        with peer("eventfd", str(there), str(back), pass_fds=(there, back)):

            def call() -> None:
                os.eventfd_write(there, 1)
                os.eventfd_read(back)

            yield Call(call)
    finally:
        os.close(there)
        os.close(back)


def missing(package: str) -> str | None:
    """Why a contender is left out, if it is."""
    try:
        __import__(package)
    except ImportError:
        return f"{package} is not installed (pip install 'shmbroker[bench]')" if package != "ray" else "ray is not installed"
    return None


def describe(nbytes: int) -> str:
    """For headings."""
    return f"{size_text(nbytes)} to a peer and {size_text(nbytes)} back"
