"""Frames: what is written is read back, the places are those of the layout, and nothing that a peer may write is believed unchecked."""

from __future__ import annotations

import ctypes
import math
import random
import struct
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shmbroker.errors import BadFrame, BadInput
from shmbroker.lane import frames
from shmbroker.lane.frames import (
    COMPLETION_HEADER,
    DESCRIPTOR,
    SHAPE,
    SUBMISSION_HEADER,
    Completion,
    FrameTemplate,
    Submission,
    SubmissionReader,
    pack_shapes,
    pack_text,
    private_slot,
    read_completion,
    unpack_shapes,
    write_completion,
)
from shmbroker.memory import layout
from shmbroker.memory.layout import CompletionFrame, SubmissionFrame, TensorDescriptor
from shmbroker.memory.spec import CODE_OF, DTYPE_OF, TensorSpec, contiguous_strides, extent_elements, spec_of

FIRST = 3 * layout.PAGE
END = FIRST + (1 << 20)
"""The arena of the readers in these tests, bytes from the start of a segment."""

INT64_MAX = (1 << 63) - 1
UINT64_MAX = (1 << 64) - 1

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
    return draw(st.integers(-(-FIRST // itemsize), last)) * itemsize, draw(st.integers(0, (1 << 32) - 1))


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
    template.write(slot, call_id=5, deadline_ns=0, submitted_ns=1, places=[(FIRST, 1), (FIRST + 256, 2), (FIRST + 512, 3)])
    return SubmissionFrame.from_buffer_copy(slot.bytes)


def _check_all_inside(call: Submission) -> None:
    """F2, looked at from outside: whatever a reader lets through can be viewed."""
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
        assert form.nbytes == math.prod(shape) * itemsize


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
    template.write(slot, call_id, deadline_ns, submitted_ns, places)
    assert slot.words[frames.SEQUENCE_WORD] == sequence, "L2: that is for the queue to write, last"

    # The zmq lane sends only what is used, the shm lane's slots come whole.
    for frame in (bytes(slot.bytes[: template.nbytes]), bytes(slot.bytes)):
        call = _reader().read(frame)
        assert (call.call_id, call.op_id, call.deadline_ns, call.submitted_ns) == (call_id, op_id, deadline_ns, submitted_ns)
        assert call.metadata == metadata
        assert (len(call.inputs), len(call.outputs)) == (len(inputs), len(outputs))
        found = (*call.inputs, *call.outputs)
        assert [(one.offset, one.generation) for one in found] == places
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
        template.write(slot, 1, 0, 0, [(FIRST, 1)])
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
        places = [(FIRST + 256 * number, number), (FIRST + 512 * number, number + 1)]
        template.write(slot, number, number + 1, number + 2, places)
        call = reader.read(bytes(slot.bytes))
        assert (call.call_id, call.deadline_ns, call.submitted_ns) == (number, number + 1, number + 2)
        assert [(one.offset, one.generation) for one in (*call.inputs, *call.outputs)] == places


def test_more_tensors_than_a_frame_carries_are_refused_when_the_template_is_made() -> None:
    one = (TensorSpec((), torch.int8), ())
    FrameTemplate(1, [one] * 5, [one] * 7)
    with pytest.raises(BadInput, match=r"13 tensors .* at most 12"):
        FrameTemplate(1, [one] * 6, [one] * 7)


def test_more_metadata_than_a_frame_carries_is_refused_when_the_template_is_made() -> None:
    FrameTemplate(1, [], [], b"x" * 160)
    with pytest.raises(BadInput, match="161 bytes of per-call arguments; a frame carries at most 160: bind them instead"):
        FrameTemplate(1, [], [], b"x" * 161)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_many_places_as_tensors_must_be_given(count: int) -> None:
    one = (TensorSpec((), torch.int8), ())
    template = FrameTemplate(1, [one], [one])
    with pytest.raises(ValueError, match="zip"):
        template.write(private_slot(layout.SUBMISSION_SLOT_BYTES), 1, 0, 0, [(FIRST, 1)] * count)


# --- the places are those of the layout ------------------------------------------------------------------------------------------------


def test_packed_sizes_are_those_of_the_structures() -> None:
    assert SUBMISSION_HEADER.size == SubmissionFrame.tensors.offset
    assert DESCRIPTOR.size == ctypes.sizeof(TensorDescriptor)
    assert COMPLETION_HEADER.size == CompletionFrame.body.offset
    assert SHAPE.size == 8 + TensorDescriptor.shape.size
    assert layout.MAX_TENSORS * SHAPE.size <= layout.TEXT_BYTES, "the shapes of all outputs fit a completion"


def test_packed_submission_header_is_the_structures() -> None:
    names = ["sequence", "call_id", "op_id", "input_count", "output_count", "flags", "metadata_bytes", "deadline_ns", "submitted_ns"]
    values = [0x0101010101010100 + i if i in (0, 1, 7, 8) else 0x1000 + i for i in range(len(names))]
    packed = SUBMISSION_HEADER.pack(*values).ljust(layout.SUBMISSION_SLOT_BYTES, b"\0")
    frame = SubmissionFrame.from_buffer_copy(packed)
    assert [getattr(frame, name) for name in names] == values


def test_packed_descriptor_is_the_structures() -> None:
    names = ["offset", "nbytes", "generation", "dtype", "ndim", "space", "flags"]
    values = [1 << 60, 1 << 61, 1 << 31, 200, 201, 202, 203]
    dims = [*range(-8, 8)]
    descriptor = TensorDescriptor.from_buffer_copy(DESCRIPTOR.pack(*values, *dims))
    assert [getattr(descriptor, name) for name in names] == values
    assert [*descriptor.shape, *descriptor.strides] == dims


def test_packed_completion_header_is_the_structures() -> None:
    names = ["sequence", "call_id", "status", "shape_count", "reserved0", "text_bytes", "reserved1", "queued_ns", "compute_ns"]
    values = [1 << 60, 1 << 61, 1 << 31, 203, 204, 1 << 30, 1 << 29, 1 << 58, 1 << 59]
    frame = CompletionFrame.from_buffer_copy(COMPLETION_HEADER.pack(*values).ljust(layout.COMPLETION_SLOT_BYTES, b"\0"))
    assert [getattr(frame, name) for name in names] == values


def test_word_indices_are_those_of_the_structures() -> None:
    assert frames.SEQUENCE_WORD * 8 == SubmissionFrame.sequence.offset == CompletionFrame.sequence.offset
    assert frames.CALL_ID_WORD * 8 == SubmissionFrame.call_id.offset == CompletionFrame.call_id.offset


def test_a_written_frame_read_as_the_structure_has_every_field_in_its_place() -> None:
    tensor = torch.empty((3, 4, 5), dtype=torch.bfloat16)[1:, :, ::2]
    out = TensorSpec((2,), torch.bool)
    template = FrameTemplate(0x11223344, [(spec_of(tensor), tensor.stride())], [(out, (1,))], b"meta")
    slot = private_slot(layout.SUBMISSION_SLOT_BYTES)
    template.write(slot, 1 << 60, 1 << 61, 1 << 62, [(FIRST + 40, 0xFFFFFFFF), (FIRST + 512, 2)])
    frame = SubmissionFrame.from_buffer_copy(slot.bytes)
    assert (frame.sequence, frame.call_id, frame.op_id) == (0, 1 << 60, 0x11223344)
    assert (frame.input_count, frame.output_count, frame.flags, frame.metadata_bytes) == (1, 1, 0, 4)
    assert (frame.deadline_ns, frame.submitted_ns) == (1 << 61, 1 << 62)
    assert bytes(frame.metadata) == b"meta".ljust(layout.METADATA_BYTES, b"\0")
    first, second = frame.tensors[:2]
    assert (first.offset, first.nbytes, first.generation) == (FIRST + 40, 2 * 4 * 3 * 2, 0xFFFFFFFF)
    assert (first.dtype, first.ndim, first.space, first.flags) == (layout.DTypeCode.BFLOAT16, 3, layout.Space.SEGMENT, 0)
    assert (list(first.shape), list(first.strides)) == ([2, 4, 3, 0, 0, 0, 0, 0], [20, 5, 2, 0, 0, 0, 0, 0])
    assert (second.offset, second.nbytes, second.generation, second.ndim) == (FIRST + 512, 2, 2, 1)
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
    "metadata too long": (_spoil_header(metadata_bytes=161), "161 bytes of metadata; a frame carries at most 160"),
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
    "another space": (_spoil_descriptor(1, space=1), "tensor 1 lies in space 1"),
    "descriptor flags": (_spoil_descriptor(1, flags=0x80), "tensor 1 has flags 0x80"),
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
    "sizes whose product overflows to nothing": (_spoil_dims(1, [1 << 32, 1 << 32], [0, 0]), "tensor 1 .* more than the arena"),
    "sizes highest": (_spoil_dims(1, [INT64_MAX] * 8, [INT64_MAX] * 8), "tensor 1 .* more than the arena"),
    "sizes highest, strides none": (_spoil_dims(1, [INT64_MAX] * 8, [0] * 8), "tensor 1 .* more than the arena"),
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
    template.write(slot, 1, 0, 0, [(FIRST, 1), (FIRST + 256, 2)])
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
            at = choose.randrange(0, 64 + 3 * DESCRIPTOR.size, width)
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
@given(uint64s, st.integers(0, (1 << 32) - 1), uint64s, uint64s, st.binary(max_size=layout.TEXT_BYTES))
def test_a_completion_with_a_text_is_read_back(call_id: int, status: int, queued_ns: int, compute_ns: int, text: bytes) -> None:
    completion = Completion(call_id, status, 0, queued_ns, compute_ns, text)
    slot = private_slot(layout.COMPLETION_SLOT_BYTES)
    slot.bytes[:] = b"\xff" * len(slot.bytes)
    nbytes = write_completion(slot, completion)
    assert nbytes == CompletionFrame.body.offset + len(text)
    assert read_completion(bytes(slot.bytes[:nbytes])) == completion
    assert read_completion(bytes(slot.bytes)) == completion
    frame = CompletionFrame.from_buffer_copy(slot.bytes)
    assert (frame.call_id, frame.status, frame.text_bytes, frame.shape_count) == (call_id, status, len(text), 0)
    assert (frame.queued_ns, frame.compute_ns) == (queued_ns, compute_ns)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, INT64_MAX), max_size=8).map(tuple), min_size=1, max_size=layout.MAX_TENSORS))
def test_a_completion_with_shapes_is_read_back(shapes: list[tuple[int, ...]]) -> None:
    completion = Completion(1, layout.Status.OK, len(shapes), 2, 3, pack_shapes(shapes))
    slot = private_slot(layout.COMPLETION_SLOT_BYTES)
    nbytes = write_completion(slot, completion)
    for frame in (bytes(slot.bytes[:nbytes]), bytes(slot.bytes)):
        found = read_completion(frame)
        assert found == completion
        assert unpack_shapes(found.body) == shapes


@pytest.mark.parametrize(("ndim", "size"), [(9, 1), (UINT64_MAX, 1), (1, -1), (8, -INT64_MAX - 1)])
def test_a_shape_that_is_none_is_told_by_none(ndim: int, size: int) -> None:
    good = SHAPE.pack(2, 3, 4, *(0,) * 6)
    assert unpack_shapes(good) == [(3, 4)]
    assert unpack_shapes(good + SHAPE.pack(ndim, *(size,) * 8)) is None


@pytest.mark.parametrize("nbytes", [0, 1, 8, COMPLETION_HEADER.size - 1])
def test_a_completion_shorter_than_its_header_is_none(nbytes: int) -> None:
    assert read_completion(bytes(nbytes)) is None


@pytest.mark.parametrize(
    ("shape_count", "text_bytes"),
    [(13, 0), (65535, 0), (0, layout.TEXT_BYTES + 1), (0, 0xFFFFFFFF)],
)
def test_a_completion_with_counts_beyond_its_room_is_none(shape_count: int, text_bytes: int) -> None:
    frame = CompletionFrame(call_id=1, shape_count=shape_count, text_bytes=text_bytes)
    assert read_completion(bytes(frame)) is None


def test_a_completion_that_ends_before_its_body_is_none() -> None:
    slot = private_slot(layout.COMPLETION_SLOT_BYTES)
    for completion in (Completion(1, 1, 0, 0, 0, b"text"), Completion(1, 0, 2, 0, 0, pack_shapes([(1,), (2,)]))):
        nbytes = write_completion(slot, completion)
        assert read_completion(bytes(slot.bytes[: nbytes - 1])) is None


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=1100) | st.builds(lambda head, body: head + body, st.binary(min_size=64, max_size=64), st.just(bytes(960))))
def test_random_bytes_are_a_completion_within_their_bounds_or_none(frame: bytes) -> None:
    found = read_completion(frame)
    if found is not None:
        assert found.shape_count <= layout.MAX_TENSORS
        assert len(found.body) <= len(frame) - CompletionFrame.body.offset
        if found.shape_count:
            shapes = unpack_shapes(found.body)
            assert shapes is None or len(shapes) == found.shape_count


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


def test_a_private_slots_words_are_its_bytes() -> None:
    slot = private_slot(64)
    slot.words[3] = 0x1122334455667788
    assert struct.unpack_from("<Q", slot.bytes, 24) == (0x1122334455667788,)
    assert (len(slot.bytes), len(slot.words)) == (64, 8)
