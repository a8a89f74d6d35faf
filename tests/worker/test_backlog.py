"""How many rows may wait."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shmbroker.arena.spec import TensorSpec, contiguous_strides
from shmbroker.lane.frames import FrameTemplate, private_slot
from shmbroker.memory import layout
from shmbroker.memory.layout import Status
from shmbroker.worker.backlog import Backlog, rows_of
from tests.worker.conftest import BareClient, Serving


def frame(*shape: int, call_id: int = 1) -> bytes:
    """A call with an output of that shape."""
    spec = TensorSpec(shape, torch.float32)
    form = spec, contiguous_strides(shape)
    slot = private_slot(layout.SUBMISSION_SLOT_BYTES)
    template = FrameTemplate(1, [form], [form])
    template.write(slot, call_id, 0, 1, [0, 0], [0, 0])
    return bytes(slot.bytes[: template.nbytes])


@pytest.mark.parametrize(("shape", "rows"), [((3, 5, 7), 15), ((7,), 1), ((), 1), ((4, 1), 4), ((0, 5), 1)])
def test_the_rows_of_a_call_are_those_of_its_first_output(shape: tuple[int, ...], rows: int) -> None:
    assert rows_of(frame(*shape)) == rows


@given(st.binary(max_size=500))
def test_whatever_a_frame_says_it_has_a_row_and_not_too_many(garbage: bytes) -> None:
    assert 1 <= rows_of(garbage) <= 1 << 31


def test_a_call_is_refused_only_when_its_client_has_another_one_waiting(serving: Serving, client: BareClient, new_client: object) -> None:
    """W5."""
    first, second = serving.open_zmq(client, 0)[0], serving.open_zmq(client, 1)[0]
    other = serving.open_zmq(new_client(), 0)[0]  # type: ignore[operator]
    backlog, all_of_them = Backlog(10), [first, second, other]
    assert backlog.let_in(first, frame(50, 1), all_of_them) is None
    assert backlog.let_in(other, frame(50, 1), all_of_them) is None
    refused = backlog.let_in(second, frame(1, 1, call_id=7), all_of_them)
    assert refused is not None
    assert refused[:2] == (7, Status.BUSY)
    assert b"100 rows wait, 1 more would be more than the 10 that may" in refused.body
    first.next_waiting()
    assert backlog.let_in(second, frame(1, 1), all_of_them) is None


def test_rows_up_to_the_bound_may_wait(serving: Serving, client: BareClient) -> None:
    channel = serving.open_zmq(client)[0]
    backlog = Backlog(10)
    assert [backlog.let_in(channel, frame(5, 1), [channel]) is None for _ in range(3)] == [True, True, False]
    assert channel.waiting_rows == 10
