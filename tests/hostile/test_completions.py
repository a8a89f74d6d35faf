"""A worker that completes what it likes: its client raises documented errors only, in time, and its calls to others go on."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

import shmbroker
from shmbroker.call.remote_op import RemoteOp
from shmbroker.client.channel import Channel
from shmbroker.client.local_broker import stop_process
from shmbroker.control import messages as m
from shmbroker.lane.doorbell import SemaphoreBell
from shmbroker.memory import layout, names
from shmbroker.memory.layout import CompletionFrame, Status, SubmissionFrame
from shmbroker.memory.names import bell_path
from tests.hostile.conftest import HonestClient
from tests.hostile.peer import HostileWorker, RawSegment, repeating, words_of
from tests.processes import PROGRAMS, wait_until

SEED = 20240607
SHORT = 0.3
"""Timeout of calls that nobody answers, seconds."""

LONG = 20.0
"""Timeout of calls that are answered: never reached."""


class ByHand:
    """The worker's end of one channel, written by hand."""

    def __init__(self, raw: RawSegment, bell: str) -> None:
        self.raw = raw
        self.position = 0
        self._bell = SemaphoreBell(bell)

    @property
    def room(self) -> int:
        """Slots that may be filled; what is written over those that are not taken is only the worker's own loss."""
        return self.raw.depth - (self.position - int(self.raw.header.completions_taken))

    def frame(self, call_id: int) -> SubmissionFrame:
        """The call, once it is there."""
        slot = (call_id - 1) % self.raw.depth
        wait_until(lambda: int(words_of(self.raw.submissions)[slot, 1]) == call_id)
        frame = SubmissionFrame.from_buffer_copy(self.raw.submissions[slot])
        self.raw.header.submissions_taken = call_id
        return frame

    def write(self, call_id: int, value: float) -> int:
        """Write the call's result; where that is."""
        place = self.frame(call_id).tensors[1]
        self.raw.bytes[place.offset : place.offset + place.nbytes].view(np.float32)[:] = value
        return int(place.offset)

    def put(self, frame: bytes, sequence: int | None = None) -> None:
        """A completion of any bytes into the next slot, and ring."""
        slot = self.raw.completions[self.position % self.raw.depth]
        slot[8:] = np.frombuffer(frame, dtype=np.uint8)[8:]
        self.position += sequence is None
        slot[:8].view(np.uint64)[0] = self.position if sequence is None else sequence
        self._bell.ring()

    def complete(self, call_id: int, status: int = 0, text: bytes = b"", *, sequence: int | None = None, **fields: int) -> None:
        frame = CompletionFrame(call_id=call_id, status=status, text_bytes=len(text))
        frame.body[: len(text)] = text
        for name, value in fields.items():
            setattr(frame, name, value)
        self.put(bytes(frame), sequence)


@pytest.fixture
def hostile(broker: shmbroker.LocalBroker) -> Iterator[HostileWorker]:
    with HostileWorker(broker) as worker:
        yield worker


@pytest.fixture
def client(broker: shmbroker.LocalBroker, honest: HonestClient) -> Iterator[shmbroker.Client]:
    """Of a hostile and of an honest worker; its calls to the latter go on all the while and are right."""
    with shmbroker.connect(arena="1M", channels=4, depth=16, timeout=LONG) as client:
        double = client.channel("test").bind("double")
        right = [0]

        def call() -> None:
            x = client.empty((10,)).fill_(right[0] % 1000)
            assert torch.equal(double(x), x * 2)
            right[0] += 1

        with repeating(call):
            yield client
            wait_until(lambda: right[0] > 10)


@pytest.fixture
def channel(client: shmbroker.Client, hostile: HostileWorker) -> Channel:
    return client.channel("hostile", doorbell="sem")


@pytest.fixture
def by_hand(channel: Channel, client: shmbroker.Client, hostile: HostileWorker) -> ByHand:
    return ByHand(hostile.queues(client), hostile.openings[-1].bell)


@pytest.fixture
def op(channel: Channel) -> RemoteOp:
    return channel.bind("anything", out_spec=lambda x: x)


ONE = torch.ones(4)


def answered(op: RemoteOp, by_hand: ByHand, call_id: int) -> None:
    """A call by the rules, to see that all is well."""
    future = op.submit(ONE, timeout=LONG)
    by_hand.write(call_id, call_id)
    by_hand.complete(call_id)
    assert future.result().tolist() == [call_id] * 4


def test_ids_that_are_not_outstanding_are_ignored(op: RemoteOp, by_hand: ByHand) -> None:
    future = op.submit(ONE)
    for call_id in (0, 2, 3, 1 << 32, 1 << 63, (1 << 64) - 1):
        by_hand.complete(call_id)
    by_hand.write(1, 5.0)
    by_hand.complete(1)
    assert future.result().tolist() == [5.0] * 4
    answered(op, by_hand, 2)


def test_a_second_completion_of_a_call_is_ignored(op: RemoteOp, by_hand: ByHand) -> None:
    answered(op, by_hand, 1)
    for _ in range(3):
        by_hand.complete(1, Status.OP_ERROR, b"again")
    answered(op, by_hand, 2)
    future = op.submit(ONE)
    by_hand.complete(1)
    by_hand.complete(2, Status.BAD_FRAME, b"again")
    by_hand.write(3, 3)
    by_hand.complete(3)
    by_hand.complete(3, Status.OP_ERROR, b"again")
    assert future.result().tolist() == [3.0] * 4


def test_calls_completed_in_another_order_get_each_its_own_tensors(op: RemoteOp, by_hand: ByHand, client: shmbroker.Client) -> None:
    futures = [op.submit(ONE) for _ in range(10)]
    offsets = {call_id: by_hand.write(call_id, call_id) for call_id in range(1, 11)}
    for call_id in np.random.default_rng(SEED).permutation(10).tolist():
        by_hand.complete(call_id + 1)
    for call_id, future in enumerate(futures, 1):
        result = future.result()
        assert result.tolist() == [float(call_id)] * 4
        assert result.data_ptr() - client.arena.address == offsets[call_id]


def test_a_late_completion_of_a_call_that_timed_out_changes_nothing_and_ends_its_hold_on_its_blocks(
    op: RemoteOp, by_hand: ByHand, channel: Channel
) -> None:
    with pytest.raises(shmbroker.CallTimeout, match="call 1: no completion after"):
        op(ONE, timeout=SHORT)
    assert channel.outstanding == 1
    by_hand.complete(1)
    answered(op, by_hand, 2)
    assert channel.outstanding == 0


@pytest.mark.parametrize("status", [6, 77, 1 << 31, (1 << 32) - 1])
def test_a_status_that_does_not_exist_is_a_call_error(op: RemoteOp, by_hand: ByHand, status: int) -> None:
    future = op.submit(ONE)
    by_hand.complete(1, status, b"\xff" * layout.TEXT_BYTES)
    with pytest.raises(shmbroker.CallError, match=f"answered with unknown status {status}"):
        future.result()
    answered(op, by_hand, 2)


@pytest.mark.parametrize("text_bytes", [layout.TEXT_BYTES + 1, 1 << 16, 1 << 31, (1 << 32) - 1])
def test_a_completion_with_a_text_beyond_its_room_is_none(op: RemoteOp, by_hand: ByHand, text_bytes: int) -> None:
    future = op.submit(ONE, timeout=SHORT)
    by_hand.complete(1, Status.OP_ERROR, text_bytes=text_bytes)
    with pytest.raises(shmbroker.CallTimeout):
        future.result()
    by_hand.complete(1)
    answered(op, by_hand, 2)


@pytest.mark.parametrize("status", [Status.OP_ERROR, Status.BAD_FRAME])
@pytest.mark.parametrize("text", [b"\xff\xfe\n\x80", b"\n" * 960, b"\0" * 960, b"", b"\xed\xa0\x80\n\xed\xb0\x80", "é".encode() * 480])
def test_a_text_of_any_bytes_is_told_as_well_as_it_can_be(op: RemoteOp, by_hand: ByHand, status: int, text: bytes) -> None:
    future = op.submit(ONE)
    by_hand.complete(1, status, text)
    with pytest.raises(shmbroker.RemoteOpError if status == Status.OP_ERROR else shmbroker.BadFrame) as told:
        future.result()
    str(told.value).encode()
    answered(op, by_hand, 2)


def test_a_text_with_a_success_is_not_looked_at(op: RemoteOp, by_hand: ByHand) -> None:
    future = op.submit(ONE)
    by_hand.write(1, 2.0)
    by_hand.complete(1, Status.OK, b"\xff" * 960)
    assert future.result().tolist() == [2.0] * 4


def test_a_completion_is_taken_at_its_own_position_only(op: RemoteOp, by_hand: ByHand) -> None:
    """L2."""
    future = op.submit(ONE, timeout=SHORT)
    depth = by_hand.raw.depth
    for sequence in (0, 2, 3, depth, depth + 1, 1 << 63, (1 << 64) - 1):
        by_hand.complete(1, sequence=sequence)
    with pytest.raises(shmbroker.CallTimeout):
        future.result()
    by_hand.complete(1)
    answered(op, by_hand, 2)


def test_times_that_no_call_can_have_taken_are_bounded_by_those_of_the_call(op: RemoteOp, by_hand: ByHand, channel: Channel) -> None:
    future = op.submit(ONE)
    by_hand.complete(1, queued_ns=(1 << 64) - 1, compute_ns=(1 << 64) - 1)
    future.result()
    (told,) = channel.statistics
    assert 0 <= told.compute_ns <= told.rpc_ns
    assert 0 <= told.queued_ns <= told.rpc_ns


def test_random_completions_end_no_call_in_an_undocumented_way(op: RemoteOp, by_hand: ByHand, channel: Channel) -> None:
    random = np.random.default_rng(SEED)
    ended = {"result": 0, "error": 0}
    for call_id in range(1, 301):
        future = op.submit(ONE, timeout=LONG)
        offset = by_hand.write(call_id, call_id)
        for _ in range(min(int(random.integers(8)), by_hand.room - 1)):
            frame = bytearray(random.integers(256, size=layout.COMPLETION_SLOT_BYTES, dtype=np.uint8).tobytes())
            if random.random() < 0.7:  # that is not refused at the first look
                frame[24:28] = int(random.integers(1200)).to_bytes(4, "little")
            if random.random() < 0.5:
                frame[8:16] = max(0, call_id + int(random.integers(-3, 3))).to_bytes(8, "little")
            if random.random() < 0.5:
                frame[16:20] = int(random.integers(8)).to_bytes(4, "little")
            by_hand.put(bytes(frame))
        wait_until(lambda: by_hand.room > 0 or channel.outstanding == 0)
        if by_hand.room:
            by_hand.complete(call_id)
        try:
            result = future.result()
        except shmbroker.CallError:
            ended["error"] += 1
        else:
            ended["result"] += 1
            assert (result.data_ptr() - channel.memory.arena.address, result.tolist()) == (offset, [float(call_id)] * 4)
    assert min(ended.values()) > 10


def test_completions_that_change_while_they_are_read_end_each_call_in_a_documented_way(op: RemoteOp, by_hand: ByHand) -> None:
    noise = np.random.default_rng(SEED).integers(256, size=(8, by_hand.raw.depth, layout.COMPLETION_SLOT_BYTES - 16), dtype=np.uint8)
    noise[:4, :, :16] = 0  # some of them tell of a success
    turns = itertools.count()
    with repeating(lambda: np.copyto(by_hand.raw.completions[:, 16:], noise[next(turns) % len(noise)])):
        for call_id in range(1, 201):
            future = op.submit(ONE, timeout=LONG)
            by_hand.frame(call_id)
            while not future.done():  # one that is changed into none is passed over
                if by_hand.room > 0:
                    by_hand.complete(call_id)
                try:
                    future.result(timeout=0.05)
                except (shmbroker.CallError, TimeoutError):
                    pass
    assert next(turns) > 100


@pytest.mark.parametrize("text_bytes", [0, (1 << 32) - 1], ids=["that answer nothing", "that are none"])
def test_a_flood_of_completions_does_not_keep_a_caller_beyond_its_timeout(
    broker: shmbroker.LocalBroker, hostile: HostileWorker, honest: HonestClient, caplog: pytest.LogCaptureFixture, text_bytes: int
) -> None:
    """The peer fills its queue faster than it can be emptied."""
    caplog.set_level("CRITICAL")
    returned: list[BaseException] = []
    with shmbroker.connect(arena="256K", channels=1, depth=1024) as client:
        op = client.channel("hostile", doorbell="sem").bind("anything", out_spec=lambda x: x)
        raw = hostile.queues(client)
        raw.completions[:, 24:28].view(np.uint32)[:] = text_bytes
        area = client.segment.geometry.channel_offset(0)
        places = [area + client.segment.geometry.completions_offset, area + layout.ChannelHeader.completions_taken.offset, raw.depth]
        command = [sys.executable, str(PROGRAMS / "flood.py"), names.SHM_DIR + client.segment.name, *map(str, places)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as flood:
            assert flood.stdout is not None
            assert flood.stdout.readline() == b"ready\n"

            def call() -> None:
                try:
                    op(ONE, timeout=SHORT)
                except shmbroker.CallTimeout as error:
                    returned.append(error)

            caller = threading.Thread(target=call)
            caller.start()
            caller.join(LONG)
            in_time = not caller.is_alive()
            stop_process(flood)
        caller.join(LONG)
    assert in_time
    assert len(returned) == 1


def test_words_of_nonsense_end_no_call_in_an_undocumented_way(op: RemoteOp, by_hand: ByHand, channel: Channel) -> None:
    random = np.random.default_rng(SEED)
    for call_id in range(1, 101):
        header = by_hand.raw.header
        # The word of taken submissions ahead of what was sent: the worker loses frames of its own, if any.
        header.submissions_taken = (1 << 64) - int(random.integers(1, 1 << 32))
        header.worker_sleeping = int(random.integers(1 << 63))
        by_hand.raw.segment_header.client_sleeping = int(random.integers(1 << 63))
        answered(op, by_hand, call_id)
    header.submissions_taken = 0
    with pytest.raises(shmbroker.CallTimeout, match="none was completed before the deadline"):
        [op.submit(ONE, timeout=SHORT) for _ in range(by_hand.raw.depth + 1)]
    assert channel.outstanding <= by_hand.raw.depth


def test_a_bell_that_can_be_rung_no_more_keeps_no_call_from_being_sent(op: RemoteOp, by_hand: ByHand, hostile: HostileWorker) -> None:
    with open(bell_path(hostile.bell), "r+b") as bell:
        bell.write((0x7FFFFFFF).to_bytes(4, "little"))
    for call_id in range(1, 20):
        by_hand.raw.header.worker_sleeping = 1
        answered(op, by_hand, call_id)


GOOD = m.ChannelOpened(1, "shm", "sem", "", "", b"", ())


def _opened(**changes: object) -> Callable[[m.AnyMessage, m.Message], m.Message]:
    def answer(request: m.AnyMessage, proper: m.Message) -> m.Message:
        if not isinstance(proper, m.ChannelOpened):
            return proper
        fields = {name: getattr(proper, name) for name in proper.__struct_fields__}
        return m.ChannelOpened(**{**fields, **changes})  # type: ignore[arg-type]

    return answer


@pytest.mark.parametrize(
    "changes",
    [
        {"lane": "carrier pigeon"},
        {"doorbell": "gong"},
        {"bell": "/x\0y"},
        {"bell": ""},
        {"bell": "/../../etc/passwd"},
        {"bell": "/shmbroker.x.bell.0123456789abcdef"},
        {"lane": "zmq", "endpoint": "nowhere", "token": b"t" * 16},
        {"lane": "zmq", "endpoint": "ipc://" + "x" * 5000, "token": b"t" * 16},
        {"lane": "zmq", "endpoint": "inproc://nobody", "token": b"t" * 1000},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_an_answer_to_open_that_makes_no_sense_is_a_channel_error(
    client: shmbroker.Client, hostile: HostileWorker, changes: dict[str, object]
) -> None:
    hostile.answer = _opened(**changes)
    for _ in range(5):  # more often than there are channel areas: none is lost
        with pytest.raises((shmbroker.ChannelError, shmbroker.BadInput)):
            client.channel("hostile", doorbell="sem")


@pytest.mark.parametrize(
    "refused", ["ChannelError", "RemoteOpError", "SystemExit", "annotations", "ShmBrokerError", "", "__doc__", "x" * 1000]
)
def test_a_refusal_of_any_type_is_an_error_of_ours(client: shmbroker.Client, hostile: HostileWorker, refused: str) -> None:
    hostile.answer = lambda request, proper: m.Refused(refused, "\0\n\x1b[2J" * 100)
    with pytest.raises(shmbroker.ShmBrokerError):
        client.channel("hostile")


@pytest.mark.parametrize(
    "specs",
    [
        ((-1,), "float32"),
        ((1 << 40,), "float32"),
        ((1 << 62, 1 << 62), "float32"),
        ((1,) * 9, "float32"),
        ((1,) * 1000, "float32"),
    ],
    ids=str,
)
def test_output_shapes_that_cannot_be_are_errors_of_ours(
    channel: Channel, hostile: HostileWorker, specs: tuple[tuple[int, ...], str]
) -> None:
    hostile.answer = lambda request, proper: m.OutSpecs((m.SpecInfo(*specs),), True) if isinstance(request, m.AskOutSpec) else proper
    op = channel.bind("anything")
    with pytest.raises(shmbroker.ShmBrokerError):
        op(ONE)


def test_more_outputs_than_a_frame_carries_are_an_error_of_ours(channel: Channel, hostile: HostileWorker) -> None:
    many = m.OutSpecs((m.SpecInfo((1,), "float32"),) * 100, False)
    hostile.answer = lambda request, proper: many if isinstance(request, m.AskOutSpec) else proper
    op = channel.bind("anything")
    with pytest.raises(shmbroker.ShmBrokerError):
        op(ONE)
