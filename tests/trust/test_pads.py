"""Pads: each once, in memory that no child, core dump or disk has, and never without."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import shmbroker
from shmbroker import BadInput, PadsLost
from shmbroker.trust import pads as pads_module
from shmbroker.trust import private
from shmbroker.trust.loops import product
from shmbroker.trust.pads import Alive, Pad, Pads, fill_random
from shmbroker.trust.private import PrivateMemory
from tee_worker.trust.modes import Trust, TrustOptions
from tests.threads import STUCK_SECONDS
from tests.trust.conftest import BLIND, generate, logits, sealed, whole_model, worker

COLUMNS, OUTPUTS = 24, 10


@pytest.fixture
def weight() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randint(-2047, 2048, (OUTPUTS, COLUMNS), dtype=torch.int16)


@pytest.fixture
def pads(weight: torch.Tensor) -> Pads:
    return pads_of(weight)


def pads_of(weight: torch.Tensor) -> Pads:
    return Pads(Alive(), COLUMNS, OUTPUTS, lambda masks, products: product(masks, weight, products), 16, 4)


def flags_of(address: int) -> str:
    """The kernel's flags of the mapping at an address (proc(5), VmFlags)."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        span = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if span:
            found = int(span[1], 16) <= address < int(span[2], 16)
        elif found and line.startswith("VmFlags:"):
            return line
    raise AssertionError("not mapped")


def test_private_memory_is_kept_from_children_and_core_dumps() -> None:
    """P1, P2: wf, wipe on fork; dd, do not dump."""
    memory = PrivateMemory(100)
    flags = flags_of(memory.bytes.data_ptr())
    assert " wf" in flags
    assert " dd" in flags


def test_private_memory_is_locked_or_there_is_no_swap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """P3."""
    memory = PrivateMemory(1 << 16)
    assert " lo" in flags_of(memory.bytes.data_ptr()) or not private.swap_in_use()
    swaps = tmp_path / "swaps"
    swaps.write_text("Filename Type Size Used Priority\n/swapfile file 1 0 -2\n")
    monkeypatch.setattr(private, "SWAPS", swaps)
    monkeypatch.setattr(private, "lock_pages", lambda *args: False)
    with pytest.raises(BadInput, match=r"cannot be locked .* raise the limit \(ulimit -l unlimited"):
        PrivateMemory(100)
    swaps.write_text("Filename Type Size Used Priority\n")
    PrivateMemory(100)


def test_a_pad_is_right_and_handed_out_once(pads: Pads, weight: torch.Tensor) -> None:
    """P4."""
    for _ in range(3):
        pads.make_ahead()
    seen: list[torch.Tensor] = []
    serials: list[int] = []
    for rows in (1, 3, 5, 2, 9):
        taken = pads.take(rows)
        assert sum(pad.rows for pad in taken) == rows
        for pad in taken:
            expected = torch.empty(pad.rows, OUTPUTS, dtype=torch.int32)
            product(pad.masks.clone(), weight, expected)
            assert torch.equal(pad.products, expected)
            seen.extend(pad.masks.clone())
            serials.extend(range(pad.serial, pad.serial + pad.rows))
            pad.release()
    assert len({tuple(row.tolist()) for row in seen}) == 20
    assert serials == list(range(20))
    assert (pads.taken, pads.waited) == (20, 8), "12 were made ahead"


def test_a_released_pad_is_wiped_and_so_is_one_that_was_dropped(pads: Pads) -> None:
    """P5."""
    pads.make_ahead()
    (pad,) = pads.take(2)
    masks, products = pad.masks, pad.products
    assert masks.any()
    pad.release()
    assert not masks.any()
    assert not products.any()
    pads.make_ahead()
    ready = [batch.masks for batch in pads.ready]
    pads.close()
    assert all(not masks.any() for masks in ready)


def test_a_pad_that_was_handed_out_outlives_the_end_of_its_pool(pads: Pads) -> None:
    """P4: whoever has it goes on to mask with it, though another thread has found a lie meanwhile; a row under zeros would be seen."""
    pads.make_ahead()
    (pad,) = pads.take(2)
    ready = pads.ready[0].masks
    pads.close()
    assert pad.masks.any(dim=1).all()
    assert pad.products.any(dim=1).all()
    assert not ready[2:].any()
    pad.release()
    assert not ready.any()


def test_a_pad_is_used_once_whoever_asks(pads: Pads) -> None:
    """P4."""
    (pad,) = pads.take(1)
    pad.use()
    with pytest.raises(PadsLost, match="a second time"):
        pad.use()
    assert pads.reused == 1


def test_an_empty_pool_makes_pads_while_its_caller_waits(pads: Pads) -> None:
    """P7."""
    (pad,) = pads.take(7)
    assert pad.masks.any()
    assert pads.waited == 7


def test_a_product_that_fails_hands_nothing_out(weight: torch.Tensor) -> None:
    """P7: the caller is told, and the pads that it had are wiped."""
    calls = iter([True, False])

    def sometimes(masks: torch.Tensor, products: torch.Tensor) -> None:
        if not next(calls):
            raise RuntimeError("no second worker")
        product(masks, weight, products)

    pads = Pads(Alive(), COLUMNS, OUTPUTS, sometimes, 4, 4)
    pads.make_ahead()
    ready = pads.ready[0].masks
    with pytest.raises(RuntimeError, match="no second worker"):
        pads.take(6)
    assert not ready.any()


def test_eight_threads_never_get_the_same_pad(pads: Pads) -> None:
    """P4."""
    seen: list[tuple[int, ...]] = []
    serials: list[int] = []
    lock = threading.Lock()

    def take() -> None:
        for turn in range(40):
            for pad in pads.take(1 + turn % 3):
                with lock:
                    seen.extend(tuple(row) for row in pad.masks.tolist())
                    serials.extend(range(pad.serial, pad.serial + pad.rows))
                pad.release()
            if turn % 4 == 0:
                pads.make_ahead()

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen)) == len(seen)
    assert sorted(serials) == list(range(len(seen)))


def in_a_fork(work: Callable[[], bool]) -> bool:
    """Whether ``work`` is true in a child made by ``fork``."""
    pid = os.fork()
    if pid == 0:
        os._exit(0 if _true(work) else 1)
    return _ended_well(pid)


def in_a_clone(work: Callable[[], bool]) -> bool:
    """Whether it is in one made by the system call alone, of which no library knows.

    For a process with one thread: the child would wait for ever for another to take the interpreter's lock.
    """
    number = {"x86_64": 56, "aarch64": 220}[platform.machine()]
    assert threading.active_count() == 1
    pid = ctypes.PyDLL(None).syscall(number, signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0 if _true(work) else 1)
    return _ended_well(pid)


def _ended_well(pid: int) -> bool:
    """Whether a child ends with status 0; one that is stuck is killed."""
    until = time.monotonic() + STUCK_SECONDS
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError("the child is stuck")
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(ended[1]) == 0


def _true(work: Callable[[], bool]) -> bool:
    torch.set_num_threads(1)  # a forked child has its parent's compute threads by name only
    try:
        return work()
    except BaseException:
        traceback.print_exc()
        return False


def lost(action: Callable[[], object]) -> bool:
    try:
        action()
    except PadsLost:
        return True
    return False


@pytest.mark.parametrize("born", [in_a_fork, in_a_clone])
def test_a_child_finds_no_pad_and_makes_none(weight: torch.Tensor, born: Callable[[Callable[[], bool]], bool]) -> None:
    """P1, P6."""

    def none_in_a_child() -> bool:
        pads = pads_of(weight)
        pads.make_ahead()
        held = pads.take(1)[0]
        assert born(lambda: lost(lambda: pads.take(1)))
        assert born(lambda: lost(pads.make_ahead))
        assert born(lambda: not pads.ready[0].masks.any().item() and not held.masks.any().item() and not held.products.any().item())
        assert held.masks.any(), "here it is as it was"
        return bool(pads.take(1)[0].masks.any())

    assert in_a_fork(none_in_a_child), "by a process that has one thread"


def test_a_closed_session_has_no_pads(client: shmbroker.Client, tiny: Path, workers: tuple[str, str]) -> None:
    """P6."""
    model = whole_model(tiny)
    with sealed(model, client.channel(workers[0]), BLIND):
        logits(model)
    with pytest.raises(PadsLost, match="open one here"):
        logits(model)


def test_a_fork_of_a_process_with_a_blind_model_sends_nothing(client: shmbroker.Client, tiny: Path, workers: tuple[str, str]) -> None:
    """P6, T1."""
    model = whole_model(tiny)
    channel = client.channel(workers[0])
    with sealed(model, channel, BLIND):
        logits(model)
        calls = channel.report().total.calls
        assert in_a_fork(lambda: lost(lambda: logits(model)))
        assert channel.report().total.calls == calls
        logits(model)


def test_every_batch_has_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """P8."""
    keys: list[bytes] = []
    held: list[memoryview] = []
    keystream = pads_module.keystream

    def noting(key: memoryview, nonce: bytes, counter: int, out: torch.Tensor) -> None:
        keys.append(bytes(key))
        held.append(key)
        keystream(key, nonce, counter, out)

    monkeypatch.setattr(pads_module, "keystream", noting)
    for _ in range(3):
        fill_random(torch.empty(100, dtype=torch.int32))
    assert len(set(keys)) == 3
    assert all(len(key) == 32 and any(key) for key in keys)
    assert not any(any(bytes(key)) for key in held), "wiped"


def test_without_files_to_open_pads_are_made_all_the_same(pads: Pads) -> None:
    """P8: a process at its limit of open files goes on."""

    def at_the_limit() -> bool:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        fill_random(torch.empty(100, dtype=torch.int32))
        return True

    assert in_a_fork(at_the_limit)


def test_no_memory_for_pads_is_one_line() -> None:
    def without_memory() -> bool:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 32, 1 << 32))
        try:
            PrivateMemory(1 << 40)
        except BadInput as error:
            return "make fewer ahead (--pads)" in str(error)
        return False

    assert in_a_fork(without_memory)


def test_pads_are_uniform() -> None:
    """Of 4 million bytes, each value comes as often as chance has it: chi square with 255 degrees of freedom, one in 10^6 beyond 375."""
    words = torch.empty(1 << 20, dtype=torch.int32)
    fill_random(words)
    counts = torch.bincount(words.view(torch.uint8).to(torch.int64), minlength=256).double()
    expected = counts.sum() / 256
    assert float(((counts - expected) ** 2 / expected).sum()) < 375


def watched_pads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """All that is handed out from now on."""
    seen: list[tuple[int, ...]] = []
    take = Pads.take

    def noting(self: Pads, rows: int) -> list[Pad]:
        found = take(self, rows)
        for pad in found:
            seen.extend(tuple(row) for row in pad.masks.tolist())
        return found

    monkeypatch.setattr(Pads, "take", noting)
    return seen


def test_no_pad_twice_when_another_worker_takes_over(
    client: shmbroker.Client, tiny: Path, broker: shmbroker.LocalBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P4: what is sent again is sent as it was."""
    seen = watched_pads(monkeypatch)
    expected = generate(whole_model(tiny))
    with worker(tiny, "mortal") as pid, worker(tiny, "mortal"):
        channel = client.failover_channel("mortal")
        model = whole_model(tiny)
        with sealed(model, channel, BLIND) as moved:
            logits(model)
            first = channel.worker_pid
            killed = threading.Timer(0.05, os.kill, (first, signal.SIGKILL))
            killed.start()
            for _ in range(20):
                assert torch.equal(generate(model), expected)
                if channel.failovers:
                    break
            killed.join()
            assert torch.equal(generate(model), expected)
            assert channel.failovers == 1
            assert moved.sealed is not None
            assert moved.sealed.session.report().rejected == 0
        assert pid
    assert len(set(seen)) == len(seen)


def test_eight_threads_of_a_model_use_no_pad_twice(
    client: shmbroker.Client, tiny: Path, workers: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """P4."""
    seen = watched_pads(monkeypatch)
    model = whole_model(tiny)
    with sealed(model, client.channel(workers[0]), TrustOptions(mode=Trust.BLIND, pads=32)) as moved:
        expected = logits(model)
        found: list[bool] = []
        threads = [threading.Thread(target=lambda: found.append(torch.equal(logits(model), expected))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert moved.sealed is not None
        assert moved.sealed.session.report().pads_taken == len(seen)
    assert found == [True] * 8
    assert len(set(seen)) == len(seen)
