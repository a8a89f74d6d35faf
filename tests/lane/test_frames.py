"""Frames: what is written is read back, the places are those of the layout, and nothing that a peer may write is believed unchecked."""

from __future__ import annotations

import ctypes
import itertools
import math
import random
import struct
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shmbroker.arena.spec import CODE_OF, DTYPE_OF, TensorSpec, contiguous_strides, extent_elements, spec_of
from shmbroker.errors import BadFrame, BadInput
from shmbroker.lane import frames
from shmbroker.lane.completion_frames import Completion, pack_text, read_completion, read_plain_completion, write_completion
from shmbroker.lane.frame_layout import COMPLETION_HEADER, DESCRIPTOR, HEAD_BYTES, SUBMISSION_HEADER
from shmbroker.lane.frames import FrameTemplate, Slot, constant_part, private_slot, taken_of
from shmbroker.lane.submission_reader import Submission, SubmissionReader
from shmbroker.memory import layout
from shmbroker.memory.layout import CompletionFrame, SubmissionFrame, TensorDescriptor

FIRST = 3 * layout.PAGE
END = FIRST + (1 << 20)
"""The arena of the readers in these tests, bytes from the start of a segment."""

INT64_MAX = (1 << 63) - 1
UINT64_MAX = (1 << 64) - 1

UINT32_MAX = (1 << 32) - 1

OP_AT, TENSORS_AT = 80, 96
"""Where the constant part of a frame begins, and where its tensors do: golden, as in the tests of the layout."""

Tensor = tuple[TensorSpec, tuple[int, ...]]
"""Spec and strides."""

dtypes = st.sampled_from(sorted(CODE_OF, key=str))


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """0 to 8 dimensions, contiguous or with strides of any kind that torch has (also 0, also overlapping), within the arena."""
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=layout.MAX_DIMS)))
    spec = TensorSpec(shape, draw(dtypes))
    if draw(st.booleans()):
        return spec, contiguous_strides(shape)
    return spec, tuple(draw(st.integers(0, 500)) for _ in shape)


@st.composite
def placed(draw: st.DrawFn, tensor: Tensor) -> tuple[int, int]:
    """An offset and a generation for a tensor, anywhere in the arena."""
    spec, strides = tensor
    itemsize = spec.dtype.itemsize
    last = (END - _reach(spec.shape, strides) * itemsize) // itemsize
    return draw(st.integers(-(-FIRST // itemsize), last)) * itemsize, draw(st.integers(0, UINT32_MAX))


def _reach(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last, found another way than the package does."""
    if 0 in shape:
        return 0
    return 1 + sum(stride * (size - 1) for size, stride in zip(shape, strides, strict=True))


def _reader() -> SubmissionReader:
    return SubmissionReader(FIRST, END)


def _valid() -> SubmissionFrame:
    """A frame of two inputs and an output that every reader here accepts; tests spoil one field of it."""
    specs = [TensorSpec((2, 3), torch.float32), TensorSpec((4,), torch.int64), TensorSpec((), torch.float16)]
    template = FrameTemplate(7, [(spec, contiguous_strides(spec.shape)) for spec in specs[:2]], [(specs[2], ())], b"\x80")
    slot = private_slot(layout.SUBMISSION_SLOT_BYTES)
    template.write(
        slot, call_id=5, deadline_ns=0, submitted_ns=1, offsets=[FIRST, FIRST + 256, FIRST + 512], generations=[1, 2, UINT32_MAX]
    )
    return SubmissionFrame.from_buffer_copy(slot.bytes)


def _split(places: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Offsets and generations apart, as a template takes them."""
    return [offset for offset, _ in places], [generation for _, generation in places]


def _check_all_inside(call: Submission) -> None:
    """F2, looked at from outside: whatever a reader lets through lies in the arena, and its bytes can be counted."""
    assert len(call.inputs) + len(call.outputs) <= layout.MAX_TENSORS
    assert len(call.metadata) <= layout.METADATA_BYTES
    for descriptor in (*call.inputs, *call.outputs):
        form = descriptor.form
        shape, itemsize = form.spec.shape, form.dtype.itemsize
        assert len(shape) == len(form.strides) <= layout.MAX_DIMS
        assert min((*shape, *form.strides), default=0) >= 0
        assert descriptor.offset >= FIRST
        assert descriptor.offset + _reach(shape, form.strides) * itemsize <= END
        assert descriptor.offset % itemsize == 0
        assert form.extent_bytes == _reach(shape, form.strides) * itemsize
        assert form.nbytes == math.prod(shape) * itemsize <= INT64_MAX
    assert len(call.generations) == len(call.inputs) + len(call.outputs)


# --- round trip ------------------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_what_a_template_writes_a_reader_reads(data: st.DataObject) -> None:
    inputs = data.draw(st.lists(tensors(), max_size=6))
    outputs = data.draw(st.lists(tensors(), max_size=layout.MAX_TENSORS - len(inputs)))
    places = [data.draw(placed(tensor)) for tensor in (*inputs, *outputs)]
    metadata = data.draw(st.binary(max_size=layout.METADATA_BYTES))
    op_id = data.draw(st.integers(0, (1 << 32) - 1))
    call_id, deadline_ns, submitted_ns = (data.draw(st.integers(0, UINT64_MAX)) for _ in range(3))
    template = FrameTemplate(op_id, inputs, outputs, metadata)
    slot = private_slot(layout.SUBMISSION_SLOT_BYTES)
    slot.bytes[:] = data.draw(st.sampled_from([b"\0", b"\xff"])) * len(slot.bytes)
    sequence = slot.words[frames.SEQUENCE_WORD]
    template.write(slot, call_id, deadline_ns, submitted_ns, *_split(places))
    assert slot.words[frames.SEQUENCE_WORD] == sequence, "L2: that is for the queue to write, last"

    # The zmq lane sends only what is used, the shm lane's slots come whole.
    for frame in (bytes(slot.bytes[: template.nbytes]), bytes(slot.bytes)):
        call = _reader().read(frame)
        assert (call.call_id, call.op_id, call.deadline_ns, call.submitted_ns) == (call_id, op_id, deadline_ns, submitted_ns)
        assert call.metadata == metadata
        assert (len(call.inputs), len(call.outputs)) == (len(inputs), len(outputs))
        found = (*call.inputs, *call.outputs)
        assert list(zip([one.offset for one in found], call.generations, strict=True)) == places
        assert [(one.form.spec, one.form.strides) for one in found] == [*inputs, *outputs]
        assert [one.form.nbytes for one in found] == [spec.nbytes for spec, _ in (*inputs, *outputs)]
        _check_all_inside(call)
    assert template.tensor_count == len(places)


@pytest.mark.parametrize("dtype", CODE_OF, ids=str)
@pytest.mark.parametrize("ndim", range(9))
def test_every_dtype_and_rank_is_carried(dtype: torch.dtype, ndim: int) -> None:
    tensor = torch.empty((3, 2, 1, 2, 3, 1, 2, 2)[:ndim], dtype=dtype)
    for view in (tensor, tensor.permute(tuple(reversed(range(ndim)))), tensor[..., ::2] if ndim else tensor):
        template = FrameTemplate(1, [(spec_of(view), view.stride())], [])
        slot = private_slot(layout.SUBMISSION_SLOT_BYTES)
        template.write(slot, 1, 0, 0, [FIRST], [1])
        (found,) = _reader().read(bytes(slot.bytes)).inputs
        memory = torch.empty(found.form.extent_bytes, dtype=torch.uint8).view(dtype)
        again = memory.as_strided(found.form.spec.shape, found.form.strides)
        assert (again.shape, again.stride(), again.dtype) == (view.shape, view.stride(), view.dtype)


def test_one_template_writes_many_calls_each_with_its_own_places() -> None:
    spec = TensorSpec((4,), torch.float32)
    template = FrameTemplate(1, [(spec, (1,))], [(spec, (1,))])
    slot = private_slot(layout.SUBMISSION_SLOT_BYTES)
    reader = _reader()
    for number in range(1, 50):
        offsets, generations = [FIRST + 256 * number, FIRST + 512 * number], [number, UINT32_MAX - number]
        template.write(slot, number, number + 1, number + 2, offsets, generations)
        call = reader.read(bytes(slot.bytes))
        assert (call.call_id, call.deadline_ns, call.submitted_ns) == (number, number + 1, number + 2)
        assert [one.offset for one in (*call.inputs, *call.outputs)] == offsets
        assert call.generations == tuple(generations)


def test_more_tensors_than_a_frame_carries_are_refused_when_the_template_is_made() -> None:
    one = (TensorSpec((), torch.int8), ())
    FrameTemplate(1, [one] * 5, [one] * 7)
    with pytest.raises(BadInput, match=r"13 tensors .* at most 12"):
        FrameTemplate(1, [one] * 6, [one] * 7)


def test_more_metadata_than_a_frame_carries_is_refused_when_the_template_is_made() -> None:
    FrameTemplate(1, [], [], b"x" * 128)
    with pytest.raises(BadInput, match="129 bytes of per-call arguments; a frame carries at most 128: bind them instead"):
        FrameTemplate(1, [], [], b"x" * 129)


@pytest.mark.parametrize(("offsets", "generations"), [(0, 0), (1, 1), (1, 2), (2, 1), (3, 3), (2, 20), (20, 20)])
def test_places_that_are_not_one_for_each_tensor_are_refused(offsets: int, generations: int) -> None:
    """A slot remembers what was written last: a tensor without a place would lie where an earlier call's did."""
    one = (TensorSpec((), torch.int8), ())
    template, slot = FrameTemplate(1, [one], [one]), private_slot(layout.SUBMISSION_SLOT_BYTES)
    template.write(slot, 1, 0, 0, [FIRST] * 2, [1] * 2)
    before = bytes(slot.bytes)
    with pytest.raises(ValueError, match=f"{offsets} offsets and {generations} generations for a template of 2 tensors"):
        template.write(slot, 2, 0, 0, [FIRST] * offsets, [1] * generations)
    assert bytes(slot.bytes) == before


# --- slots remember what was written last ----------------------------------------------------------------------------------------------

metadatas = st.just(b"") | st.binary(max_size=layout.METADATA_BYTES)


@st.composite
def templates(draw: st.DrawFn) -> tuple[FrameTemplate, list[Tensor]]:
    """Any template, and its tensors."""
    inputs = draw(st.lists(tensors(), max_size=4))
    outputs = draw(st.lists(tensors(), max_size=3))
    return FrameTemplate(draw(st.integers(0, UINT32_MAX)), inputs, outputs, draw(metadatas)), [*inputs, *outputs]


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_call_written_over_others_is_as_in_a_fresh_slot(data: st.DataObject) -> None:
    """However templates take turns in a slot, nothing of an earlier call is left in the part that is read of a later one."""
    known = data.draw(st.lists(templates(), min_size=1, max_size=4))
    reused = private_slot(layout.SUBMISSION_SLOT_BYTES)
    reused.bytes[8:] = data.draw(st.sampled_from([b"\0", b"\xff"])) * (layout.SUBMISSION_SLOT_BYTES - 8)
    reader = _reader()
    for index in data.draw(st.lists(st.integers(0, len(known) - 1), min_size=2, max_size=12)):
        template, own = known[index]
        offsets, generations = _split([data.draw(placed(tensor)) for tensor in own])
        call_id, deadline_ns, submitted_ns = (data.draw(st.integers(0, UINT64_MAX)) for _ in range(3))
        fresh = private_slot(layout.SUBMISSION_SLOT_BYTES)
        for slot in (fresh, reused):
            template.write(slot, call_id, deadline_ns, submitted_ns, offsets, generations)
            assert slot.template is template
        assert reused.bytes[: template.nbytes] == fresh.bytes[: template.nbytes]
        assert constant_part(bytes(reused.bytes)) == constant_part(bytes(fresh.bytes))
        call = reader.read(bytes(reused.bytes))
        assert call == reader.read(bytes(fresh.bytes))
        assert (call.call_id, call.deadline_ns, call.submitted_ns) == (call_id, deadline_ns, submitted_ns)
        assert ([one.offset for one in (*call.inputs, *call.outputs)], list(call.generations)) == (offsets, generations)


def test_a_template_that_is_equal_but_another_one_is_written_whole() -> None:
    """What is remembered is the template itself."""
    one = (TensorSpec((3,), torch.int16), (1,))
    first, second = FrameTemplate(1, [one], []), FrameTemplate(1, [one], [])
    slot, fresh = private_slot(layout.SUBMISSION_SLOT_BYTES), private_slot(layout.SUBMISSION_SLOT_BYTES)
    first.write(slot, 1, 0, 0, [FIRST], [1])
    slot.bytes[OP_AT : first.nbytes] = b"\xff" * (first.nbytes - OP_AT)
    second.write(slot, 1, 0, 0, [FIRST], [1])
    second.write(fresh, 1, 0, 0, [FIRST], [1])
    assert slot.bytes == fresh.bytes


def test_a_slot_that_nothing_was_written_into_remembers_nothing() -> None:
    assert private_slot(64).template is None


# --- what a call is recognised by (F3) -------------------------------------------------------------------------------------------------


def _frame_of(count: int, metadata: bytes = b"") -> tuple[bytes, int]:
    """A frame of ``count`` tensors, a whole slot long, and the bytes of it that are used."""
    spec = TensorSpec((2, 3), torch.float32)
    inputs = count // 2
    template = FrameTemplate(0x11223344, [(spec, (3, 1))] * inputs, [(spec, (3, 1))] * (count - inputs), metadata)
    slot = private_slot(layout.SUBMISSION_SLOT_BYTES)
    template.write(slot, 1, 2, 3, [FIRST + 256 * i for i in range(count)], [1 + i for i in range(count)])
    return bytes(slot.bytes), template.nbytes


@pytest.mark.parametrize("count", range(layout.MAX_TENSORS + 1))
def test_the_constant_part_reaches_from_the_op_exactly_to_the_last_tensor(count: int) -> None:
    """Also where the frame is cut there, as on the zmq lane, and where arguments follow."""
    end = TENSORS_AT + count * ctypes.sizeof(TensorDescriptor)
    for frame, used in (_frame_of(count), _frame_of(count, b"\x80")):
        assert constant_part(frame) == frame[OP_AT:end] == constant_part(frame[:used])
        for at in (*range(OP_AT), *range(end, len(frame))):
            other = bytearray(frame)
            other[at] ^= 0xFF
            assert constant_part(bytes(other)) == constant_part(frame), f"byte {at} is no part of it"


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_the_constant_part_differs_whenever_a_byte_between_op_and_last_tensor_does(mask: int) -> None:
    """Op, counts, flags, length of the arguments, and all of each descriptor."""
    frame, _ = _frame_of(3, b"\x80")
    known = constant_part(frame)
    for at in range(OP_AT, TENSORS_AT + 3 * DESCRIPTOR.size):
        other = bytearray(frame)
        other[at] ^= mask
        assert constant_part(bytes(other)) != known, f"byte {at}"


def test_the_constant_part_differs_whenever_op_counts_or_length_of_the_arguments_do() -> None:
    frame = bytes(TENSORS_AT) + random.Random(0).randbytes(layout.SUBMISSION_SLOT_BYTES - TENSORS_AT)
    seen: dict[bytes, tuple[int, ...]] = {}
    numbers16 = [*range(14), 255, 256, 257, 65535]
    numbers32 = [0, 1, 128, 129, 1 << 16, UINT32_MAX]
    for head in itertools.product(numbers32, numbers16, numbers16, [0, 1], numbers32):
        part = constant_part(frame[:OP_AT] + struct.pack("<IHHII", *head) + frame[TENSORS_AT:])
        assert seen.setdefault(part, head) == head
        assert OP_AT + len(part) <= layout.SUBMISSION_SLOT_BYTES - layout.METADATA_BYTES


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_two_frames_have_the_same_constant_part_only_if_they_ask_for_the_same_op_on_the_same_tensors(data: st.DataObject) -> None:
    """A worker runs a frame that it knows by this part without checking it again: whatever matters must be in it."""
    own = data.draw(st.lists(tensors(), max_size=4))
    offsets = [data.draw(placed(tensor))[0] for tensor in own]
    reader = _reader()
    seen = []
    for _ in range(2):
        kept = own[: data.draw(st.sampled_from([len(own), len(own) - 1]))] if own else []
        inputs = data.draw(st.integers(0, len(kept)))
        metadata = data.draw(st.sampled_from([b"", b"\x80", b"\x81\xa1a\x01"]))
        moved = [data.draw(st.sampled_from([offset, FIRST])) for offset in offsets]
        slot = private_slot(layout.SUBMISSION_SLOT_BYTES)
        template = FrameTemplate(data.draw(st.integers(1, 2)), kept[:inputs], kept[inputs:], metadata)
        ids, generations = [data.draw(st.integers(0, UINT64_MAX)) for _ in range(3)], data.draw(st.permutations(range(4)))
        template.write(slot, *ids, moved[: len(kept)], generations[: len(kept)])
        frame = bytes(slot.bytes)
        try:
            call = reader.read(frame)
        except BadFrame:  # moved to where there is no room for it
            return
        seen.append((constant_part(frame), (call.op_id, call.inputs, call.outputs, len(call.metadata))))
    assert (seen[0][0] == seen[1][0]) == (seen[0][1] == seen[1][1])


def test_call_id_and_times_are_read_from_a_frame_of_header_length() -> None:
    frame, _ = _frame_of(2)
    assert taken_of(frame[: SUBMISSION_HEADER.size])[:3] == (1, 2, 3)
    assert taken_of(frame) == (1, 2, 3, constant_part(frame), frame)


# --- the places are those of the layout ------------------------------------------------------------------------------------------------


# What is packed: bytes, and what must be as long.
GOLDEN_PACKED = {
    "header of a submission": (SUBMISSION_HEADER.size, 96, SubmissionFrame.tensors.offset),
    "descriptor": (DESCRIPTOR.size, 152, ctypes.sizeof(TensorDescriptor)),
    "all descriptors": (layout.MAX_TENSORS * DESCRIPTOR.size, 1824, SubmissionFrame.tensors.size),
    "arguments": (layout.METADATA_BYTES, 128, SubmissionFrame.metadata.size),
    "submission": (layout.SUBMISSION_SLOT_BYTES, 2048, SubmissionFrame.metadata.offset + SubmissionFrame.metadata.size),
    "header of a completion": (COMPLETION_HEADER.size, 64, CompletionFrame.body.offset),
    "head of a completion": (HEAD_BYTES, 64, CompletionFrame.body.offset),
    "text": (layout.TEXT_BYTES, 960, CompletionFrame.body.size),
    "completion": (layout.COMPLETION_SLOT_BYTES, 1024, CompletionFrame.body.offset + CompletionFrame.body.size),
}


@pytest.mark.parametrize("what", GOLDEN_PACKED)
def test_packed_sizes_are_those_of_the_structures(what: str) -> None:
    packed, golden, structure = GOLDEN_PACKED[what]
    assert packed == golden == structure


def test_the_constant_part_begins_and_the_tensors_begin_where_the_layout_says() -> None:
    assert (SubmissionFrame.op_id.offset, SubmissionFrame.tensors.offset) == (OP_AT, TENSORS_AT)


def test_packed_submission_header_is_the_structures() -> None:
    times = [0x0101010101010100 + i for i in range(4)]
    generations = [0x80000000 + i for i in range(layout.MAX_TENSORS)]
    rest = [0x11223344, 0x5566, 0x7788, 0x99AABBCC, 0xDDEEFF00]
    packed = SUBMISSION_HEADER.pack(*times, *generations, *rest).ljust(layout.SUBMISSION_SLOT_BYTES, b"\0")
    frame = SubmissionFrame.from_buffer_copy(packed)
    assert [frame.sequence, frame.call_id, frame.deadline_ns, frame.submitted_ns] == times
    assert list(frame.generations) == generations
    assert [frame.op_id, frame.input_count, frame.output_count, frame.flags, frame.metadata_bytes] == rest
    assert not any(packed[SUBMISSION_HEADER.size :])


def test_packed_descriptor_is_the_structures() -> None:
    names = ["offset", "nbytes", "dtype", "ndim", "space", "flags", "reserved"]
    values = [1 << 60, 1 << 61, 200, 201, 202, 203, 1 << 31]
    dims = [*range(-8, 8)]
    descriptor = TensorDescriptor.from_buffer_copy(DESCRIPTOR.pack(*values, *dims))
    assert [getattr(descriptor, name) for name in names] == values
    assert [*descriptor.shape, *descriptor.strides] == dims


def test_packed_completion_header_is_the_structures() -> None:
    names = ["sequence", "call_id", "status", "text_bytes", "queued_ns", "compute_ns"]
    values = [1 << 60, 1 << 61, 1 << 31, 1 << 30, 1 << 58, 1 << 59]
    frame = CompletionFrame.from_buffer_copy(COMPLETION_HEADER.pack(*values).ljust(layout.COMPLETION_SLOT_BYTES, b"\0"))
    assert [getattr(frame, name) for name in names] == values
    assert (frame.reserved0, frame.reserved1, any(frame.reserved2)) == (0, 0, False)


def test_word_indices_are_those_of_the_structures() -> None:
    assert frames.SEQUENCE_WORD * 8 == SubmissionFrame.sequence.offset == CompletionFrame.sequence.offset
    assert frames.CALL_ID_WORD * 8 == SubmissionFrame.call_id.offset == CompletionFrame.call_id.offset


def test_a_written_frame_read_as_the_structure_has_every_field_in_its_place() -> None:
    tensor = torch.empty((3, 4, 5), dtype=torch.bfloat16)[1:, :, ::2]
    out = TensorSpec((2,), torch.bool)
    template = FrameTemplate(0x11223344, [(spec_of(tensor), tensor.stride())], [(out, (1,))], b"meta")
    slot = private_slot(layout.SUBMISSION_SLOT_BYTES)
    template.write(slot, 1 << 60, 1 << 61, 1 << 62, [FIRST + 40, FIRST + 512], [0xFFFFFFFF, 2])
    frame = SubmissionFrame.from_buffer_copy(slot.bytes)
    assert (frame.sequence, frame.call_id, frame.op_id) == (0, 1 << 60, 0x11223344)
    assert (frame.input_count, frame.output_count, frame.flags, frame.metadata_bytes) == (1, 1, 0, 4)
    assert (frame.deadline_ns, frame.submitted_ns) == (1 << 61, 1 << 62)
    assert bytes(frame.metadata) == b"meta".ljust(layout.METADATA_BYTES, b"\0")
    first, second = frame.tensors[:2]
    assert list(frame.generations) == [0xFFFFFFFF, 2] + [0] * 10
    assert (first.offset, first.nbytes, first.reserved) == (FIRST + 40, 2 * 4 * 3 * 2, 0)
    assert (first.dtype, first.ndim, first.space, first.flags) == (layout.DTypeCode.BFLOAT16, 3, layout.Space.SEGMENT, 0)
    assert (list(first.shape), list(first.strides)) == ([2, 4, 3, 0, 0, 0, 0, 0], [20, 5, 2, 0, 0, 0, 0, 0])
    assert (second.offset, second.nbytes, second.dtype, second.ndim) == (FIRST + 512, 2, layout.DTypeCode.BOOL, 1)
    assert bytes(frame.tensors[2]) == bytes(ctypes.sizeof(TensorDescriptor))


# --- nothing is believed unchecked (F2) ----------------------------------------------------------------------------------------------


def _spoil_descriptor(index: int, **fields: int) -> Callable[[SubmissionFrame], None]:
    def spoil(frame: SubmissionFrame) -> None:
        for name, value in fields.items():
            setattr(frame.tensors[index], name, value)

    return spoil


def _spoil_header(**fields: int) -> Callable[[SubmissionFrame], None]:
    def spoil(frame: SubmissionFrame) -> None:
        for name, value in fields.items():
            setattr(frame, name, value)

    return spoil


def _spoil_dims(index: int, shape: list[int], strides: list[int], ndim: int | None = None) -> Callable[[SubmissionFrame], None]:
    def spoil(frame: SubmissionFrame) -> None:
        descriptor = frame.tensors[index]
        descriptor.ndim = len(shape) if ndim is None else ndim
        descriptor.shape[:] = shape + [0] * (8 - len(shape))
        descriptor.strides[:] = strides + [0] * (8 - len(strides))
        descriptor.nbytes = max(0, math.prod(shape)) * 8 & UINT64_MAX

    return spoil


# The second tensor of the valid frame is int64[4] at FIRST + 256, 32 bytes.
MALFORMED: dict[str, tuple[Callable[[SubmissionFrame], None], str]] = {
    "one tensor too many": (_spoil_header(input_count=12), "12 inputs and 1 outputs; a frame carries at most 12 tensors"),
    "as many inputs as can be told": (_spoil_header(input_count=65535), "65535 inputs and 1 outputs"),
    "as many of both as can be told": (_spoil_header(input_count=65535, output_count=65535), "65535 inputs and 65535 outputs"),
    "metadata too long": (_spoil_header(metadata_bytes=129), "129 bytes of metadata; a frame carries at most 128"),
    "metadata longest": (_spoil_header(metadata_bytes=0xFFFFFFFF), "4294967295 bytes of metadata"),
    "header flags": (_spoil_header(flags=1), "flags 0x1 are not known"),
    "header flags highest": (_spoil_header(flags=1 << 31), "flags 0x80000000 are not known"),
    "dtype zero": (_spoil_descriptor(1, dtype=0), "tensor 1 has dtype code 0"),
    "dtype next": (_spoil_descriptor(1, dtype=max(DTYPE_OF) + 1), f"tensor 1 has dtype code {max(DTYPE_OF) + 1}"),
    "dtype highest": (_spoil_descriptor(2, dtype=255), "tensor 2 has dtype code 255"),
    "nine dimensions": (_spoil_descriptor(1, ndim=9), "tensor 1 has 9 dimensions; at most 8"),
    "dimensions highest": (_spoil_descriptor(1, ndim=255), "tensor 1 has 255 dimensions"),
    "fewer dimensions than values": (_spoil_descriptor(1, ndim=0), "tensor 1 has values in dimensions that it says it lacks"),
    "size beyond the dimensions": (_spoil_dims(1, [4, 5], [1], 1), "tensor 1 has values in dimensions that it says it lacks"),
    "stride beyond the dimensions": (_spoil_dims(1, [4], [1, 1], 1), "tensor 1 has values in dimensions that it says it lacks"),
    "another space": (_spoil_descriptor(1, space=3), "tensor 1 lies in space 3"),
    "a device arena that is not there": (_spoil_descriptor(1, space=1), "tensor 1 lies in a device arena, and this client has opened none"),
    "descriptor flags": (_spoil_descriptor(1, flags=0x80), "tensor 1 has flags 0x80"),
    "descriptor reserved": (_spoil_descriptor(1, reserved=1), r"tensor 1 has flags 0x0 \(reserved 0x1\), which are not known"),
    "descriptor reserved highest": (_spoil_descriptor(1, reserved=1 << 31), r"tensor 1 has flags 0x0 \(reserved 0x80000000\)"),
    "a byte too few": (_spoil_descriptor(1, nbytes=31), r"tensor 1 \(int64\[4\]\) says 31 bytes; its shape makes 32"),
    "a byte too many": (_spoil_descriptor(1, nbytes=33), r"tensor 1 \(int64\[4\]\) says 33 bytes; its shape makes 32"),
    "bytes highest": (_spoil_descriptor(1, nbytes=UINT64_MAX), rf"says {UINT64_MAX} bytes"),
    "negative dimension": (_spoil_dims(1, [-1], [1]), r"tensor 1 has a negative dimension or stride: shape \[-1\]"),
    "dimensions of negative product": (_spoil_dims(1, [-2, -2], [1, 1]), r"tensor 1 has a negative dimension .* shape \[-2, -2\]"),
    "negative stride": (_spoil_dims(1, [4], [-1]), r"tensor 1 has a negative dimension or stride: .* strides \[-1\]"),
    "negative stride in an empty tensor": (_spoil_dims(1, [0], [-1]), r"tensor 1 has a negative dimension or stride"),
    "lowest dimension and stride": (_spoil_dims(1, [-INT64_MAX - 1], [-INT64_MAX - 1]), "tensor 1 has a negative dimension"),
    "in the segment header": (_spoil_descriptor(1, offset=0), r"tensor 1 .* at 0 reaches over 32 bytes, outside the arena"),
    "just before the arena": (
        _spoil_descriptor(1, offset=FIRST - 8),
        rf"tensor 1 .* at {FIRST - 8} .*outside the arena \[{FIRST}, {END}\)",
    ),
    "an element over the end": (_spoil_descriptor(1, offset=END - 24), rf"tensor 1 .* at {END - 24} .*outside the arena"),
    "at the end": (_spoil_descriptor(1, offset=END), "tensor 1 .* outside the arena"),
    "offset that wraps round": (_spoil_descriptor(1, offset=UINT64_MAX - 31), "tensor 1 .* outside the arena"),
    "misaligned": (_spoil_descriptor(1, offset=FIRST + 260), rf"tensor 1 .* at {FIRST + 260} is not aligned to its elements"),
    "larger than the arena": (_spoil_dims(1, [(END - FIRST) // 8 + 1], [1]), "tensor 1 .* more than the arena"),
    "strides over the end": (_spoil_dims(1, [2], [(END - FIRST - 256) // 8]), "tensor 1 .* outside the arena"),
    "strides longer than the arena": (_spoil_dims(1, [2], [(END - FIRST) // 8]), "tensor 1 .* more than the arena"),
    "a stride that overflows": (_spoil_dims(1, [2], [INT64_MAX]), "tensor 1 .* more than the arena"),
    "strides whose sum overflows to something small": (_spoil_dims(1, [3, 3], [1 << 62, 1 << 62]), "tensor 1 .* more than the arena"),
    "sizes whose product overflows to nothing": (_spoil_dims(1, [1 << 32, 1 << 32], [0, 0]), "tensor 1 .* 63 bits"),
    "a byte more than can be told": (_spoil_dims(1, [1 << 60], [0]), "tensor 1 .* 63 bits"),
    "bytes that would be negative": (_spoil_dims(1, [3 << 59], [0]), "tensor 1 .* 63 bits"),
    "all bytes that 64 bits can tell, and one more element": (_spoil_dims(1, [1 << 61], [0]), "tensor 1 .* 63 bits"),
    "sizes highest": (_spoil_dims(1, [INT64_MAX] * 8, [INT64_MAX] * 8), "tensor 1 .* 63 bits"),
    "sizes highest, strides none": (_spoil_dims(1, [INT64_MAX] * 8, [0] * 8), "tensor 1 .* 63 bits"),
}


def test_the_frame_that_is_spoilt_below_is_accepted() -> None:
    call = _reader().read(bytes(_valid()))
    _check_all_inside(call)
    assert (call.call_id, call.op_id, call.metadata) == (5, 7, b"\x80")


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_field_is_rejected_by_name(case: str) -> None:
    """F2."""
    spoil, told = MALFORMED[case]
    frame = _valid()
    spoil(frame)
    with pytest.raises(BadFrame, match=told):
        _reader().read(bytes(frame))


@pytest.mark.parametrize("case", MALFORMED)
def test_a_reader_that_knows_the_forms_already_rejects_it_as_well(case: str) -> None:
    """F3: what is remembered is the form alone; and a rejected form is not remembered."""
    spoil, told = MALFORMED[case]
    reader = _reader()
    reader.read(bytes(_valid()))
    frame = _valid()
    spoil(frame)
    for _ in range(2):
        with pytest.raises(BadFrame, match=told):
            reader.read(bytes(frame))
    _check_all_inside(reader.read(bytes(_valid())))


def _expanded(code: int, shape: list[int]) -> bytes:
    """The valid frame, its second tensor one element that is seen many times over."""
    frame = _valid()
    descriptor = frame.tensors[1]
    descriptor.dtype, descriptor.ndim = code, len(shape)
    descriptor.shape[:] = shape + [0] * (8 - len(shape))
    descriptor.strides[:] = [0] * 8
    descriptor.nbytes = math.prod(shape) * DTYPE_OF[code].itemsize & UINT64_MAX
    return bytes(frame)


@pytest.mark.parametrize("code", DTYPE_OF, ids=lambda code: layout.DTypeCode(code).name)
def test_a_tensor_has_no_more_elements_than_the_arena_has_room_for(code: int) -> None:
    """However few of them lie apart: an op works through all, and one client must not keep a worker busy for ever with one element."""
    dtype = DTYPE_OF[code]
    most = (END - FIRST) // dtype.itemsize
    form = _reader().read(_expanded(code, [most])).inputs[1].form
    assert form.nbytes == most * dtype.itemsize
    assert torch.empty(1, dtype=dtype).as_strided(form.spec.shape, form.strides).nbytes == form.nbytes
    for shape in ([most + 1], [most, 2], [2, most], [INT64_MAX // dtype.itemsize]):
        with pytest.raises(BadFrame, match=r"tensor 1 .* bytes of elements, more than the arena"):
            _reader().read(_expanded(code, shape))


@pytest.mark.parametrize("code", DTYPE_OF, ids=lambda code: layout.DTypeCode(code).name)
def test_no_more_bytes_are_believed_than_63_bits_can_tell(code: int) -> None:
    """torch counts bytes in signed 64 bits: beyond, it would count wrong."""
    dtype = DTYPE_OF[code]
    most = INT64_MAX // dtype.itemsize
    for shape in ([most // 2 + 1, 2], [most, 2], [1 << 32, (1 << 31) // dtype.itemsize], [most, most], [INT64_MAX, 1, INT64_MAX]):
        with pytest.raises(BadFrame, match=r"tensor 1 .* 63 bits"):
            _reader().read(_expanded(code, shape))


@pytest.mark.parametrize("offset", [0, FIRST - 8, END + 8, UINT64_MAX - 7])
def test_an_empty_tensor_must_lie_in_the_arena_too(offset: int) -> None:
    frame = _valid()
    _spoil_dims(1, [0, 3], [3, 1])(frame)
    _check_all_inside(_reader().read(bytes(frame)))
    frame.tensors[1].offset = offset
    with pytest.raises(BadFrame, match=r"tensor 1 \(int64\[0, 3\]\) .* outside the arena"):
        _reader().read(bytes(frame))


def test_the_last_element_may_lie_at_the_very_end() -> None:
    frame = _valid()
    frame.tensors[1].offset = END - 32
    assert _reader().read(bytes(frame)).inputs[1].offset == END - 32


@pytest.mark.parametrize("metadata", [b"", b"m"])
def test_a_truncated_frame_is_rejected_at_every_length(metadata: bytes) -> None:
    spec = TensorSpec((4,), torch.float32)
    template = FrameTemplate(1, [(spec, (1,))], [(spec, (1,))], metadata)
    slot = private_slot(layout.SUBMISSION_SLOT_BYTES)
    template.write(slot, 1, 0, 0, [FIRST, FIRST + 256], [1, 2])
    whole = bytes(slot.bytes[: template.nbytes])
    _reader().read(whole)
    for nbytes in range(len(whole)):
        with pytest.raises(BadFrame, match=f"a frame of {nbytes} bytes (is shorter than its header|ends before)"):
            _reader().read(whole[:nbytes])


@settings(deadline=None, max_examples=400)
@given(st.binary(max_size=2200) | st.binary(min_size=2048, max_size=2048))
def test_random_bytes_raise_bad_frame_or_name_tensors_inside_the_arena(frame: bytes) -> None:
    """F2."""
    try:
        call = _reader().read(frame)
    except BadFrame:
        return
    _check_all_inside(call)


NASTY = [0, 1, 2, 7, 8, 9, 12, 13, 127, 128, 255, 256, 65535, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 61, 1 << 62, INT64_MAX, 1 << 63]
NASTY += [UINT64_MAX, UINT64_MAX - 1, UINT64_MAX - 255, FIRST - 1, FIRST, FIRST + 1, END - 1, END, END + 1, END - FIRST, (END - FIRST) // 8]


@pytest.mark.parametrize("seed", range(4))
def test_mutated_frames_raise_bad_frame_or_name_tensors_inside_the_arena(seed: int) -> None:
    """F2, F3: one reader for all of them, as in a worker."""
    choose = random.Random(seed)
    reader = _reader()
    valid = bytes(_valid())
    accepted = 0
    for _ in range(3000):
        frame = bytearray(valid)
        for _ in range(choose.choice((1, 1, 1, 2, 3, 8))):
            width = choose.choice((1, 2, 4, 8))
            at = choose.randrange(0, TENSORS_AT + 3 * DESCRIPTOR.size, width)
            value = choose.choice(NASTY) if choose.random() < 0.7 else choose.getrandbits(64)
            frame[at : at + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "little")
        if choose.random() < 0.1:
            del frame[choose.randrange(len(frame)) :]
        try:
            call = reader.read(bytes(frame))
        except BadFrame:
            continue
        accepted += 1
        _check_all_inside(call)
    assert accepted > 100, "the mutations must not all be refused at the door"


def test_a_form_is_checked_once_and_remembered() -> None:
    """F3: forms are compared by identity."""
    reader = _reader()
    first, second = reader.read(bytes(_valid())), reader.read(bytes(_valid()))
    assert [one.form for one in first.inputs] == [one.form for one in second.inputs]
    assert first.inputs[0].form is not first.inputs[1].form
    assert _reader().read(bytes(_valid())).inputs[0].form is not first.inputs[0].form


def test_a_peer_that_sends_ever_new_forms_does_not_make_the_reader_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """F3."""
    monkeypatch.setattr(frames, "_KNOWN_FORMS", 16)
    reader = _reader()
    frame = _valid()
    for size in range(1, 500):
        _spoil_dims(1, [size], [1])(frame)
        assert reader.read(bytes(frame)).inputs[1].form.spec.shape == (size,)
        assert len(reader._forms) <= 16


@settings(deadline=None)
@given(tensors())
def test_the_extent_of_a_strided_tensor_is_where_its_last_element_ends(tensor: Tensor) -> None:
    spec, strides = tensor
    extent = extent_elements(spec.shape, strides)
    assert extent == _reach(spec.shape, strides)
    indices = torch.arange(max(extent, 1)).as_strided(spec.shape, strides)
    assert extent == (int(indices.max()) + 1 if indices.numel() else 0)


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), max_size=8))
def test_contiguous_strides_are_those_of_torch(shape: list[int]) -> None:
    assert contiguous_strides(tuple(shape)) == torch.empty(shape).stride()


# --- completions -----------------------------------------------------------------------------------------------------------------------

uint64s = st.integers(0, UINT64_MAX)


@settings(deadline=None)
@given(uint64s, st.integers(0, UINT32_MAX), uint64s, uint64s, st.just(b"") | st.binary(max_size=layout.TEXT_BYTES))
def test_a_completion_is_read_back(call_id: int, status: int, queued_ns: int, compute_ns: int, text: bytes) -> None:
    completion = Completion(call_id, status, queued_ns, compute_ns, text)
    slot = private_slot(layout.COMPLETION_SLOT_BYTES)
    slot.bytes[:] = b"\xff" * len(slot.bytes)
    nbytes = write_completion(slot, completion)
    assert nbytes == CompletionFrame.body.offset + len(text)
    assert slot.words[frames.SEQUENCE_WORD] == UINT64_MAX, "L2: that is for the queue to write, last"
    assert read_completion(bytes(slot.bytes[:nbytes])) == completion
    assert read_completion(bytes(slot.bytes)) == completion
    assert read_plain_completion(slot) == (None if text else completion)
    frame = CompletionFrame.from_buffer_copy(slot.bytes)
    assert (frame.call_id, frame.status, frame.text_bytes, frame.reserved0, frame.reserved1) == (call_id, status, len(text), 0, 0)
    assert (frame.queued_ns, frame.compute_ns) == (queued_ns, compute_ns)
    assert bytes(frame.body)[: len(text)] == text


def test_a_completion_tells_call_status_times_and_text() -> None:
    assert Completion._fields == ("call_id", "status", "queued_ns", "compute_ns", "body")


def test_of_a_completion_without_a_text_only_the_head_is_copied() -> None:
    """F1: and it is copied before it is looked at."""

    class Watched:
        """Stands for the slot's head: changes right after the copy, as a peer may."""

        def __bytes__(self) -> bytes:
            copied = bytes(head)
            slot.bytes[:] = b"\xff" * len(slot.bytes)
            return copied

    completion = Completion(1, layout.Status.EXPIRED, 2, 3, b"")
    slot = private_slot(layout.COMPLETION_SLOT_BYTES)
    write_completion(slot, completion)
    head = slot.head
    assert len(head) == CompletionFrame.body.offset
    slot.head = Watched()  # type: ignore[assignment]
    assert read_plain_completion(slot) == completion


@pytest.mark.parametrize("nbytes", [0, 1, 8, COMPLETION_HEADER.size - 1])
def test_a_completion_shorter_than_its_header_is_none(nbytes: int) -> None:
    assert read_completion(bytes(nbytes)) is None


@pytest.mark.parametrize("text_bytes", [layout.TEXT_BYTES + 1, 65535, 1 << 31, 0xFFFFFFFF])
def test_a_completion_with_a_text_beyond_its_room_is_none(text_bytes: int) -> None:
    frame = bytes(CompletionFrame(call_id=1, text_bytes=text_bytes))
    assert read_completion(frame) is None
    assert read_plain_completion(Slot(memoryview(bytearray(frame)))) is None


def test_what_is_reserved_in_a_completion_is_not_looked_at() -> None:
    frame = CompletionFrame(call_id=1, status=2, reserved0=UINT32_MAX, reserved1=UINT32_MAX, queued_ns=3, compute_ns=4)
    frame.reserved2[:] = b"\xff" * 16
    assert read_completion(bytes(frame)) == Completion(1, 2, 3, 4, b"")
    assert read_plain_completion(Slot(memoryview(bytearray(frame)))) == Completion(1, 2, 3, 4, b"")


def test_a_completion_that_ends_before_its_text_does_is_none() -> None:
    slot = private_slot(layout.COMPLETION_SLOT_BYTES)
    for text in (b"t", b"text", b"x" * layout.TEXT_BYTES):
        nbytes = write_completion(slot, Completion(1, 1, 0, 0, text))
        for short in {nbytes - 1, nbytes - len(text)}:
            assert read_completion(bytes(slot.bytes[:short])) is None


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=1100) | st.builds(lambda head, body: head + body, st.binary(min_size=64, max_size=64), st.just(bytes(960))))
def test_random_bytes_are_a_completion_within_their_bounds_or_none(frame: bytes) -> None:
    found = read_completion(frame)
    if found is not None:
        assert len(found.body) <= len(frame) - CompletionFrame.body.offset
        assert found.body == frame[CompletionFrame.body.offset :][: len(found.body)]


@settings(deadline=None, max_examples=200)
@given(st.binary(min_size=64, max_size=64), st.booleans())
def test_reading_the_head_alone_says_the_same_of_a_completion_without_a_text(head: bytes, without_text: bool) -> None:
    frame = CompletionFrame.from_buffer_copy(head + bytes(layout.TEXT_BYTES))
    if without_text:
        frame.text_bytes = 0
    plain = read_plain_completion(Slot(memoryview(bytearray(frame))))
    assert plain == (None if frame.text_bytes else read_completion(bytes(frame)))


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet="aé€😀", min_size=150, max_size=1100))
def test_a_text_is_cut_at_a_character_so_that_it_just_fits(text: str) -> None:
    packed = pack_text(text)
    kept = packed.decode("utf-8")
    assert text.startswith(kept)
    assert len(packed) <= layout.TEXT_BYTES
    if kept != text:
        assert len(packed) + len(text[len(kept)].encode()) > layout.TEXT_BYTES


def test_a_text_that_utf8_has_no_bytes_for_is_packed_too() -> None:
    assert pack_text("before \udc80 after").decode() == "before ? after"


@pytest.mark.parametrize("characters", [479, 480, 481])
def test_a_text_around_the_limit_is_kept_or_cut_to_whole_characters(characters: int) -> None:
    assert pack_text("é" * characters) == ("é" * min(characters, 480)).encode()
    assert pack_text("x" + "é" * characters) == ("x" + "é" * min(characters, 479)).encode()


def test_a_private_slots_words_and_halves_are_its_bytes() -> None:
    slot = private_slot(128)
    slot.words[3] = 0x1122334455667788
    slot.halves[9] = 0x99AABBCC
    assert struct.unpack_from("<QII", slot.bytes, 24) == (0x1122334455667788, 0, 0x99AABBCC)
    assert bytes(slot.head) == bytes(slot.bytes[:64])
    assert (len(slot.bytes), len(slot.words), len(slot.halves), len(slot.head)) == (128, 16, 32, 64)
