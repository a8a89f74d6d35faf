"""The lane of shared memory: frames go to and fro, who sleeps is rung for once, and channels leave each other alone."""

from __future__ import annotations

import pytest
import torch

from shmbroker.arena.spec import TensorSpec
from shmbroker.lane import python_ends, shm_lane
from shmbroker.lane.doorbell import SemaphoreBell
from shmbroker.lane.frames import FrameTemplate, taken_of
from shmbroker.lane.shm_lane import CLIENT_SLEEPING, ShmClientLane, ShmWorkerLane, clear_channel
from shmbroker.lane.submission_reader import SubmissionReader
from shmbroker.memory import layout
from shmbroker.memory.layout import ChannelHeader, SegmentHeader
from shmbroker.memory.segment import Segment
from shmbroker.settings.kinds import Doorbell, Lane
from tests.lane.bells import BellNames, RecordingBell
from tests.lane.empty_calls import GEOMETRY, client_sleeping, completion, id_of, submit

pytestmark = pytest.mark.usefixtures("flavour")


def test_a_call_goes_to_the_worker_and_its_completion_comes_back(segment: Segment) -> None:
    client, worker = ShmClientLane(segment, 1, RecordingBell()), ShmWorkerLane(segment, 1, RecordingBell())
    for call_id in range(1, 20):
        assert not worker.ready()
        assert submit(client, call_id)
        assert worker.ready()
        assert id_of(worker.take()) == call_id
        assert not client.ready()
        assert worker.complete(completion(call_id))
        assert client.ready()
        assert client.take() == completion(call_id)
        assert client.take() is None
    assert (client.depth, client.kind, client.doorbell) == (GEOMETRY.depth, Lane.SHM, Doorbell.SEM)


def test_channels_of_one_segment_do_not_touch_each_other(segment: Segment) -> None:
    lanes = [(ShmClientLane(segment, i, RecordingBell()), ShmWorkerLane(segment, i, RecordingBell())) for i in range(2)]
    for call_id in range(1, 10):
        for i, (client, _) in enumerate(lanes):
            assert submit(client, call_id * 10 + i)
        for i, (_, worker) in enumerate(lanes):
            assert id_of(worker.take()) == call_id * 10 + i
            assert worker.complete(completion(call_id * 10 + i))
        for i, (client, _) in enumerate(lanes):
            assert client.take() == completion(call_id * 10 + i)


def test_only_a_sleeper_is_rung_for(segment: Segment) -> None:
    """D1, the writer's part: one bell for each process, one word for each channel of a worker and one for the client."""
    clients_bell, workers_bell = RecordingBell(), RecordingBell()
    client, worker = ShmClientLane(segment, 1, workers_bell), ShmWorkerLane(segment, 1, clients_bell)
    submit(client, 1)
    worker.complete(completion(1))
    assert (workers_bell.rung, clients_bell.rung) == (0, 0)
    words, index = worker.sleeping
    words[index] = 1
    submit(client, 2)
    assert (workers_bell.rung, clients_bell.rung) == (1, 0)
    words[index] = 0
    words, index = client_sleeping(segment)
    words[index] = 1
    worker.complete(completion(2))
    assert (workers_bell.rung, clients_bell.rung) == (1, 1)


def test_a_sleeper_is_rung_for_once_also_when_it_is_nudged_before_the_frame_comes(segment: Segment) -> None:
    """D4."""
    bell = RecordingBell()
    client, worker = ShmClientLane(segment, 1, bell), ShmWorkerLane(segment, 1, RecordingBell())
    words, index = worker.sleeping
    client.nudge()
    assert bell.rung == 0, "nobody sleeps"
    words[index] = 1
    client.nudge()
    client.nudge()
    assert (bell.rung, words[index]) == (1, 0)
    submit(client, 1)
    assert bell.rung == 1
    words[index] = 1
    submit(client, 2)
    assert (bell.rung, words[index]) == (2, 0)


def test_a_frame_is_published_before_the_word_is_looked_at(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    """D1: publish, fence, look. (Compiled: the three lines of ``commit`` in ``_ends.c``.)"""
    order: list[str] = []
    client = ShmClientLane(segment, 0, RecordingBell())
    worker = ShmWorkerLane(segment, 0, RecordingBell())
    monkeypatch.setattr(python_ends, "fence", lambda: order.append(f"fence, published {worker.ready()}"))
    submit(client, 1)
    assert order == (["fence, published True"] if shm_lane.SubmissionSender is python_ends.SubmissionSender else [])


def test_the_words_to_sleep_under_are_those_of_the_layout(segment: Segment) -> None:
    worker = ShmWorkerLane(segment, 1, RecordingBell())
    area = GEOMETRY.channel_offset(1)
    assert layout.offset_of(SegmentHeader, "client_sleeping") == CLIENT_SLEEPING
    assert worker.sleeping[1] * 8 == area + layout.offset_of(ChannelHeader, "worker_sleeping")


def test_a_client_that_leaves_its_completions_lying_is_told_of_no_more(segment: Segment) -> None:
    client, worker = ShmClientLane(segment, 0, RecordingBell()), ShmWorkerLane(segment, 0, RecordingBell())
    assert [worker.complete(completion(i)) for i in range(4)] == [True, True, False, False]
    assert [client.take(), client.take(), client.take()] == [completion(0), completion(1), None]
    assert worker.complete(completion(9))


def test_a_full_submission_queue_has_nothing_to_claim(segment: Segment) -> None:
    client = ShmClientLane(segment, 0, RecordingBell())
    assert [submit(client, i) for i in range(4)] == [True, True, False, False]


def test_what_waits_is_counted_until_it_is_taken_and_not_in_a_closed_lane(segment: Segment) -> None:
    client, worker = ShmClientLane(segment, 0, RecordingBell()), ShmWorkerLane(segment, 0, RecordingBell())
    assert worker.waiting() == 0
    assert submit(client, 1)
    assert submit(client, 2)
    assert worker.waiting() == 2
    assert worker.take() is not None
    assert worker.waiting() == 1
    worker.close()
    assert worker.waiting() == 0, "who publishes the figures may look at any moment"


def test_completions_with_and_without_a_text_come_back_whole_and_in_order(segment: Segment) -> None:
    """A slot that held a long text before tells nothing of it."""
    client, worker = ShmClientLane(segment, 0, RecordingBell()), ShmWorkerLane(segment, 0, RecordingBell())
    for call_id in range(1, 20):
        text = b"x" * (0, layout.TEXT_BYTES, 0, 1, 0)[call_id % 5]
        assert worker.complete(completion(call_id, text))
        assert client.take() == completion(call_id, text)
    assert client.take() is None


def test_calls_of_several_kinds_in_one_queue_leave_nothing_of_each_other(segment: Segment) -> None:
    """Each slot remembers the template that was written into it last, and no other slot's."""
    client, worker = ShmClientLane(segment, 0, RecordingBell()), ShmWorkerLane(segment, 0, RecordingBell())
    reader = SubmissionReader(GEOMETRY.arena_offset, GEOMETRY.total_bytes)
    one = (TensorSpec((4,), torch.float32), (1,))
    templates = [
        FrameTemplate(1, [one] * 3, [one] * 2),
        FrameTemplate(2, [one], [], b"\x80"),
        FrameTemplate(3, [], []),
        FrameTemplate(4, [], [one]),
    ]
    first = GEOMETRY.arena_offset
    for call_id, index in enumerate([0, 1, 2, 3, 0, 0, 0, 2, 2, 1, 3, 0, 1, 1, 1, 0, 3, 3], start=1):
        template = templates[index]
        count = template.tensor_count
        offsets, generations = [first + 16 * (call_id + i) for i in range(count)], [100 * call_id + i for i in range(count)]
        assert client.submit(template, call_id, 0, call_id, offsets, generations)
        taken = worker.take()
        assert taken is not None
        assert taken == taken_of(taken[-1])
        call = reader.read(taken[-1])
        assert (call.call_id, call.op_id, call.submitted_ns) == (call_id, index + 1, call_id)
        assert (len(call.inputs), len(call.outputs), call.metadata) == [(3, 2, b""), (1, 0, b"\x80"), (0, 0, b""), (0, 1, b"")][index]
        assert [tensor.offset for tensor in (*call.inputs, *call.outputs)] == offsets
        assert call.generations == tuple(generations)


def test_a_completion_that_cannot_be_one_is_passed_over(segment: Segment) -> None:
    client, worker = ShmClientLane(segment, 0, RecordingBell()), ShmWorkerLane(segment, 0, RecordingBell())
    worker.complete(completion(1))
    worker.complete(completion(2))
    first = GEOMETRY.channel_offset(0) + GEOMETRY.completions_offset
    frame = layout.CompletionFrame.from_buffer(segment.map, first)
    frame.text_bytes = 0xFFFFFFFF
    del frame
    assert client.take() == completion(2)
    assert client.take() is None


def test_what_a_peer_writes_over_a_frame_that_was_taken_changes_nothing_of_it(segment: Segment) -> None:
    """F1: what is checked, and then run, is a private copy; so is what comes back."""
    client, worker = ShmClientLane(segment, 0, RecordingBell()), ShmWorkerLane(segment, 0, RecordingBell())
    area = slice(GEOMETRY.channel_offset(0) + GEOMETRY.submissions_offset, GEOMETRY.channel_offset(1))
    assert submit(client, 7)
    taken = worker.take()
    assert taken is not None
    before = bytes(taken[-1])
    segment.map[area] = b"\xff" * (area.stop - area.start)
    assert taken[-1] == before
    assert id_of(taken) == 7
    clear_channel(segment, 0)
    client, worker = ShmClientLane(segment, 0, RecordingBell()), ShmWorkerLane(segment, 0, RecordingBell())
    for call_id, text in ((1, b""), (2, b"text")):
        assert worker.complete(completion(call_id, text))
    first, second = client.take(), client.take()
    segment.map[area] = b"\xff" * (area.stop - area.start)
    assert (first, second) == (completion(1), completion(2, b"text"))


def test_a_cleared_channel_is_as_new_and_its_neighbour_untouched(segment: Segment) -> None:
    """L3: the client clears the area before it opens the channel."""
    other = ShmClientLane(segment, 0, RecordingBell())
    submit(other, 1)
    before = segment.map[: GEOMETRY.channel_offset(1)]
    client, worker = ShmClientLane(segment, 1, RecordingBell()), ShmWorkerLane(segment, 1, RecordingBell())
    submit(client, 1)
    worker.take()
    clear_channel(segment, 1)
    assert segment.map[: GEOMETRY.channel_offset(1)] == before
    assert not any(segment.map[GEOMETRY.channel_offset(1) : GEOMETRY.channel_offset(2)])
    client, worker = ShmClientLane(segment, 1, RecordingBell()), ShmWorkerLane(segment, 1, RecordingBell())
    assert worker.take() is None
    assert submit(client, 2)
    assert id_of(worker.take()) == 2


def test_closing_a_lane_twice_does_nothing(segment: Segment, bell_names: BellNames) -> None:
    for lane in (ShmClientLane(segment, 0, SemaphoreBell(bell_names[0])), ShmWorkerLane(segment, 0, SemaphoreBell(bell_names[1]))):
        lane.close()
        lane.close()
