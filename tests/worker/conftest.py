"""A worker's inside without a broker and without other processes: a frame loop, the channels that it serves, and clients that are only their memory."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import zmq

from shmbroker.arena.spec import TensorSpec, contiguous_strides
from shmbroker.control.liveness import this_process
from shmbroker.control.messages import OpenChannel
from shmbroker.lane.completion_frames import CompletionFields
from shmbroker.lane.doorbell import PollingBell
from shmbroker.lane.frames import FrameTemplate
from shmbroker.lane.shm_lane import ShmClientLane
from shmbroker.lane.zmq_lane import ZmqClientLane, ZmqWorkerSocket
from shmbroker.memory import names
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.segment import Segment, make_segment, unlink_segment
from shmbroker.settings.kinds import Doorbell, Lane
from shmbroker.worker import HostMemory
from shmbroker.worker.channel import WorkerChannel
from shmbroker.worker.draining import Stop
from shmbroker.worker.frame_loop import FrameLoop
from shmbroker.worker.open_channels import OpenChannels
from shmbroker.worker.ops import OpDefinition
from tests.peers import broker

__all__ = ["broker"]

GEOMETRY = Geometry(arena_bytes=1 << 16, channel_count=4, depth=4)
FORM = TensorSpec((4,), torch.float32)
SECONDS = 120.0
"""In which whatever is waited for must have come: many times what it takes."""

_numbers = itertools.count()

Function = Callable[..., Any]


@dataclass
class BareClient:
    """A client's segment with its id, and nothing more: what a worker is told of one."""

    instance: str
    id: str
    segment: Segment

    def opening(self, index: int = 0, **changes: Any) -> OpenChannel:
        """What it asks a worker."""
        told: dict[str, Any] = {
            "client": self.id, "client_name": "bare", "process": this_process(), "segment": self.segment.name, "index": index, "service": "test",
            "lane": "shm", "doorbell": "poll", "bell": names.bell_name(self.instance, self.id),
        }  # fmt: skip
        return OpenChannel(**{**told, **changes})


@pytest.fixture
def new_client(instance: str) -> Iterator[Callable[[], BareClient]]:
    """Makes clients, whose memory is given back with the test."""
    with contextlib.ExitStack() as undo:

        def make() -> BareClient:
            client = names.new_id()
            name = names.segment_name(instance, client)
            hold = make_segment(name, GEOMETRY, instance=instance, owner=client, owner_pid=1)
            undo.callback(unlink_segment, name)
            undo.callback(hold.release)
            segment = Segment.attach(name, hold=False)
            undo.callback(segment.close)
            return BareClient(instance, client, segment)

        yield make


@pytest.fixture
def client(new_client: Callable[[], BareClient]) -> BareClient:
    return new_client()


class WatchedMemory(HostMemory):
    """Memory that writes down what is mapped and what is not any more. ``asynchronous``: as a device that works on when an op has returned."""

    def __init__(self, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous
        self.log: list[str] = []

    def map(self, address: int, nbytes: int) -> Callable[[], None]:
        self.log.append("mapped")
        return lambda: self.log.append("unmapped")


@dataclass
class Serving:
    """A frame loop with the channels on it; :meth:`begin` has it run frames until the test ends."""

    frames: FrameLoop
    channels: OpenChannels
    stop: Stop
    memory: WatchedMemory
    context: zmq.Context[zmq.Socket[bytes]]
    socket: ZmqWorkerSocket
    threads: list[threading.Thread] = field(default_factory=list)

    def begin(self) -> None:
        self.threads.append(threading.Thread(target=self.frames.serve_shm, daemon=True))
        self.threads[-1].start()

    def end(self) -> None:
        """All that has come is answered."""
        self.stop.request()
        for thread in self.threads:
            thread.join(SECONDS)
            assert not thread.is_alive(), "the frame loop does not end"
        self.frames.join()

    def open_shm(self, client: BareClient, index: int = 0) -> tuple[WorkerChannel, ShmClientLane]:
        channel = self.channels.open(client.opening(index), Lane.SHM, Doorbell.POLL)
        return channel, ShmClientLane(client.segment, index, PollingBell())

    def open_zmq(self, client: BareClient, index: int = 0) -> tuple[WorkerChannel, ZmqClientLane]:
        channel = self.channels.open(client.opening(index, lane="zmq"), Lane.ZMQ, Doorbell.SOCKET)
        return channel, self.zmq_lane(channel.token)

    def zmq_lane(self, token: bytes) -> ZmqClientLane:
        return ZmqClientLane(self.context, self.socket.endpoint, token, GEOMETRY.depth)


@contextlib.contextmanager
def serving_with(instance: str, memory: WatchedMemory, **options: Any) -> Iterator[Serving]:
    """``options``: of the frame loop."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = ZmqWorkerSocket(context, f"inproc://lane-{next(_numbers)}")
    stop = Stop()
    frames = FrameLoop(PollingBell(), socket, stop, spin=0.0, asynchronous=memory.asynchronous, **options)
    made = Serving(frames, OpenChannels(instance, frames, memory=memory, kept_bytes=1 << 10), stop, memory, context, socket)
    try:
        yield made
    finally:
        made.end()
        made.channels.close()
        socket.close()
        context.destroy(linger=0)


@pytest.fixture
def serving(instance: str) -> Iterator[Serving]:
    """A worker's frame loop, not yet running."""
    with serving_with(instance, WatchedMemory()) as made:
        yield made


@pytest.fixture
def serving_device(instance: str) -> Iterator[Serving]:
    """The same over a device that still works when an op has returned."""
    with serving_with(instance, WatchedMemory(asynchronous=True)) as made:
        yield made


def bound(channel: WorkerChannel, function: Function) -> FrameTemplate:
    """An op of one input and one output of :data:`FORM`, bound on the channel: what a call of it looks like."""
    op_id = channel.bind(OpDefinition("op", function, lambda x: x).bind({}, {}))
    strides = contiguous_strides(FORM.shape)
    return FrameTemplate(op_id, [(FORM, strides)], [(FORM, strides)])


def submit(lane: ShmClientLane | ZmqClientLane, template: FrameTemplate, call_id: int) -> None:
    """The input at the arena's start, the output behind it."""
    begin = GEOMETRY.arena_offset
    assert lane.submit(template, call_id, 0, 1, [begin, begin + 256], [0, 0])


def next_completion(lane: ShmClientLane | ZmqClientLane) -> CompletionFields:
    until = time.monotonic() + SECONDS
    while (taken := lane.take()) is None:
        assert time.monotonic() < until, "no completion"
        time.sleep(0.001)
    return taken


def double(x: torch.Tensor, *, out: torch.Tensor) -> None:
    torch.mul(x, 2, out=out)
