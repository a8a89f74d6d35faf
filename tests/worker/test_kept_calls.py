"""Calls that name kept tensors, as frames are checked: what is kept when, what is copied where, and what is refused."""

from __future__ import annotations

import pytest
import torch

from shmbroker.arena.spec import TensorSpec, contiguous_strides
from shmbroker.errors import BadFrame
from shmbroker.lane.frame_layout import KEPT_OP
from shmbroker.lane.submission_reader import Descriptor, Form, Submission
from shmbroker.memory import layout
from shmbroker.memory.layout import Space, Status
from shmbroker.worker.kept_calls import about_kept, input_of, with_kept
from shmbroker.worker.kept_tensors import KeptTensors
from shmbroker.worker.mapped_segment import MappedSegment
from shmbroker.worker.ops import OpDefinition
from tests.worker.conftest import GEOMETRY, BareClient, Serving, double

LIMIT = 64
DOUBLE = OpDefinition("double", double, lambda x: x).bind({}, {})


@pytest.fixture
def mapped(client: BareClient) -> MappedSegment:
    return MappedSegment(client.segment)


@pytest.fixture
def kept() -> KeptTensors:
    return KeptTensors(LIMIT)


def place(offset: int, count: int = 4, space: Space = Space.SEGMENT) -> Descriptor:
    """``offset``: the number, of what is kept."""
    spec = TensorSpec((count,), torch.float32)
    form = Form(spec, contiguous_strides(spec.shape), spec.nbytes, spec.nbytes, space)
    return Descriptor(offset, form)


def call(inputs: list[Descriptor], outputs: list[Descriptor]) -> Submission:
    return Submission(1, 0, 0, (), 0, tuple(inputs), tuple(outputs), b"")


HERE = place(GEOMETRY.arena_offset)


def kept_at(number: int, count: int = 4) -> Descriptor:
    return place(number, count, Space.KEPT)


def test_a_result_is_kept_once_the_op_has_returned_and_is_an_input_afterwards(kept: KeptTensors, mapped: MappedSegment) -> None:
    mapped.view(HERE).fill_(3.0)
    prepared = with_kept(kept, mapped, call([HERE], [kept_at(7)]), DOUBLE, {}, single=True)
    assert len(kept) == 0
    assert not prepared.repeatable
    prepared.run()
    assert input_of(kept, mapped, kept_at(7)).tolist() == [6.0] * 4
    with_kept(kept, mapped, call([kept_at(7)], [HERE]), DOUBLE, {}, single=True).run()
    assert mapped.view(HERE).tolist() == [12.0] * 4


def test_a_call_that_fails_keeps_nothing(kept: KeptTensors, mapped: MappedSegment) -> None:
    def fail(x: torch.Tensor, *, out: torch.Tensor) -> None:
        raise ValueError("no such luck")

    op = OpDefinition("fail", fail, lambda x: x).bind({}, {})
    with pytest.raises(ValueError, match="no such luck"):
        with_kept(kept, mapped, call([HERE], [kept_at(7)]), op, {}, single=True).run()
    assert len(kept) == 0


def test_kept_tensors_are_copied_to_the_outputs_of_their_places_and_let_go_without_any(kept: KeptTensors, mapped: MappedSegment) -> None:
    kept.add({1: torch.full((4,), 1.0), 2: torch.full((4,), 2.0)})
    there = place(GEOMETRY.arena_offset + 256)
    about_kept(kept, mapped, call([kept_at(2), kept_at(1)], [HERE, there])).run()
    assert (mapped.view(HERE)[0], mapped.view(there)[0]) == (2, 1)
    about_kept(kept, mapped, call([kept_at(2), kept_at(99)], [])).run()
    assert kept.nbytes == 16
    with pytest.raises(BadFrame, match="no kept tensor 2 is on this channel"):
        about_kept(kept, mapped, call([kept_at(2)], [HERE]))


@pytest.mark.parametrize(
    ("inputs", "outputs", "complaint"),
    [
        ([HERE], [HERE], "copies from kept tensors"),
        ([kept_at(1)], [kept_at(2)], "copies from kept tensors"),
        ([kept_at(1)], [place(GEOMETRY.arena_offset, 3)], "to an output of its form"),
        ([kept_at(1, 3)], [place(GEOMETRY.arena_offset, 3)], "is float32"),
    ],
)
def test_whatever_else_is_asked_of_op_id_0_is_refused(
    kept: KeptTensors, mapped: MappedSegment, inputs: list[Descriptor], outputs: list[Descriptor], complaint: str
) -> None:
    kept.add({1: torch.zeros(4)})
    with pytest.raises(BadFrame, match=complaint):
        about_kept(kept, mapped, call(inputs, outputs))


def test_more_than_may_be_kept_is_refused_before_anything_is_run(kept: KeptTensors, mapped: MappedSegment) -> None:
    with pytest.raises(BadFrame, match="this worker keeps at most 64"):
        with_kept(kept, mapped, call([place(GEOMETRY.arena_offset, 17)], [kept_at(1, 17)]), DOUBLE, {}, single=True)
    with pytest.raises(BadFrame, match="kept tensor 1 is on this channel already"):
        with_kept(kept, mapped, call([HERE], [kept_at(1), kept_at(1)]), DOUBLE, {}, single=True)


# --- op id 0, as frames --------------------------------------------------------------------------------------------------------------------


def frame_of(inputs: list[Descriptor], outputs: list[Descriptor]) -> bytes:
    """Written by the published structures alone."""
    frame = layout.SubmissionFrame()
    frame.call_id, frame.op_id = 9, KEPT_OP
    frame.input_count, frame.output_count = len(inputs), len(outputs)
    for tensor, told in zip(frame.tensors, [*inputs, *outputs], strict=False):
        spec = told.form.spec
        tensor.offset, tensor.nbytes, tensor.dtype, tensor.ndim, tensor.space = (
            told.offset,
            spec.nbytes,
            1,
            len(spec.shape),
            told.form.space,
        )
        tensor.shape[: len(spec.shape)], tensor.strides[: len(spec.shape)] = spec.shape, told.form.strides
    return bytes(frame)


@pytest.mark.parametrize(
    ("inputs", "outputs", "status", "left"),
    [
        ([kept_at(1)], [HERE], Status.OK, {1, 2}),
        ([kept_at(2), kept_at(1)], [HERE, place(GEOMETRY.arena_offset + 256)], Status.OK, {1, 2}),
        ([kept_at(1)], [], Status.OK, {2}),
        ([kept_at(1), kept_at(2), kept_at(1)], [], Status.OK, set()),
        ([kept_at(99), kept_at(2)], [], Status.OK, {1}),
        ([kept_at(1, 0)], [], Status.OK, {2}),
        ([], [], Status.OK, {1, 2}),
        ([kept_at(1), HERE], [], Status.BAD_FRAME, {1, 2}),
        ([kept_at(1)], [kept_at(3)], Status.BAD_FRAME, {1, 2}),
        ([kept_at(1)], [HERE, HERE], Status.BAD_FRAME, {1, 2}),
        ([kept_at(99)], [HERE], Status.BAD_FRAME, {1, 2}),
        ([kept_at(1, 3)], [place(GEOMETRY.arena_offset, 3)], Status.BAD_FRAME, {1, 2}),
    ],
)
def test_a_frame_with_op_id_0_does_what_the_document_says(
    serving: Serving, client: BareClient, inputs: list[Descriptor], outputs: list[Descriptor], status: Status, left: set[int]
) -> None:
    channel, _ = serving.open_shm(client)
    channel.kept.add({1: torch.full((4,), 1.0), 2: torch.full((4,), 2.0)})
    assert channel.run_frame(frame_of(inputs, outputs), True)[1] == Status.DRAINING
    completion = channel.run_frame(frame_of(inputs, outputs), False)
    assert isinstance(completion, tuple)
    assert completion[:2] == (9, status), completion
    there = [number for number in (1, 2) if channel.run_frame(frame_of([kept_at(number)], [HERE]), False)[1] == Status.OK]
    assert set(there) == left
    if status == Status.OK and outputs:
        channel.run_frame(frame_of(inputs, outputs), False)
        assert [float(channel.mapped.view(to)[0]) for to in outputs] == [float(told.offset) for told in inputs]
