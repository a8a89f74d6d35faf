"""The control server: what it answers, whom it drops, and when it ends. Between two sockets of one process."""

from __future__ import annotations

import itertools
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch

from shmbroker.control import messages as m
from shmbroker.control.liveness import process_of
from shmbroker.control.messages import ProcessId
from shmbroker.control.sockets import Requester, Responder
from shmbroker.errors import BadInput, ChannelError, ProtocolMismatch
from shmbroker.worker.control_server import ControlServer, Offer
from shmbroker.worker.ops import OpDefinition
from tests.processes import wait_until
from tests.worker.conftest import SECONDS, BareClient, Serving, bound, double, next_completion, submit

_numbers = itertools.count()


def halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[: len(x) // 2], x[len(x) // 2 :]


def table(rows: int) -> Callable[..., None]:
    return double


OPS = {
    "double": OpDefinition("double", double, lambda x: x),
    "halves": OpDefinition("halves", halves),
    "table": OpDefinition("table", table, lambda x, rows: x, per_bind=True),
}


@dataclass
class Answering:
    """A control server in its thread, and who asks it."""

    server: ControlServer
    requester: Requester
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self.server.serve, daemon=True)
        self.thread.start()

    def open(self, opening: m.OpenChannel) -> m.ChannelOpened:
        return self.requester.ask(opening, m.ChannelOpened)

    def bind(self, channel: int, op: str) -> m.Bound:
        return self.requester.ask(m.Bind(channel, op, {}), m.Bound)


@pytest.fixture
def answering_with(serving: Serving) -> Iterator[Callable[[ProcessId | None], Answering]]:
    """Makes the server, which ends with the process that it is given."""
    endpoint = f"inproc://control-{next(_numbers)}"
    responder = Responder(serving.context, endpoint)
    requester = Requester(serving.context, endpoint)
    made: list[Answering] = []

    def make(parent: ProcessId | None) -> Answering:
        offer = Offer("test", "worker", "one identity", OPS, "bell", serving.socket.endpoint)
        made.append(Answering(ControlServer(offer, responder, serving.channels, serving.stop, parent=parent), requester))
        return made[-1]

    serving.begin()
    yield make
    serving.stop.request()
    for one in made:
        one.thread.join(SECONDS)
        assert not one.thread.is_alive()
    requester.close()
    responder.close()


@pytest.fixture
def answering(answering_with: Callable[[ProcessId | None], Answering]) -> Answering:
    return answering_with(None)


@pytest.mark.parametrize(("lane", "doorbell", "agreed"), [("shm", "poll", "poll"), ("zmq", "sem", "socket")])
def test_a_channel_is_opened_bound_called_and_closed(
    answering: Answering, serving: Serving, client: BareClient, lane: str, doorbell: str, agreed: str
) -> None:
    opened = answering.open(client.opening(lane=lane, doorbell=doorbell))
    assert (opened.lane, opened.doorbell, opened.ops, opened.identity) == (lane, agreed, ("double", "halves", "table"), "one identity")
    assert bool(opened.token) == (lane == "zmq")
    answer = answering.bind(opened.channel, "double")
    assert (answer.op_id, answering.bind(opened.channel, "shmbroker.echo").op_id) == (1, 2)
    if lane == "zmq":
        end = serving.zmq_lane(opened.token)
        submit(end, bound(serving.channels.find(opened.channel), double), 1)
        assert next_completion(end)[0] == 1
        end.close()
    answering.requester.ask(m.CloseChannel(opened.channel), m.ChannelClosed)
    with pytest.raises(ChannelError, match="is not open on this worker"):
        answering.bind(opened.channel, "double")


def test_shapes_of_an_op_without_an_out_spec_are_found_by_trying_it_out(answering: Answering, client: BareClient) -> None:
    channel = answering.open(client.opening()).channel
    op_id = answering.bind(channel, "halves").op_id
    answer = answering.requester.ask(m.AskOutSpec(channel, op_id, (m.SpecInfo((6,), "int64"),), {}), m.OutSpecs, timeout=120.0)
    assert answer == m.OutSpecs((m.SpecInfo((3,), "int64"), m.SpecInfo((3,), "int64")), False)


def test_what_cannot_be_done_is_refused_with_its_error(answering: Answering, client: BareClient) -> None:
    ask = answering.requester.ask
    with pytest.raises(ChannelError, match="this worker offers 'test', not 'else'"):
        ask(client.opening(service="else"), m.ChannelOpened)
    for changes in ({"lane": "pigeon"}, {"doorbell": "gong"}, {"doorbell": "socket"}):
        with pytest.raises(ChannelError, match="sem"):
            ask(client.opening(**changes), m.ChannelOpened)
    with pytest.raises(ProtocolMismatch, match="a worker takes no GetStatus"):
        ask(m.GetStatus(), m.StatusReport)
    channel = answering.open(client.opening()).channel
    with pytest.raises(BadInput, match=r"worker 'worker' has no op 'triple'; it has: double, halves, table"):
        ask(m.Bind(channel, "triple", {}), m.Bound)
    with pytest.raises(BadInput, match=r"op 'table' cannot be bound with \['columns'\]"):
        ask(m.Bind(channel, "table", {"columns": 1}), m.Bound)
    with pytest.raises(ChannelError, match="op id 1 is not bound"):
        ask(m.AskOutSpec(channel, 1, (), {}), m.OutSpecs)


def test_a_client_that_the_broker_says_is_gone_has_its_channels_dropped(answering: Answering, serving: Serving, client: BareClient) -> None:
    answering.open(client.opening(0))
    answering.open(client.opening(1))
    answering.server.client_gone(client.id)
    wait_until(lambda: serving.memory.log == ["mapped", "unmapped"], SECONDS)


def test_a_channel_whose_client_does_not_keep_the_rules_is_dropped(answering: Answering, serving: Serving, client: BareClient) -> None:
    opened = answering.open(client.opening())
    serving.frames.broken.put(serving.channels.find(opened.channel))
    wait_until(lambda: serving.memory.log == ["mapped", "unmapped"], SECONDS)


def test_the_worker_stops_when_the_process_that_it_belongs_to_has_ended(
    answering_with: Callable[[ProcessId | None], Answering], serving: Serving
) -> None:
    parent = subprocess.Popen(["sleep", "600"])
    try:
        answering_with(process_of(parent.pid))
        assert not serving.stop.requested
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: serving.stop.requested, SECONDS)
