"""A client that sends what no client may: the worker answers each frame once, with an error or a result, and nobody else notices."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

import shmbroker
from shmbroker.memory.layout import CompletionFrame, Space, Status, SubmissionFrame, TensorDescriptor
from shmbroker.memory.names import bell_name, bell_path
from tests.hostile.conftest import HonestClient, honest_client
from tests.hostile.mutation import Mutator
from tests.hostile.peer import Bytes, Footprint, HostileClient, field_bytes, lies_inside, repeating, valid_frame, words_of
from tests.processes import wait_until, worker_process

SEED = 20240607
FRAMES = int(os.environ.get("HOSTILE_FRAMES", "200000"))
"""Mutated frames in the large test; ``make hostile`` sends a million."""

PURE_FRAMES = 20_000
BATCH = 512
"""Half a queue: while the worker answers one half, the other is made and looked at."""

GROWTH_BYTES = 16 << 20
"""What a worker may hold more after all frames than after a tenth of them: its records of known frames and forms are of bounded length."""

FLOAT, LONG, BYTE = 1, 8, 9


def some_valid_frames(hostile: HostileClient) -> list[SubmissionFrame]:
    """Of ops with one and two inputs, with and without an out_spec of their own, contiguous and not, with arguments and empty tensors."""
    first = hostile.arena.start
    x, y = first, first + 0x8000
    scale, add = hostile.bind("scale", factor=2.0), hostile.bind("add")
    double, total, address = hostile.bind("double"), hostile.bind("total"), hostile.bind("address")
    table = hostile.bind("table", rows=3)
    contiguous, count_runs = hostile.bind("contiguous"), hostile.bind("count_runs")
    square: tuple[int, ...] = (8, 16)
    return [
        valid_frame(scale, [(x, FLOAT, square, (16, 1)), (y, FLOAT, square, (16, 1))], 1),
        valid_frame(add, [(x, 2, (4,), (1,)), (y, 2, (4,), (1,))], 1, msgspec.msgpack.encode({"term": 1.5})),
        valid_frame(double, [(x, FLOAT, square, (16, 1)), (y, FLOAT, square, (16, 1))], 1),
        valid_frame(double, [(x, 4, (3, 0, 5), (5, 5, 1)), (y, 4, (3, 0, 5), (5, 5, 1))], 1),
        valid_frame(total, [(x, 5, (100,), (7,)), (y, 2, (), ())], 1),
        valid_frame(address, [(x, BYTE, (2, 2, 2, 2, 2, 2, 2, 2), (128, 64, 32, 16, 8, 4, 2, 1)), (y, LONG, (1,), (1,))], 1),
        valid_frame(table, [(x, FLOAT, (5,), (0,)), (y, FLOAT, (3, 5), (5, 1))], 1),
        valid_frame(contiguous, [(x, FLOAT, square, (1, 8)), (y, FLOAT, square, (16, 1))], 1),
        valid_frame(count_runs, [(x, FLOAT, (4,), (1,)), (y, FLOAT, (4,), (1,))], 1, msgspec.msgpack.encode({"step": 2})),
        valid_frame(add, [(x, FLOAT, (4,), (1,)), (y, FLOAT, (4,), (1,))], 1, b"\xc1\x00"),
    ]


class Judge:
    """Looks at every answer: to which call, of which status, and, where the op was run, on what."""

    def __init__(self, hostile: HostileClient) -> None:
        self.arena = hostile.arena
        self.statuses: Counter[int] = Counter()

    def judge(self, frames: Bytes, answers: Bytes) -> None:
        assert np.array_equal(words_of(answers)[:, 1], words_of(frames)[:, 1]), "answered in order, each call by its own id"
        statuses = answers[:, field_bytes(CompletionFrame, "status")].copy().view(np.uint32)[:, 0]
        texts = answers[:, field_bytes(CompletionFrame, "text_bytes")].copy().view(np.uint32)[:, 0]
        self.statuses.update(statuses.tolist())
        assert set(statuses.tolist()) <= {Status.OK, Status.OP_ERROR, Status.BAD_FRAME, Status.EXPIRED}
        assert np.array_equal(texts > 0, (statuses == Status.OP_ERROR) | (statuses == Status.BAD_FRAME)), "an error says what is wrong"
        body = CompletionFrame.body.offset
        for answer, length in zip(answers[texts > 0], texts[texts > 0].tolist(), strict=True):
            assert length <= CompletionFrame.body.size
            answer[body : body + length].tobytes().decode()
        for frame in frames[statuses == Status.OK]:
            call = SubmissionFrame.from_buffer_copy(frame)
            tensors = call.tensors[: call.input_count + call.output_count]
            # A mutated space may make a call that keeps its results, which is a client's right: they lie in no memory of anybody's.
            here = [place for place in tensors if place.space != Space.KEPT]
            assert all(place.space == Space.SEGMENT for place in here), "run on a tensor of a device that there is not"
            assert all(lies_inside(place, self.arena) for place in here), "run on a tensor outside the arena"


@contextlib.contextmanager
def nothing_else_touched(hostile: HostileClient) -> Iterator[None]:
    """Of the segment, the worker writes the completions and words of its channel, and outputs in the arena: all else is as it was."""
    raw = hostile.raw
    start = raw.bytes.size - len(hostile.arena)
    assert start == hostile.arena.start
    geometry = hostile.client.segment.geometry
    untouched = raw.bytes[geometry.channels_offset : geometry.channels_offset + 2 * geometry.channel_bytes]
    untouched[:] = np.random.default_rng(1).integers(256, size=untouched.size, dtype=np.uint8)  # two areas that are not open
    before, header = untouched.copy(), raw.bytes[:256].copy()
    yield
    assert np.array_equal(untouched, before)
    assert np.array_equal(raw.bytes[:256], header)


def send_mutated(hostile: HostileClient, worker: Footprint, count: int, seed: int = SEED) -> Counter[int]:
    """So many mutated frames, each answered once; the worker must not grow after the first tenth."""
    mutator = Mutator(some_valid_frames(hostile), hostile.arena, seed)
    judge = Judge(hostile)
    answered = 0
    grown_from = None
    sent = mutator.batch(BATCH)
    hostile.publish(sent)
    while True:
        next_batch = mutator.batch(BATCH)
        hostile.publish(next_batch)
        answers = hostile.answers_of(hostile.position - 2 * BATCH, BATCH)
        judge.judge(sent, answers)
        sent = next_batch
        answered += BATCH
        if grown_from is None and answered >= count // 10:
            grown_from = worker.private_bytes(), worker.files()
        if answered >= count:
            break
    judge.judge(sent, hostile.answers_of(hostile.position - BATCH, BATCH))
    assert grown_from is not None
    hostile.come_round()
    assert int(words_of(hostile.raw.completions)[hostile.position % hostile.depth, 0]) != hostile.position + 1, "no answer too many"
    assert worker.alive()
    assert worker.private_bytes() - grown_from[0] < GROWTH_BYTES
    assert worker.files() <= grown_from[1]
    return judge.statuses


@pytest.fixture
def hostile(client: shmbroker.Client, honest: HonestClient) -> HostileClient:
    return HostileClient(client)


def test_hundreds_of_thousands_of_mutated_frames_are_each_answered_once_and_nobody_else_notices(
    hostile: HostileClient, worker: Footprint, honest: HonestClient
) -> None:
    with nothing_else_touched(hostile):
        statuses = send_mutated(hostile, worker, FRAMES)
    assert {Status.OK, Status.BAD_FRAME, Status.OP_ERROR, Status.EXPIRED} == set(statuses), "all kinds of answers were met"
    print(f"{sum(statuses.values())} frames: " + ", ".join(f"{Status(status).name} {count}" for status, count in statuses.items()))
    assert honest.check() > 10


def test_a_worker_without_compiled_parts_stands_the_same(broker: shmbroker.LocalBroker, client: shmbroker.Client) -> None:
    with worker_process("pure", SHMBROKER_PURE_PYTHON="1") as process, honest_client("pure") as honest:
        statuses = send_mutated(HostileClient(client, "pure"), Footprint(process.pid), PURE_FRAMES)
        assert statuses[Status.OK] > 0
        assert statuses[Status.BAD_FRAME] > 0
        honest.check()


def test_an_op_is_run_only_on_tensors_inside_the_arena(hostile: HostileClient) -> None:
    """By the worker's own word: the op tells the address that it was given."""
    address = hostile.bind("address")
    source, told = hostile.arena.start, hostile.arena.start + len(hostile.arena) // 2
    form = (BYTE, (4, 4), (4, 1))
    known = valid_frame(address, [(source, *form), (told, LONG, (1,), (1,))], 1)
    for _ in range(2):  # an op is tried out on copies first, which lie elsewhere
        hostile.exchange(np.frombuffer(bytes(known), dtype=np.uint8)[None])
    results = hostile.raw.bytes[hostile.arena.start :].view(np.int64)
    start_of_mapping = int(results[(told - hostile.arena.start) // 8]) - source
    random = np.random.default_rng(SEED)
    run = 0
    for _ in range(20):
        frames: Bytes = np.repeat(np.frombuffer(bytes(known), dtype=np.uint8)[None], BATCH, axis=0)
        calls = [SubmissionFrame.from_buffer(row.data) for row in frames]
        for index, call in enumerate(calls):
            place: TensorDescriptor = call.tensors[0]
            place.offset = int(random.integers(hostile.arena.start - 4096, hostile.arena.stop + 64))
            place.shape[:2] = random.integers(0, 1 << random.integers(1, 8), size=2).tolist()
            place.strides[:2] = random.integers(0, 1 << random.integers(1, 12), size=2).tolist()
            place.nbytes = place.shape[0] * place.shape[1]
            call.tensors[1].offset = told + 8 * index
        answers = hostile.exchange(frames)
        statuses = answers[:, field_bytes(CompletionFrame, "status")].copy().view(np.uint32)[:, 0]
        for index in np.flatnonzero(statuses == Status.OK).tolist():
            place = calls[index].tensors[0]
            seen = int(results[(told - hostile.arena.start) // 8 + index]) - start_of_mapping
            assert lies_inside(place, hostile.arena)
            assert seen == place.offset or place.nbytes == 0, "torch tells no address of an empty tensor"
            run += 1
        del calls
    assert run > 1000


def test_one_element_seen_a_quintillion_times_does_not_keep_the_worker_busy(hostile: HostileClient) -> None:
    """Strides of 0 reach nowhere, however many elements there are."""
    total = hostile.bind("total")
    x, y = hostile.arena.start, hostile.arena.start + 256
    shapes = [(1 << 58,), (1 << 40,), (1 << 20, 1 << 20), (len(hostile.arena),)]
    frames = [valid_frame(total, [(x, 2, shape, (0,) * len(shape)), (y, 2, (), ())], 1) for shape in shapes]
    answers = hostile.exchange(np.stack([np.frombuffer(bytes(frame), dtype=np.uint8) for frame in frames]))
    assert [CompletionFrame.from_buffer_copy(answer).status for answer in answers] == [Status.BAD_FRAME] * len(shapes)


def test_frames_that_change_while_they_are_read_are_answered_once_each(hostile: HostileClient, worker: Footprint) -> None:
    """All but sequence number and call id: another thread writes other frames over them all the while."""
    mutator = Mutator(some_valid_frames(hostile), hostile.arena, SEED, clean=16)
    noise = [mutator.batch(hostile.depth)[:, 16:] for _ in range(8)]
    turns = itertools.count()
    statuses: Counter[int] = Counter()
    with nothing_else_touched(hostile), repeating(lambda: np.copyto(hostile.raw.submissions[:, 16:], noise[next(turns) % len(noise)])):
        for _ in range(40):
            frames = mutator.batch(BATCH)
            answers = hostile.exchange(frames)
            assert np.array_equal(words_of(answers)[:, 1], words_of(frames)[:, 1])
            statuses.update(answers[:, field_bytes(CompletionFrame, "status")].copy().view(np.uint32)[:, 0].tolist())
    assert set(statuses) <= {Status.OK, Status.OP_ERROR, Status.BAD_FRAME, Status.EXPIRED}
    assert statuses[Status.OK] > 0
    assert next(turns) > 40, "they were changed meanwhile"


def test_a_frame_is_taken_at_its_own_position_only(hostile: HostileClient) -> None:
    """L2: whatever else a sequence number says, there is no frame."""
    frame = np.frombuffer(bytes(some_valid_frames(hostile)[0]), dtype=np.uint8)
    hostile.exchange(np.repeat(frame[None], 10, axis=0))
    position, depth = hostile.position, hostile.depth
    slot = position % depth
    sequences = words_of(hostile.raw.submissions)[:, 0]
    hostile.raw.submissions[slot, 8:] = frame[8:]
    edges = [0, 1, position - 1, position, position + 2, position + depth, position + 1 + depth, 1 << 63, (1 << 64) - 1]
    random = np.random.default_rng(SEED).integers(1 << 64, size=20, dtype=np.uint64).tolist()
    for sequence in [*edges, *random]:
        sequences[slot] = sequence
        hostile.ring()
        hostile.come_round()
        assert hostile.raw.header.submissions_taken == position, f"sequence {sequence}"


def test_frames_behind_a_gap_wait_until_it_is_filled_and_are_answered_in_order(hostile: HostileClient) -> None:
    frames = np.repeat(np.frombuffer(bytes(some_valid_frames(hostile)[0]), dtype=np.uint8)[None], 8, axis=0)
    words_of(frames)[:, 1] = np.arange(100, 108)
    position = hostile.position
    at = (position + np.arange(8)) % hostile.depth
    hostile.raw.submissions[at, 8:] = frames[:, 8:]
    sequences = words_of(hostile.raw.submissions)[:, 0]
    sequences[at[1:]] = np.arange(position + 2, position + 9)
    hostile.ring()
    hostile.come_round()
    assert hostile.raw.header.submissions_taken == position
    sequences[at[0]] = position + 1
    hostile.position += 8
    hostile.ring()
    assert words_of(hostile.answers_of(position, 8))[:, 1].tolist() == list(range(100, 108))


def test_a_frame_that_was_taken_cannot_be_replayed_and_a_duplicate_is_a_call_of_its_own(hostile: HostileClient) -> None:
    frame = np.frombuffer(bytes(some_valid_frames(hostile)[0]), dtype=np.uint8)[None]
    hostile.exchange(frame)
    taken = (hostile.position - 1) % hostile.depth
    hostile.raw.submissions[taken, 8:] = frame[0, 8:]
    words_of(hostile.raw.submissions)[taken, 0] = hostile.position
    hostile.ring()
    hostile.come_round()
    assert hostile.raw.header.submissions_taken == hostile.position
    answers = hostile.exchange(np.repeat(frame, 3, axis=0))
    assert len(set(words_of(answers)[:, 1].tolist())) == 1
    assert [CompletionFrame.from_buffer_copy(answer).status for answer in answers] == [Status.OK] * 3


def test_words_of_nonsense_harm_only_who_wrote_them(hostile: HostileClient, honest: HonestClient) -> None:
    """Words that the worker only writes, and words that it reads without believing them."""
    mutator = Mutator(some_valid_frames(hostile), hostile.arena, SEED)
    header, segment_header = hostile.raw.header, hostile.raw.segment_header
    random = np.random.default_rng(SEED)

    def spoil() -> None:
        for value in random.integers(1 << 64, size=64, dtype=np.uint64).tolist():
            header.submissions_taken = value
            header.completions_taken = (1 << 64) - 1 - (value >> 32)
            header.worker_sleeping = value
            segment_header.client_sleeping = value

    judge = Judge(hostile)
    with repeating(spoil):
        for _ in range(20):
            frames = mutator.batch(BATCH)
            hostile.publish(frames)
            judge.judge(frames, hostile.answers_of(hostile.position - BATCH, BATCH))
    assert honest.check() > 0


def test_a_bell_that_can_be_rung_no_more_harms_nobody(hostile: HostileClient) -> None:
    """Its count as high as it goes, every further ring is an error."""
    path = bell_path(bell_name(hostile.client.instance, hostile.client.id))
    with open(path, "r+b") as bell:
        bell.write((0x7FFFFFFF).to_bytes(4, "little"))
    frame = np.frombuffer(bytes(some_valid_frames(hostile)[0]), dtype=np.uint8)[None]
    for _ in range(100):
        hostile.raw.segment_header.client_sleeping = 1
        hostile.exchange(frame)
    assert hostile.raw.segment_header.client_sleeping == 0, "it was rung for"


def test_who_leaves_its_completions_lying_loses_its_channel_and_no_other(
    hostile: HostileClient, worker: Footprint, honest: HonestClient
) -> None:
    files = worker.files()
    frames = np.repeat(np.frombuffer(bytes(some_valid_frames(hostile)[0]), dtype=np.uint8)[None], hostile.depth, axis=0)
    hostile.publish(frames)
    hostile.raw.header.completions_taken = 0
    wait_until(lambda: hostile.raw.header.submissions_taken == hostile.position)
    hostile.publish(frames[:1])  # the worker has no room for its answer
    wait_until(lambda: worker.files() < files)
    with pytest.raises(shmbroker.ChannelError, match="is not open on this worker"):
        hostile.bind("double")
    hostile.come_round()
    hostile.publish(frames[:4])
    hostile.come_round()
    assert hostile.raw.header.submissions_taken == hostile.depth + 1, "nobody looks at its queues any more"
    assert hostile.client.channel("test").bind("double")(hostile.client.empty((2,)).fill_(1)).tolist() == [2.0, 2.0]


def test_a_worker_stops_when_it_is_told_to_though_a_client_never_stops_sending(
    broker: shmbroker.LocalBroker, client: shmbroker.Client
) -> None:
    with worker_process("stopped") as process:
        hostile = HostileClient(client, "stopped")
        frames = np.repeat(np.frombuffer(bytes(some_valid_frames(hostile)[0]), dtype=np.uint8)[None], hostile.depth, axis=0)

        def flood() -> None:
            """Every slot as the worker will next look for it, and all its answers taken."""
            taken = hostile.raw.header.submissions_taken
            hostile.raw.header.completions_taken = (1 << 64) - 1
            at = (taken + np.arange(hostile.depth)) % hostile.depth
            words_of(hostile.raw.submissions)[at, 0] = taken + 1 + np.arange(hostile.depth, dtype=np.uint64)

        hostile.raw.submissions[:, 8:] = frames[:, 8:]
        with repeating(flood):
            wait_until(lambda: hostile.raw.header.submissions_taken > 10 * hostile.depth)
            process.terminate()
            assert process.wait(300) == 0
