"""A little world of processes under load: a broker, a worker, clients; one of them is to die.

All processes are forked from one that has imported everything, so that a case takes half a second. Every tensor is checked: an op's result is a
function of its random input, element by element. What clients see is told through a page of shared words, without a lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import random
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import shmbroker
from shmbroker.broker.broker import Broker
from shmbroker.control import endpoint
from shmbroker.errors import BrokerUnreachable, NoSuchService, ShmBrokerError, WorkerLost
from shmbroker.memory.hold import is_held
from shmbroker.memory.reaper import objects, reap
from shmbroker.models import ops
from shmbroker.trust.loops import product
from shmbroker.trust.quantization import IntegerWeight, quantize_weight
from tee_worker.trust.modes import Trust, TrustOptions
from tee_worker.trust.sealed import SealedChannel
from tee_worker.trust.session import TrustSession
from tee_worker.trust.supply import PadSupply
from tests.faults import points

PATIENCE = float(os.environ.get("FAULTS_PATIENCE", "1"))
"""How many times longer than on a machine of one's own anything may take: a test that runs beside other work asks whether, not how soon."""

SERVICE = "faults"
CALL_SECONDS = 5.0 * PATIENCE
"""Timeout of a call here; a caller that only learns by it of a peer's death has learnt too late."""

RESULT_HALF_WRITTEN = "amid result written"
"""The one point that lies in an op, and so here, not in the package."""

WORDS = ("calls", "errors", "lost", "wrong", "unexpected", "busy_since_ns", "slowest_ns")


class Board:
    """What one client tells: a row of words in memory shared with the observer."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, mmap.PAGESIZE)
        self._words = memoryview(self._map).cast("Q")

    def get(self, word: str) -> int:
        return self._words[WORDS.index(word)]

    def set(self, word: str, value: int) -> None:
        self._words[WORDS.index(word)] = value

    def add(self, word: str) -> None:
        self._words[WORDS.index(word)] += 1

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """The client waits for a peer."""
        begun = time.monotonic_ns()
        self.set("busy_since_ns", begun)
        try:
            yield
        finally:
            self.set("slowest_ns", max(self.get("slowest_ns"), time.monotonic_ns() - begun))
            self.set("busy_since_ns", 0)

    def busy_seconds(self) -> float:
        """For how long the client has waited by now, 0 when it does not."""
        since = self.get("busy_since_ns")
        return (time.monotonic_ns() - since) / 1e9 if since else 0.0

    def note(self, text: str) -> None:
        """A few words on what was not expected, for people."""
        data = text.encode()[:2000]
        self._map[2048 : 2048 + len(data) + 2] = struct.pack("<H", len(data)) + data

    @property
    def text(self) -> str:
        (size,) = struct.unpack_from("<H", self._map, 2048)
        return self._map[2050 : 2050 + size].decode("utf-8", "replace")


@dataclass
class Process:
    """A forked process of the world."""

    role: str
    pid: int
    board: Board
    status: int | None = None

    def ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = status
        return self.status is not None

    def kill(self, number: int = signal.SIGKILL) -> None:
        if not self.ended():
            os.kill(self.pid, number)

    def wait(self, seconds: float) -> bool:
        return wait_for(self.ended, seconds)


def _die_with_parent() -> None:
    """Whatever becomes of the observer, no process of a case outlives it."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for something that is not announced; whether it came."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.002)
    return True


def run_broker(instance: str) -> None:
    Broker(instance, until_exit=os.getppid()).serve()


def run_worker(instance: str, seed: int) -> None:
    worker = shmbroker.Worker(SERVICE, instance=instance, name=f"worker-{os.getpid()}", until_exit=os.getppid())

    @worker.op(out_spec=lambda x: shmbroker.TensorSpec(x.shape, x.dtype))
    def affine(x: torch.Tensor, *, out: torch.Tensor) -> None:
        half = len(out) // 2
        out[:half].copy_(x[:half]).mul_(3)
        points.reach(RESULT_HALF_WRITTEN)
        out[half:].copy_(x[half:]).mul_(3)
        out.add_(7)

    @worker.bound_op(ops.RING_LINEAR, out_spec=ops.ring_linear)
    def ring_linear(**static: Any) -> Callable[..., None]:
        def run(x: torch.Tensor, *, out: torch.Tensor) -> None:
            whole = torch.empty_like(out)
            product(x, _sealed_weight().integers, whole)
            half = out.shape[1] // 2
            out[:, :half].copy_(whole[:, :half])
            points.reach(RESULT_HALF_WRITTEN)
            out[:, half:].copy_(whole[:, half:])

        return run

    while True:
        try:
            return worker.serve()
        except BrokerUnreachable:
            time.sleep(0.05)  # as systemd does: started again until there is a broker


def run_client(instance: str, seed: int, board: Board, lane: str, doorbell: str) -> None:
    """Call without end, check every result, and start anew whenever something was lost."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    while True:
        try:
            with shmbroker.connect(
                instance, arena="1M", depth=4, channels=2, timeout=CALL_SECONDS, spin=choose.choice([0.0, 20e-6, 50e-6])
            ) as client:
                call = _call_sealed_for_a_while if os.environ.get("TRUST") == "blind" else _call_for_a_while
                call(client, choose, generator, board, lane, doorbell)
        except (BrokerUnreachable, NoSuchService):
            board.add("errors")
            time.sleep(0.01)  # what is gone is being started again
        except WorkerLost:
            board.add("lost")
        except ShmBrokerError as error:
            if not _is_news_of_a_death(error):
                board.add("unexpected")
                board.note("".join(traceback.format_exception(error)))
            board.add("errors")


def _is_news_of_a_death(error: ShmBrokerError) -> bool:
    """Errors that name a peer which is gone, or which went while something was asked of it."""
    text = str(error)
    return any(
        word in text
        for word in ("died", "left", "does not answer", "was reaped", "dead", "does not exist", "did not answer", "shutting down")
    )


def _call_for_a_while(
    client: shmbroker.Client, choose: random.Random, generator: torch.Generator, board: Board, lane: str, doorbell: str
) -> None:
    channel = client.channel(SERVICE, lane=lane, doorbell=doorbell, wait=0.5)
    affine = channel.bind("affine", out_spec=lambda x: x)
    for _ in range(choose.randrange(20, 60)):
        in_flight = []
        for _ in range(choose.randrange(1, 4)):
            x = torch.randint(-(1 << 40), 1 << 40, (choose.randrange(2, 2000),), generator=generator)
            inside = client.copy_in(x) if choose.random() < 0.7 else x
            with board.busy():
                in_flight.append((x, affine.submit(inside)))
        for x, future in in_flight:
            with board.busy():
                y = future.result()
            if not torch.equal(y, x * 3 + 7):
                board.add("wrong")
            board.add("calls")
        if choose.random() < 0.3:
            time.sleep(choose.random() * 0.001)  # so that the others fall asleep, and bells are rung


@functools.cache
def _sealed_weight() -> IntegerWeight:
    return quantize_weight(torch.randn(48, 96, generator=torch.Generator().manual_seed(0)), 12)


def _call_sealed_for_a_while(
    client: shmbroker.Client, choose: random.Random, generator: torch.Generator, board: Board, lane: str, doorbell: str
) -> None:
    """The same at trust ``blind``, as a sealed layer calls: with TRUST=blind in the environment."""
    weight = _sealed_weight()
    exact = weight.integers.double() * weight.scales.double()[:, None]
    channel = client.channel(SERVICE, lane=lane, doorbell=doorbell, wait=0.5)
    session = TrustSession(TrustOptions(mode=Trust.BLIND, pads=16), lambda: channel.worker_name, lambda: None, "here")
    layer = SealedChannel(channel, session).layer(["weight"], weight, [len(exact)], None, [{}])
    supply = PadSupply(session)
    try:
        for _ in range(choose.randrange(20, 60)):
            x = torch.randn(choose.randrange(1, 40), 96, generator=generator)
            with board.busy():
                y = layer(x)
            if float((y - x.double() @ exact.t()).abs().max()) > 1e-2:
                board.add("wrong")
            board.add("calls")
    finally:
        supply.stop()
        supply.join()


ClientProgram = Callable[[str, int, Board, str, str], None]


@dataclass
class World:
    """All processes of one case, and nothing left of them afterwards."""

    instance: str
    processes: list[Process] = field(default_factory=list)
    seed: int = 0
    programs: dict[str, ClientProgram] = field(default_factory=lambda: {"client": run_client})

    def start(self, role: str, lane: str = "shm", doorbell: str = "sem", fault: str = "", passes: int = 0) -> Process:
        """Fork a process; it dies at ``fault``."""
        self.seed += 1
        seed, board = self.seed, Board()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            try:
                _die_with_parent()
                torch.set_num_threads(1)
                if fault:
                    points.arm(fault, passes)
                if role == "broker":
                    run_broker(self.instance)
                elif role == "worker":
                    run_worker(self.instance, seed)
                else:
                    self.programs[role](self.instance, seed, board, lane, doorbell)
            except BaseException:
                board.add("unexpected")
                board.note(traceback.format_exc())
                os._exit(1)
            os._exit(0)
        process = Process(role, pid, board)
        self.processes.append(process)
        return process

    def unheld(self) -> set[str]:
        """What lies in shared memory and is held by no living process: what the dead left."""
        return {name.file for name in objects(self.instance) if not is_held(name.path)}

    def told(self) -> str:
        """What the clients have seen so far, for a message."""
        return "; ".join(
            f"client {one.pid}: " + ", ".join(f"{one.board.get(word)} {word}" for word in WORDS[:5]) + f" {one.board.text}"
            for one in self.processes
            if one.role in self.programs
        )

    def clients(self) -> list[Process]:
        """Those that live."""
        return [process for process in self.processes if process.role == "client" and not process.ended()]

    def close(self) -> None:
        for process in self.processes:
            process.kill(signal.SIGKILL if process.role in self.programs else signal.SIGTERM)
        for process in self.processes:
            if not process.wait(5.0):
                process.kill()
                process.wait(5.0)
        reap(self.instance)


@contextlib.contextmanager
def world(instance: str) -> Iterator[World]:
    """A world of its own, in a folder of its own."""
    made = World(instance)
    try:
        yield made
    finally:
        made.close()
        folder = endpoint.runtime_dir()
        for path in folder.glob(f"{instance}*"):
            path.unlink(missing_ok=True)
