"""Full and small: memory too small at the start or filled up later, quotas, too many clients, full queues, a slow worker. Nothing is lost."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import shmbroker
from shmbroker import TensorSpec
from shmbroker.broker.limits import Limits
from shmbroker.control.status import ask
from shmbroker.memory import names
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.reaper import objects
from tests.conftest import InChild, StartChild
from tests.namespaces import enter_small_shm, possible
from tests.peers import LANES
from tests.processes import broker_process, freeze, run, submissions_taken, wait_until

MIB = 1 << 20
DEPTH = 4
SEGMENT_BYTES = Geometry(MIB, channel_count=4, depth=DEPTH).total_bytes

small_shm = pytest.mark.skipif(not possible(enter_small_shm, MIB), reason="mounting a small /dev/shm in a namespace needs root")


def same(x: TensorSpec) -> TensorSpec:
    return x


def small_client() -> shmbroker.Client:
    """With a segment of SEGMENT_BYTES, of which 1 MiB is arena."""
    return shmbroker.connect(arena=MIB, channels=4, depth=DEPTH)


def serve_doubling() -> None:
    torch.set_num_threads(1)  # a forked child has its parent's compute threads by name only
    worker = shmbroker.Worker("doubling")

    @worker.op(out_spec=same)
    def double(x: torch.Tensor, *, out: torch.Tensor) -> None:
        torch.mul(x, 2, out=out)

    worker.serve()


@contextlib.contextmanager
def doubling_worker() -> Iterator[None]:
    """Forked: all that it imports is here already."""
    worker = multiprocessing.get_context("fork").Process(target=serve_doubling)
    worker.start()
    try:
        wait_until(lambda: bool(ask(None).peers))
        yield
    finally:
        worker.terminate()
        worker.join()
        assert worker.exitcode == 0


# --- /dev/shm ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_small_shm(in_child: InChild) -> Callable[[int, Callable[[], None]], None]:
    """Runs ``work()`` in a child with a /dev/shm of its own of so many bytes, and a broker there."""

    def run(nbytes: int, work: Callable[[], None]) -> None:
        def there() -> None:
            enter_small_shm(nbytes)
            with shmbroker.local_broker() as broker:
                work()
                assert not list(objects(broker.instance))

        in_child(there)

    return run


InSmallShm = Callable[[int, Callable[[], None]], None]


def free_bytes() -> int:
    space = os.statvfs(names.SHM_DIR)
    return space.f_bavail * space.f_frsize


@contextlib.contextmanager
def shm_filled_up() -> Iterator[None]:
    """Somebody else's file takes every page that is left."""
    path = Path(names.SHM_DIR, "somebody-elses")
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free_bytes())
    try:
        assert free_bytes() == 0
        yield
    finally:
        path.unlink()


@small_shm
def test_memory_too_small_for_a_client_is_told_and_a_smaller_one_runs(in_small_shm: InSmallShm) -> None:
    total = 4 * MIB

    def work() -> None:
        with doubling_worker():
            needed = Geometry(8 * MIB, channel_count=4, depth=DEPTH).total_bytes
            told = (
                rf"/dev/shm is too small: a segment of {needed} bytes was asked for, {free_bytes()} of {total} bytes are free; .*--shm-size"
            )
            with pytest.raises(shmbroker.SharedMemoryFull, match=told):
                shmbroker.connect(arena=8 * MIB, channels=4, depth=DEPTH)
            assert [name.kind for name in objects()] == ["bell"], "the worker's: of the client nothing is left"
            with small_client() as client:
                assert client.channel("doubling").bind("double")(torch.ones(3)).tolist() == [2.0] * 3

    in_small_shm(total, work)


@small_shm
def test_memory_that_fills_up_later_harms_nobody_who_is_there_already(in_small_shm: InSmallShm) -> None:
    """Every page was reserved when the segment was made: none is missing, and none is a SIGBUS."""

    def work() -> None:
        with doubling_worker(), small_client() as client:
            with shm_filled_up():
                for lane, doorbell in LANES:
                    channel = client.channel("doubling", lane=lane, doorbell=doorbell)
                    double = channel.bind("double")
                    for number in range(64):  # more than once round the arena
                        x = client.empty((10_000,)).fill_(number)
                        assert torch.equal(double(x), torch.full((10_000,), 2.0 * number))
                    channel.close()
                del x
                whole = client.empty((MIB,), torch.uint8).fill_(7)
                assert int(whole.sum()) == 7 * MIB
                del whole
                with pytest.raises(
                    shmbroker.SharedMemoryFull, match=rf"{SEGMENT_BYTES} bytes was asked for, 0 of {8 * MIB} bytes are free"
                ):
                    small_client()
                with pytest.raises(shmbroker.SharedMemoryFull, match=r"/dev/shm is full: .* doorbell .* 0 of \d+ bytes are free"):
                    shmbroker.Worker("late").serve()
                assert client.channel("doubling").bind("double")(torch.ones(1)).item() == 2.0
            with small_client() as late:
                assert late.channel("doubling").bind("double")(torch.ones(1)).item() == 2.0

    in_small_shm(8 * MIB, work)


# --- quotas -----------------------------------------------------------------------------------------------------------------------------


def test_a_process_gets_no_more_than_its_quota_in_all_and_gets_it_back(instance: str, in_child: InChild, tmp_path: Path) -> None:
    quota = 2 * SEGMENT_BYTES
    environment = {"SHMBROKER_RUNTIME_DIR": str(tmp_path), "SHMBROKER_CONTROL": "ipc", "SHMBROKER_INSTANCE": instance}
    with pytest.MonkeyPatch.context() as change:
        for name, value in environment.items():
            change.setenv(name, value)
        with contextlib.ExitStack() as clients:
            with broker_process(instance, "--max-bytes", str(quota)) as broker:
                told = rf"a segment of \d+ bytes was asked for by process {os.getpid()}, which has 0 bytes already; the quota .* {quota} bytes.*--max-bytes"
                with pytest.raises(shmbroker.QuotaExceeded, match=told):
                    shmbroker.connect(arena=quota)
                first = clients.enter_context(small_client())
                clients.enter_context(small_client())
                with pytest.raises(shmbroker.SharedMemoryFull, match=f"which has {quota} bytes already"):
                    small_client()
                in_child(lambda: small_client().close())  # another process, another quota
                first.close()
                clients.enter_context(small_client())
                broker.kill()
                broker.wait()
            with broker_process(instance, "--max-bytes", str(quota)):
                wait_until(lambda: len(ask(None).peers) == 2, 10.0)
                with pytest.raises(shmbroker.QuotaExceeded):
                    small_client()


def test_more_clients_than_the_broker_takes_are_refused_until_one_goes(instance: str, start_child: StartChild, tmp_path: Path) -> None:
    environment = {"SHMBROKER_RUNTIME_DIR": str(tmp_path), "SHMBROKER_CONTROL": "ipc", "SHMBROKER_INSTANCE": instance}
    with pytest.MonkeyPatch.context() as change:
        for name, value in environment.items():
            change.setenv(name, value)

        def sit() -> None:
            client = small_client()
            signal.pause()
            client.close()

        with broker_process(instance, "--max-clients", "2"), small_client():
            other = start_child(sit)
            wait_until(lambda: len(ask(None).peers) == 2, 10.0)
            with pytest.raises(shmbroker.TooManyClients, match=r"2 clients have a segment, as many as this broker takes: .*--max-clients"):
                small_client()
            other.kill()
            other.join()
            small_client().close()  # at once: what the dead left is reaped before anybody is refused


def test_limits_count_what_would_be_had() -> None:
    limits = Limits(max_bytes=100, max_clients=3)
    limits.check(1, asked=40, had=60, clients=2)
    with pytest.raises(shmbroker.QuotaExceeded):
        limits.check(1, asked=41, had=60, clients=2)
    with pytest.raises(shmbroker.TooManyClients):
        limits.check(1, asked=1, had=0, clients=3)
    Limits().check(1, asked=1 << 50, had=1 << 50, clients=0)


@pytest.mark.parametrize(("option", "told"), [("--max-bytes=much", "size 'much' cannot be read"), ("--max-clients=0", "--max-clients")])
def test_limits_that_cannot_be_read_are_told(option: str, told: str) -> None:
    done = run(sys.executable, "-m", "shmbroker", "serve", option)
    assert done.returncode != 0
    assert told in done.stderr
    assert "Traceback" not in done.stderr


# --- queues and arena -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lane", "doorbell"), LANES)
def test_a_full_queue_of_a_worker_that_does_not_run_times_out_and_nothing_submitted_is_lost(
    broker: shmbroker.LocalBroker, worker: int, lane: str, doorbell: str
) -> None:
    with small_client() as client:
        op = client.channel("test", lane=lane, doorbell=doorbell).bind("contiguous", out_spec=same)
        op(torch.zeros(1))
        freeze(worker)
        try:
            futures = [op.submit(torch.tensor([number])) for number in range(DEPTH)]
            with pytest.raises(shmbroker.CallTimeout, match=f"{DEPTH} calls are outstanding with worker 'test-worker'.*none was completed"):
                op.submit(torch.zeros(1), timeout=0.2)
            with pytest.raises(shmbroker.CallTimeout):
                op(torch.zeros(1), timeout=0.2)
        finally:
            os.kill(worker, signal.SIGCONT)
        assert [future.result().item() for future in futures] == list(range(DEPTH))
        assert op(torch.tensor([9])).item() == 9


def test_who_submits_to_a_full_queue_waits_and_goes_on_when_the_worker_does(broker: shmbroker.LocalBroker, worker: int) -> None:
    with small_client() as client:
        channel = client.channel("test")
        op = channel.bind("contiguous", out_spec=same)
        op(torch.zeros(1))
        results: list[float] = []

        def submit() -> None:
            futures = [op.submit(torch.tensor([number])) for number in range(10 * DEPTH)]
            results.extend(future.result().item() for future in futures)

        freeze(worker)
        try:
            submitting = threading.Thread(target=submit)
            submitting.start()
            wait_until(lambda: channel.outstanding == DEPTH, 10.0)
            assert submissions_taken(channel) <= 1 + DEPTH
        finally:
            os.kill(worker, signal.SIGCONT)
        submitting.join()
        assert results == list(range(10 * DEPTH))


@pytest.mark.parametrize(("lane", "doorbell"), LANES)
def test_a_call_that_finds_the_arena_full_of_held_tensors_waits_for_one_to_be_let_go(
    broker: shmbroker.LocalBroker, worker: int, lane: str, doorbell: str
) -> None:
    with shmbroker.connect(arena=MIB, channels=4, depth=DEPTH, place_timeout=30.0) as client:
        op = client.channel("test", lane=lane, doorbell=doorbell).bind("contiguous", out_spec=same)
        held = [client.empty((MIB // 4,), torch.uint8).fill_(number) for number in range(4)]
        results: list[torch.Tensor] = []
        calling = threading.Thread(target=lambda: results.append(op(torch.full((1000,), 5.0))))
        calling.start()
        calling.join(0.1)
        assert calling.is_alive(), "there is no room yet"
        del held[2]
        calling.join()
        assert torch.equal(results[0], torch.full((1000,), 5.0))
        assert [int(tensor[0]) for tensor in held] == [0, 1, 3]
        assert [int(tensor[-1]) for tensor in held] == [0, 1, 3]


def test_a_worker_slower_than_its_clients_answers_each_of_them_all_and_rightly(
    broker: shmbroker.LocalBroker, worker: int, start_child: StartChild
) -> None:
    def keep_submitting(seed: int, lane: str, doorbell: str) -> None:
        generator = torch.Generator().manual_seed(seed)
        with small_client() as client:
            slow = client.channel("test", lane=lane, doorbell=doorbell).bind("sleep", seconds=0.002)
            inputs = [torch.randint(0, 1 << 60, (number * 37 % 3000 + 1,), generator=generator) for number in range(50)]
            futures = [slow.submit(x) for x in inputs]  # as fast as the queue takes them
            for x, future in zip(inputs, futures, strict=True):
                assert torch.equal(future.result(), x)

    children = [start_child(keep_submitting, seed, *LANES[seed % len(LANES)]) for seed in range(6)]
    for child in children:
        child.join(60.0)
        assert child.exitcode == 0
