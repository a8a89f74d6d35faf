"""Reading submissions: nothing that a peer may write is believed unchecked. Invariants F2 and F3."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shmbroker.arena.spec import DTYPE_OF, TensorSpec
from shmbroker.errors import BadFrame
from shmbroker.lane import submission_reader
from shmbroker.lane.frame_layout import DESCRIPTOR
from shmbroker.lane.frames import FrameTemplate, private_slot
from shmbroker.lane.submission_reader import Form
from shmbroker.memory import layout
from shmbroker.memory.layout import SubmissionFrame
from tests.lane.submissions import END, FIRST, INT64_MAX, TENSORS_AT, UINT64_MAX, check_all_inside, new_reader, valid_frame


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
    call = new_reader().read(bytes(valid_frame()))
    check_all_inside(call)
    assert (call.call_id, call.op_id, call.metadata) == (5, 7, b"\x80")


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_field_is_rejected_by_name(case: str) -> None:
    """F2."""
    spoil, told = MALFORMED[case]
    frame = valid_frame()
    spoil(frame)
    with pytest.raises(BadFrame, match=told):
        new_reader().read(bytes(frame))


@pytest.mark.parametrize("case", MALFORMED)
def test_a_reader_that_knows_the_forms_already_rejects_it_as_well(case: str) -> None:
    """F3: what is remembered is the form alone; and a rejected form is not remembered."""
    spoil, told = MALFORMED[case]
    reader = new_reader()
    reader.read(bytes(valid_frame()))
    frame = valid_frame()
    spoil(frame)
    for _ in range(2):
        with pytest.raises(BadFrame, match=told):
            reader.read(bytes(frame))
    check_all_inside(reader.read(bytes(valid_frame())))


def _expanded(code: int, shape: list[int]) -> bytes:
    """The valid frame, its second tensor one element that is seen many times over."""
    frame = valid_frame()
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
    form = new_reader().read(_expanded(code, [most])).inputs[1].form
    assert form.nbytes == most * dtype.itemsize
    assert torch.empty(1, dtype=dtype).as_strided(form.spec.shape, form.strides).nbytes == form.nbytes
    for shape in ([most + 1], [most, 2], [2, most], [INT64_MAX // dtype.itemsize]):
        with pytest.raises(BadFrame, match=r"tensor 1 .* bytes of elements, more than the arena"):
            new_reader().read(_expanded(code, shape))


@pytest.mark.parametrize("code", DTYPE_OF, ids=lambda code: layout.DTypeCode(code).name)
def test_no_more_bytes_are_believed_than_63_bits_can_tell(code: int) -> None:
    """torch counts bytes in signed 64 bits: beyond, it would count wrong."""
    dtype = DTYPE_OF[code]
    most = INT64_MAX // dtype.itemsize
    for shape in ([most // 2 + 1, 2], [most, 2], [1 << 32, (1 << 31) // dtype.itemsize], [most, most], [INT64_MAX, 1, INT64_MAX]):
        with pytest.raises(BadFrame, match=r"tensor 1 .* 63 bits"):
            new_reader().read(_expanded(code, shape))


@pytest.mark.parametrize("offset", [0, FIRST - 8, END + 8, UINT64_MAX - 7])
def test_an_empty_tensor_must_lie_in_the_arena_too(offset: int) -> None:
    frame = valid_frame()
    _spoil_dims(1, [0, 3], [3, 1])(frame)
    check_all_inside(new_reader().read(bytes(frame)))
    frame.tensors[1].offset = offset
    with pytest.raises(BadFrame, match=r"tensor 1 \(int64\[0, 3\]\) .* outside the arena"):
        new_reader().read(bytes(frame))


def test_the_last_element_may_lie_at_the_very_end() -> None:
    frame = valid_frame()
    frame.tensors[1].offset = END - 32
    assert new_reader().read(bytes(frame)).inputs[1].offset == END - 32


@pytest.mark.parametrize("metadata", [b"", b"m"])
def test_a_truncated_frame_is_rejected_at_every_length(metadata: bytes) -> None:
    spec = TensorSpec((4,), torch.float32)
    template = FrameTemplate(1, [(spec, (1,))], [(spec, (1,))], metadata)
    slot = private_slot(layout.SUBMISSION_SLOT_BYTES)
    template.write(slot, 1, 0, 0, [FIRST, FIRST + 256], [1, 2])
    whole = bytes(slot.bytes[: template.nbytes])
    new_reader().read(whole)
    for nbytes in range(len(whole)):
        with pytest.raises(BadFrame, match=f"a frame of {nbytes} bytes (is shorter than its header|ends before)"):
            new_reader().read(whole[:nbytes])


@settings(deadline=None, max_examples=400)
@given(st.binary(max_size=2200) | st.binary(min_size=2048, max_size=2048))
def test_random_bytes_raise_bad_frame_or_name_tensors_inside_the_arena(frame: bytes) -> None:
    """F2."""
    try:
        call = new_reader().read(frame)
    except BadFrame:
        return
    check_all_inside(call)


NASTY = [0, 1, 2, 7, 8, 9, 12, 13, 127, 128, 255, 256, 65535, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 61, 1 << 62, INT64_MAX, 1 << 63]
NASTY += [UINT64_MAX, UINT64_MAX - 1, UINT64_MAX - 255, FIRST - 1, FIRST, FIRST + 1, END - 1, END, END + 1, END - FIRST, (END - FIRST) // 8]


@pytest.mark.parametrize("seed", range(4))
def test_mutated_frames_raise_bad_frame_or_name_tensors_inside_the_arena(seed: int) -> None:
    """F2, F3: one reader for all of them, as in a worker."""
    choose = random.Random(seed)
    reader = new_reader()
    valid = bytes(valid_frame())
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
        check_all_inside(call)
    assert accepted > 100, "the mutations must not all be refused at the door"


def test_a_form_is_checked_once_and_remembered() -> None:
    """F3: forms are compared by identity."""
    reader = new_reader()
    first, second = reader.read(bytes(valid_frame())), reader.read(bytes(valid_frame()))
    assert [one.form for one in first.inputs] == [one.form for one in second.inputs]
    assert first.inputs[0].form is not first.inputs[1].form
    assert new_reader().read(bytes(valid_frame())).inputs[0].form is not first.inputs[0].form


def test_a_peer_that_sends_ever_new_forms_does_not_make_the_reader_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """F3."""
    monkeypatch.setattr(submission_reader, "KNOWN_FORMS", 16)
    reader = new_reader()
    frame = valid_frame()
    before = _living_forms()
    for size in range(1, 500):
        _spoil_dims(1, [size], [1])(frame)
        assert reader.read(bytes(frame)).inputs[1].form.spec.shape == (size,)
        if not size % 50:
            assert 0 < _living_forms() - before <= 16


def _living_forms() -> int:
    gc.collect()
    return sum(type(one) is Form for one in gc.get_objects())
