"""Peers that speak the lane by hand: a client that writes anything anywhere in its own segment, and a worker that completes what it likes.

Neither uses the package's ends: words are written where the published layout has them, so what no end would ever write can be written.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zmq

import shmbroker
from shmbroker.client.channel import Channel
from shmbroker.control import messages as m
from shmbroker.control.liveness import this_process
from shmbroker.memory import layout, names
from shmbroker.memory.hold import Hold, unlink_own
from shmbroker.memory.layout import ChannelHeader, CompletionFrame, SubmissionFrame
from tests.hostile.wire import Wire

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]

ANSWER_SECONDS = 300.0
"""In which a queue full of frames must be answered: thousands of times what it takes."""


class RawSegment:
    """A segment as nothing but bytes, and the places in one channel area of it."""

    def __init__(self, name: str, area: int, depth: int) -> None:
        fd = os.open(names.SHM_DIR + name, os.O_RDWR)
        try:
            self.map = mmap.mmap(fd, 0)
        finally:
            os.close(fd)
        self.bytes: Bytes = np.frombuffer(self.map, dtype=np.uint8)
        self.depth = depth
        submissions = area + ctypes.sizeof(ChannelHeader)
        completions = submissions + depth * ctypes.sizeof(SubmissionFrame)
        self.area_end = completions + depth * ctypes.sizeof(CompletionFrame)
        self.submissions: Bytes = self._slots(submissions, ctypes.sizeof(SubmissionFrame))
        self.completions: Bytes = self._slots(completions, ctypes.sizeof(CompletionFrame))
        self.header = ChannelHeader.from_buffer(self.map, area)
        self.segment_header = layout.SegmentHeader.from_buffer(self.map)

    def _slots(self, offset: int, nbytes: int) -> Bytes:
        return self.bytes[offset : offset + self.depth * nbytes].reshape(self.depth, nbytes)


def words_of(slots: Bytes) -> Words:
    """The same memory as 64-bit words."""
    return slots.view(np.uint64)


def field_bytes(structure: type[ctypes.Structure], name: str) -> slice:
    """Where a field lies."""
    descriptor = getattr(structure, name)
    return slice(descriptor.offset, descriptor.offset + descriptor.size)


class HostileClient:
    """Joins and opens a channel like anybody, then takes the queues over by hand.

    ``honest`` is another channel of the same process to the same worker, used by the rules: its calls tell that the worker has come round.
    """

    def __init__(self, client: shmbroker.Client, service: str = "test", doorbell: str = "sem") -> None:
        self.client = client
        self.channel: Channel = client.channel(service, lane="shm", doorbell=doorbell)
        self.channel.pair.completions.remove(self.channel.pair)  # its answers are read by hand
        self._look = client.channel(service, lane="shm").bind("double")
        self._word = client.empty((1,)).fill_(1.0)
        segment = client.segment
        geometry = segment.geometry
        self.raw = RawSegment(segment.name, geometry.channel_offset(self.channel.index), geometry.depth)
        self.depth = geometry.depth
        self.arena = range(geometry.arena_offset, geometry.total_bytes)
        self.position = 0
        self._bell = self.channel.pair.lane.peer_bell  # type: ignore[union-attr]

    def bind(self, op: str, **static: Any) -> int:
        """The op's number on the hostile channel."""
        return self.channel.bind(op, **static).op_id

    def ring(self) -> None:
        """Wake the worker."""
        self._bell.ring()

    def publish(self, frames: Bytes) -> None:
        """Write whole frames into the next slots, sequence numbers last, and ring."""
        count = len(frames)
        at = (self.position + np.arange(count)) % self.depth
        self.raw.submissions[at, 8:] = frames[:, 8:]
        words_of(self.raw.submissions)[at, 0] = np.arange(self.position + 1, self.position + count + 1, dtype=np.uint64)
        self.ring()
        self.position += count

    def answers_of(self, first: int, count: int) -> Bytes:
        """A copy of the completions of ``count`` positions from ``first``, once they are there; they are then said to be taken."""
        last = first + count - 1
        completions = words_of(self.raw.completions)
        until = time.monotonic() + ANSWER_SECONDS
        while int(completions[last % self.depth, 0]) != last + 1:
            assert time.monotonic() < until, f"position {last} is not answered; the worker has taken {self.raw.header.submissions_taken}"
            time.sleep(50e-6)
        at = np.arange(first, first + count) % self.depth
        answered: Bytes = self.raw.completions[at]
        assert np.array_equal(words_of(answered)[:, 0], np.arange(first + 1, first + count + 1)), "one answer for each position"
        self.raw.header.completions_taken = first + count
        return answered

    def exchange(self, frames: Bytes) -> Bytes:
        """Publish frames and wait for their answers."""
        self.publish(frames)
        return self.answers_of(self.position - len(frames), len(frames))

    def come_round(self) -> None:
        """Return when the worker has looked at all its queues at least once since this was called."""
        for _ in range(2):  # it may be in the midst of a round as the first comes
            self._look(self._word)


def valid_frame(
    op_id: int, tensors: list[tuple[int, int, tuple[int, ...], tuple[int, ...]]], inputs: int, metadata: bytes = b""
) -> SubmissionFrame:
    """A frame from scratch; each tensor as (offset, dtype code, shape, strides)."""
    frame = SubmissionFrame(op_id=op_id, input_count=inputs, output_count=len(tensors) - inputs, metadata_bytes=len(metadata))
    frame.metadata[: len(metadata)] = metadata
    for place, (offset, code, shape, strides) in zip(frame.tensors, tensors, strict=False):
        place.offset, place.dtype, place.ndim = offset, code, len(shape)
        place.shape[: len(shape)] = shape
        place.strides[: len(strides)] = strides
        place.nbytes = int(np.prod(shape, dtype=object)) * ITEMSIZE[code] if shape else ITEMSIZE[code]
    frame.generations[:] = [1] * layout.MAX_TENSORS
    return frame


ITEMSIZE = {1: 4, 2: 8, 3: 2, 4: 2, 5: 1, 6: 2, 7: 4, 8: 8, 9: 1, 10: 1, 11: 1, 12: 1}
"""Of each dtype code, written anew: what is tested is not asked."""


def lies_inside(place: layout.TensorDescriptor, arena: range) -> bool:
    """Whether all that a descriptor names lies in the arena, found without the package's own arithmetic."""
    itemsize = ITEMSIZE.get(place.dtype)
    if itemsize is None or place.ndim > layout.MAX_DIMS:
        return False
    shape, strides = list(place.shape)[: place.ndim], list(place.strides)[: place.ndim]
    if min(shape, default=0) < 0 or min(strides, default=0) < 0 or place.offset < arena.start:
        return False
    elements = 0 if 0 in shape else 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return bool(place.offset + elements * itemsize <= arena.stop)


class Footprint:
    """What a process holds: whether it grows."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def alive(self) -> bool:
        """Whether the process runs, and is none that waits to be collected."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

    def private_bytes(self) -> int:
        """Anonymous memory; what is shared does not count."""
        told = dict(line.split(":", 1) for line in Path(f"/proc/{self.pid}/status").read_text().splitlines())
        return int(told["RssAnon"].split()[0]) * 1024

    def files(self) -> int:
        """Open file descriptors."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))


@contextlib.contextmanager
def repeating(action: Callable[[], object]) -> Iterator[None]:
    """``action`` again and again in another thread, for the length of a block."""
    ended = threading.Event()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            while not ended.is_set():
                action()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert not failed, failed


@dataclass
class HostileWorker:
    """Offers a service by the rules of the control protocol and completes calls by none: what it writes is for the test to say.

    Control requests are answered by a thread; ``answer`` may replace any of the answers.
    """

    broker: shmbroker.LocalBroker
    service: str = "hostile"
    answer: Callable[[m.AnyMessage, m.Message], m.Message | bytes] = lambda request, proper: proper
    openings: list[m.OpenChannel] = field(default_factory=list)

    def __enter__(self) -> HostileWorker:
        self.id = names.new_id()
        runtime = self.broker.environment["SHMBROKER_RUNTIME_DIR"]
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.endpoint = f"ipc://{runtime}/{self.broker.instance}.worker.{self.id}.sock"
        self._broker = Wire(self._context, f"ipc://{runtime}/{self.broker.instance}.sock")
        made = self._broker.ask(m.MakeBell(self.id, this_process()))
        assert isinstance(made, m.Made)
        self.bell = made.name
        self._hold = Hold.on(names.bell_path(self.bell))
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind(self.endpoint)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        hello = m.Hello("worker", self.id, this_process(), "hostile-worker", "0", (self.service,), self.endpoint)
        assert isinstance(self._broker.ask(hello), m.Welcome)
        return self

    def __exit__(self, *_: object) -> None:
        self._broker.say(m.encode(m.Goodbye(self.id)))
        self._broker.close()
        self._ended.set()
        self._thread.join()
        self._socket.close()
        self._context.term()
        self._hold.release()
        unlink_own(names.bell_path(self.bell))

    def _serve(self) -> None:
        while not self._ended.is_set():
            if not self._socket.poll(20):
                continue
            sender, data = self._socket.recv_multipart()
            envelope = m.open_envelope(data)
            request = m.read_body(envelope)
            proper = self._proper(request)
            answer = self.answer(request, proper)
            self._socket.send_multipart([sender, answer if isinstance(answer, bytes) else m.encode(answer, envelope.request)])

    def _proper(self, request: m.AnyMessage) -> m.Message:
        if isinstance(request, m.OpenChannel):
            self.openings.append(request)
            return m.ChannelOpened(1, "shm", request.doorbell, self.bell, "", b"", ("anything",))
        if isinstance(request, m.Bind):
            return m.Bound(1)
        if isinstance(request, m.AskOutSpec):
            return m.OutSpecs(request.inputs[:1], True)
        return m.Done()

    def queues(self, client: shmbroker.Client) -> RawSegment:
        """The channel area that the client opened last."""
        geometry = client.segment.geometry
        opening = self.openings[-1]
        return RawSegment(opening.segment, geometry.channel_offset(opening.index), geometry.depth)
