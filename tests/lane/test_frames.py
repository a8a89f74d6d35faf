"""Frames of calls: what is written is read back, over whatever lay in the slot before, and is recognised by the right bytes."""

from __future__ import annotations

import ctypes
import itertools
import random
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shmbroker.arena.spec import CODE_OF, TensorSpec, spec_of
from shmbroker.errors import BadFrame, BadInput
from shmbroker.lane.frame_layout import DESCRIPTOR, SEQUENCE_WORD, SUBMISSION_HEADER
from shmbroker.lane.frames import FrameTemplate, constant_part, private_slot, taken_of
from shmbroker.memory import layout
from shmbroker.memory.layout import TensorDescriptor
from tests.lane.submissions import FIRST, OP_AT, TENSORS_AT, UINT32_MAX, UINT64_MAX, apart, check_all_inside, new_reader, placed
from tests.tensors import Tensor, tensors

# --- round trip --------------------------------------------------------------------------------------------------------------------------


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
    sequence = slot.words[SEQUENCE_WORD]
    template.write(slot, call_id, deadline_ns, submitted_ns, *apart(places))
    assert slot.words[SEQUENCE_WORD] == sequence, "L2: that is for the queue to write, last"

    # The zmq lane sends only what is used, the shm lane's slots come whole.
    for frame in (bytes(slot.bytes[: template.nbytes]), bytes(slot.bytes)):
        call = new_reader().read(frame)
        assert (call.call_id, call.op_id, call.deadline_ns, call.submitted_ns) == (call_id, op_id, deadline_ns, submitted_ns)
        assert call.metadata == metadata
        assert (len(call.inputs), len(call.outputs)) == (len(inputs), len(outputs))
        found = (*call.inputs, *call.outputs)
        assert list(zip([one.offset for one in found], call.generations, strict=True)) == places
        assert [(one.form.spec, one.form.strides) for one in found] == [*inputs, *outputs]
        assert [one.form.nbytes for one in found] == [spec.nbytes for spec, _ in (*inputs, *outputs)]
        check_all_inside(call)
    assert template.tensor_count == len(places)


@pytest.mark.parametrize("dtype", CODE_OF, ids=str)
@pytest.mark.parametrize("ndim", range(9))
def test_every_dtype_and_rank_is_carried(dtype: torch.dtype, ndim: int) -> None:
    tensor = torch.empty((3, 2, 1, 2, 3, 1, 2, 2)[:ndim], dtype=dtype)
    for view in (tensor, tensor.permute(tuple(reversed(range(ndim)))), tensor[..., ::2] if ndim else tensor):
        template = FrameTemplate(1, [(spec_of(view), view.stride())], [])
        slot = private_slot(layout.SUBMISSION_SLOT_BYTES)
        template.write(slot, 1, 0, 0, [FIRST], [1])
        (found,) = new_reader().read(bytes(slot.bytes)).inputs
        memory = torch.empty(found.form.extent_bytes, dtype=torch.uint8).view(dtype)
        again = memory.as_strided(found.form.spec.shape, found.form.strides)
        assert (again.shape, again.stride(), again.dtype) == (view.shape, view.stride(), view.dtype)


def test_one_template_writes_many_calls_each_with_its_own_places() -> None:
    spec = TensorSpec((4,), torch.float32)
    template = FrameTemplate(1, [(spec, (1,))], [(spec, (1,))])
    slot = private_slot(layout.SUBMISSION_SLOT_BYTES)
    reader = new_reader()
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


def test_a_private_slots_words_and_halves_are_its_bytes() -> None:
    slot = private_slot(128)
    slot.words[3] = 0x1122334455667788
    slot.halves[9] = 0x99AABBCC
    assert struct.unpack_from("<QII", slot.bytes, 24) == (0x1122334455667788, 0, 0x99AABBCC)
    assert bytes(slot.head) == bytes(slot.bytes[:64])
    assert (len(slot.bytes), len(slot.words), len(slot.halves), len(slot.head)) == (128, 16, 32, 64)


# --- slots remember what was written last ------------------------------------------------------------------------------------------------


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
    reader = new_reader()
    for index in data.draw(st.lists(st.integers(0, len(known) - 1), min_size=2, max_size=12)):
        template, own = known[index]
        offsets, generations = apart([data.draw(placed(tensor)) for tensor in own])
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


# --- what a call is recognised by (F3) ---------------------------------------------------------------------------------------------------


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
    reader = new_reader()
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
