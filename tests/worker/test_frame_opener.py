"""Opening frames: what is remembered of earlier ones changes nothing of what becomes of one."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from shmbroker.arena.spec import TensorSpec
from shmbroker.lane.frames import constant_part
from shmbroker.lane.submission_reader import SubmissionReader
from shmbroker.memory import layout
from shmbroker.worker.frame_opener import FrameOpener, Rejected
from shmbroker.worker.kept_tensors import KeptTensors
from shmbroker.worker.mapped_segment import MappedSegment
from shmbroker.worker.ops import OpDefinition
from shmbroker.worker.prepared_call import PreparedCall
from tests.hostile.mutation import Mutator
from tests.hostile.peer import valid_frame
from tests.worker.conftest import BareClient

SEED = 20261127
FRAMES = 20_000
OP, OTHER = 1, 2
KIND = ((torch.float32, 2),)


def _double(x: torch.Tensor, *, out: torch.Tensor) -> None:
    torch.mul(x, 2, out=out)


def _same(x: TensorSpec) -> TensorSpec:
    return x


@pytest.fixture
def new_opener(client: BareClient) -> Callable[[], FrameOpener]:
    """Makes openers of the same segment and ops, which remember nothing yet."""
    ops = {number: OpDefinition(name, _double, _same).bind({}, {}) for number, name in ((OP, "double"), (OTHER, "other"))}
    for op in ops.values():
        op.prove(KIND)
    return lambda: FrameOpener(MappedSegment(client.segment), ops, KeptTensors(0))


def frame_at(client: BareClient, first: int, second: int, op: int = OP, shape: tuple[int, int] = (4, 4)) -> bytes:
    """A call with its input and output at these offsets in the arena."""
    start = client.segment.geometry.arena_offset
    strides = (shape[1], 1)
    return bytes(valid_frame(op, [(start + first, 1, shape, strides), (start + second, 1, shape, strides)], 1))


def opened(opener: FrameOpener, frame: bytes) -> PreparedCall | str:
    """The call, or why it is none; also what the out_spec raises, of inputs of which it knows nothing."""
    try:
        return opener.open(frame, constant_part(frame))
    except (Rejected, TypeError) as error:
        return str(error)


def told(outcome: PreparedCall | str) -> object:
    """What can be compared of an outcome: each tensor's place, form and dtype."""
    if isinstance(outcome, str):
        return outcome
    tensors = (*outcome.inputs, *outcome.outputs)
    places = [(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors if tensor.numel()]
    return outcome.op.name, len(outcome.inputs), places, outcome.single, outcome.repeatable


def test_a_frame_that_differs_in_its_places_alone_is_not_read_anew(
    client: BareClient, new_opener: Callable[[], FrameOpener], monkeypatch: pytest.MonkeyPatch
) -> None:
    opener = new_opener()
    first = opened(opener, frame_at(client, 0, 256))
    monkeypatch.delattr(SubmissionReader, "read")
    second = opened(opener, frame_at(client, 512, 64))
    assert isinstance(first, PreparedCall)
    assert isinstance(second, PreparedCall)
    second.inputs[0].fill_(3.0)
    second.run()
    assert second.outputs[0].eq(6.0).all()
    start = client.segment.geometry.arena_offset
    assert (second.inputs[0].data_ptr() - first.inputs[0].data_ptr(), second.outputs[0].data_ptr() - first.outputs[0].data_ptr()) == (
        512,
        -192,
    )
    assert torch.frombuffer(client.segment.map, dtype=torch.float32, count=16, offset=start + 64).eq(6.0).all()


def test_its_places_are_checked_as_those_of_any(client: BareClient, new_opener: Callable[[], FrameOpener]) -> None:
    opener, geometry = new_opener(), client.segment.geometry
    assert isinstance(opened(opener, frame_at(client, 0, 256)), PreparedCall)
    for first, second, said in (
        (-64, 0, "tensor 0 .* outside the arena"),
        (0, geometry.arena_bytes - 32, "tensor 1 .* outside the arena"),
        (0, 2, "tensor 1 .* is not aligned"),
    ):
        outcome = opened(opener, frame_at(client, first, second))
        assert isinstance(outcome, str)
        assert re.search(said, outcome)
    assert isinstance(opened(opener, frame_at(client, 0, geometry.arena_bytes - 64)), PreparedCall)


def test_other_ops_and_shapes_are_other_kinds(client: BareClient, new_opener: Callable[[], FrameOpener]) -> None:
    opener = new_opener()
    for op, shape in ((OP, (4, 4)), (OTHER, (4, 4)), (OP, (2, 8)), (OTHER, (2, 8))):
        for first in (0, 1024):
            outcome = opened(opener, frame_at(client, first, 2048, op, shape))
            assert isinstance(outcome, PreparedCall)
            assert (outcome.op.name, tuple(outcome.inputs[0].shape)) == ("double" if op == OP else "other", shape)


def test_a_kind_that_was_not_tried_out_is_not_remembered(client: BareClient) -> None:
    op = OpDefinition("double", _double, _same).bind({}, {})
    opener = FrameOpener(MappedSegment(client.segment), {OP: op}, KeptTensors(0))
    for first in (0, 512):
        call = opened(opener, frame_at(client, first, 1024))
        assert isinstance(call, PreparedCall)
        assert call.tried_as == KIND
        assert not call.repeatable
        call.inputs[0].fill_(1.0)
        assert not any(client.segment.map[client.segment.geometry.arena_offset :]), "a copy"


def test_what_becomes_of_any_frame_is_what_would_without_those_before(client: BareClient, new_opener: Callable[[], FrameOpener]) -> None:
    """Frames with any field mutated, by an opener that has met the valid ones, against one that has met nothing."""
    geometry = client.segment.geometry
    arena = range(geometry.arena_offset, geometry.arena_offset + geometry.arena_bytes)
    valid = [
        layout.SubmissionFrame.from_buffer_copy(frame_at(client, first, second, op, shape))
        for first, second in ((0, 256), (512, 64))
        for op in (OP, OTHER)
        for shape in ((4, 4), (2, 8))
    ]
    opener = new_opener()
    accepted = 0
    for number, frame in enumerate(Mutator(valid, arena, SEED).batch(FRAMES)):
        if number % 1000 == 0:
            fresh = new_opener()
            for one in valid:
                assert isinstance(opened(opener, bytes(one)), PreparedCall)
        whole = frame.tobytes()
        fresh.forget()
        outcome = opened(opener, whole)
        assert told(outcome) == told(opened(fresh, whole))
        accepted += not isinstance(outcome, str)
    assert FRAMES // 20 < accepted < FRAMES
