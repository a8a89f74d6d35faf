"""Closing: from wherever, however often, whatever goes wrong meanwhile; it always ends closed, with nothing left. Z1 to Z4."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

import shmbroker
from shmbroker.client.closing import Closing
from shmbroker.memory.reaper import objects
from tests.peers import LANES
from tests.processes import run, wait_until
from tests.threads import InThread

SECONDS = 200.0


@pytest.fixture
def closing_client(broker: shmbroker.LocalBroker, worker: int) -> Iterator[shmbroker.Client]:
    """One that the test closes."""
    client = shmbroker.connect(arena="4M")
    yield client
    client.close()


def left_of(client: shmbroker.Client) -> list[str]:
    return [name.file for name in objects(client.instance) if name.owner == client.id]


def check_closed(client: shmbroker.Client) -> None:
    """Soon, for where it is closed in the background."""
    wait_until(lambda: not left_of(client), SECONDS)
    wait_until(lambda: client.channels == (), SECONDS)
    with pytest.raises(shmbroker.ChannelError, match="the client is closed"):
        client.empty((1,))
    assert "the client is closed" in repr(client)
    client.close()


# --- steps ------------------------------------------------------------------------------------------------------------------------------


def failing(log: list[str], name: str, error: BaseException) -> Callable[[], None]:
    def step() -> None:
        log.append(name)
        if log.count(name) == 1:
            raise error

    return step


def test_all_steps_are_done_once_whatever_one_raises_and_the_first_error_is_told() -> None:
    """Z1."""
    log: list[str] = []
    closing = Closing("it")
    closing.add(log.append, "first")
    closing.add(failing(log, "second", OSError("of the second")))
    closing.add(failing(log, "third", OSError("of the third")))
    closing.add(lambda: closing.add(log.append, "added meanwhile"))
    with pytest.raises(OSError, match="of the third"):
        closing.close()
    assert log == ["added meanwhile", "third", "second", "first"]
    assert closing.done
    closing.close()
    assert len(log) == 4


def test_what_an_interrupt_kept_from_being_done_is_done_the_next_time() -> None:
    """Z2."""
    log: list[str] = []
    closing = Closing("it")
    closing.add(log.append, "first")
    closing.add(failing(log, "interrupted", KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        closing.close()
    assert log == ["interrupted", "first"]
    assert not closing.done
    closing.close()
    assert log == ["interrupted", "first", "interrupted"]


def test_a_second_thread_waits_for_the_first() -> None:
    """Z3."""
    closing, begun, go_on = Closing("it"), threading.Event(), threading.Event()
    closing.add(lambda: (begun.set(), go_on.wait(SECONDS)))
    first = InThread(closing.close)
    assert begun.wait(SECONDS)
    second = InThread(closing.close)
    time.sleep(0.05)
    assert second.running
    go_on.set()
    first.join()
    second.join()


# --- clients ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lane", ["shm", "zmq"])
@pytest.mark.parametrize("kind", ["channel", "failover_channel"])
@pytest.mark.parametrize("found_by", ["background", "result", "done", "at once"])
def test_in_a_callback(closing_client: shmbroker.Client, lane: str, kind: str, found_by: str) -> None:
    """Whichever thread runs it: the background's, or that of whoever looked."""
    client = closing_client
    channel = getattr(client, kind)("test", lane=lane)
    future = channel.bind("sleep", seconds=0.2).submit(torch.ones(1))
    closed = threading.Event()
    if found_by == "at once":
        future.result(SECONDS)
    future.add_done_callback(lambda future: (client.close(), closed.set()))
    if found_by == "result":
        assert future.result(SECONDS).item() == 1.0
    elif found_by == "done":
        wait_until(future.done, SECONDS)
    assert closed.wait(SECONDS)
    client.close()
    assert left_of(client) == []
    check_closed(client)


def test_in_callbacks_of_all_calls_at_once_while_it_is_being_closed(closing_client: shmbroker.Client) -> None:
    """Each is called with the end of the channel, and closes again."""
    client = closing_client
    slow = client.channel("test").bind("sleep", seconds=0.5)
    futures = [slow.submit(torch.ones(1)) for _ in range(8)]
    closed: list[int] = []
    for future in futures:
        future.add_done_callback(lambda future: (client.close(), closed.append(1)))
    client.close()
    wait_until(lambda: len(closed) == 8, SECONDS)
    check_closed(client)


@pytest.mark.parametrize("lane", ["shm", "zmq"])
def test_in_a_finaliser_that_runs_in_the_midst_of_a_call(
    closing_client: shmbroker.Client, lane: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Z4: the thread that it interrupts holds the lead of those who wait, and the closing would wait for that."""
    client = closing_client
    channel = client.channel("test", lane=lane)
    double = channel.bind("double")
    double(torch.ones(1))

    class Holder:
        def __del__(self) -> None:
            client.close()

    drain = channel.pair.drain

    def interrupted() -> None:
        holder: Holder | None = Holder()
        holder = None  # noqa: F841  # as the collector does, at any line
        drain()

    monkeypatch.setattr(channel.pair, "drain", interrupted)
    channel.pair.completions.remove(channel.pair)
    channel.pair.completions.add(channel.pair)  # it remembers how to drain

    def call() -> None:
        with contextlib.suppress(shmbroker.ShmBrokerError):  # which of both is faster, the answer or the end, is open
            double(torch.ones(1))

    InThread(call).join()
    check_closed(client)


def test_in_a_finaliser_of_nobodys_business(closing_client: shmbroker.Client) -> None:
    client = closing_client
    client.channel("test").bind("double")(torch.ones(1))

    class Holder:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            client.close()

    Holder()
    gc.collect()
    assert left_of(client) == []
    check_closed(client)


@pytest.mark.parametrize("lane", ["shm", "zmq"])
def test_while_other_threads_call_bind_place_and_open(closing_client: shmbroker.Client, lane: str) -> None:
    """Each of them is told by an error of ours, and none hangs."""
    client = closing_client
    channel = client.channel("test", lane=lane)
    double, slow = channel.bind("double"), channel.bind("sleep", seconds=0.3)
    big = torch.ones(1 << 19)
    uses: list[Callable[[], object]] = [
        lambda: double(torch.ones(1)),
        lambda: slow(torch.ones(1)),
        lambda: slow.submit(torch.ones(1)).exception(),
        lambda: channel.bind("double"),
        lambda: [client.empty(1 << 18) for _ in range(8)],
        lambda: double(big),
        lambda: client.channel("test", lane=lane).close(),
        lambda: client.channel("never", wait=3600.0),
        lambda: double.submit(torch.ones(1)).done(),
    ]
    begun = threading.Barrier(len(uses) + 1)

    def until_closed(use: Callable[[], object]) -> None:
        begun.wait(SECONDS)
        while True:
            try:
                use()
            except shmbroker.ArenaFull:
                continue
            except shmbroker.ShmBrokerError as error:
                if client.channels == () or "closed" in str(error):
                    return

    threads = [InThread(lambda use=use: until_closed(use)) for use in uses]
    begun.wait(SECONDS)
    time.sleep(0.3)
    client.close()
    for thread in threads:
        thread.join()
    check_closed(client)


def test_while_an_op_is_tried_out_for_its_shapes(closing_client: shmbroker.Client) -> None:
    client = closing_client
    channel = client.channel("test")
    slow = channel.bind("tried_slowly", seconds=2.0, form="closing")
    caller = InThread(lambda: slow(torch.ones(1), timeout=600.0))
    wait_until(lambda: client.arena.occupancy().blocks > 0, SECONDS)  # its input is placed, and it asks
    client.close()
    with pytest.raises(shmbroker.ChannelError, match="closed"):
        caller.join()
    check_closed(client)


def test_half_done(closing_client: shmbroker.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever step raises, and what an interrupt stopped: the others are done, and a second time the rest."""
    client = closing_client
    channels = [client.channel("test") for _ in range(3)]

    def interrupted(why: str) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(channels[1].pair, "stop", interrupted)
    with pytest.raises(KeyboardInterrupt):
        client.close()
    client.close()
    assert left_of(client) == []
    check_closed(client)


def test_an_error_of_one_channel_keeps_nothing_else_from_being_closed(
    closing_client: shmbroker.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = closing_client
    channels = [client.channel("test") for _ in range(3)]

    def broken() -> None:
        raise OSError("broken")

    monkeypatch.setattr(channels[1].pair.lane, "close", broken)
    with pytest.raises(OSError, match="broken"):
        client.close()
    assert left_of(client) == []
    check_closed(client)


AT_EXIT = """
import atexit, sys, threading, time

if sys.argv[1] == "before":
    atexit.register(lambda: client.close())
import shmbroker, torch
client = shmbroker.connect(arena="1M")
future = client.channel("test").bind("sleep", seconds=0.2).submit(torch.ones(1))
if sys.argv[1] == "after":
    atexit.register(client.close)
if sys.argv[1] == "callback":
    future.add_done_callback(lambda future: client.close())
if sys.argv[1] == "finaliser":
    class Holder:
        def __del__(self):
            client.close()
    holder = Holder()
if sys.argv[1] == "calling":
    slow = client.channel("test").bind("sleep", seconds=0.5)
    threading.Thread(target=lambda: slow(torch.ones(1)), daemon=True).start()
print(client.id)
"""


@pytest.mark.parametrize("how", ["before", "after", "callback", "finaliser", "calling"])
def test_at_exit(broker: shmbroker.LocalBroker, worker: int, how: str) -> None:
    done = run(sys.executable, "-c", AT_EXIT, how, seconds=SECONDS * 2)
    assert done.returncode == 0, done.stderr
    assert [name.file for name in objects(broker.instance) if name.owner == done.stdout.strip()] == []


# --- and the worker's end of it -----------------------------------------------------------------------------------------------------------


def test_a_worker_unmaps_a_client_that_has_closed_however_others_wait(client: shmbroker.Client, worker: int) -> None:
    """Each kind after each other kind: what the worker waits by must not keep the words of one that is gone."""
    mapped = client.channel("test").bind("mapped_segments")
    for lane, doorbell in (*LANES, *LANES):
        with shmbroker.connect(arena="4M", name="closing") as closing:
            assert closing.channel("test", lane=lane, doorbell=doorbell).bind("double")(torch.ones(1)).item() == 2.0
        wait_until(lambda: mapped(torch.ones(1)).item() == 1, SECONDS)
