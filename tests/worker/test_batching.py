"""Who is waited for, and for how long: by a clock that the test turns. B1 to B5."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from shmbroker.arena.spec import TensorSpec, contiguous_strides
from shmbroker.lane.doorbell import PollingBell
from shmbroker.lane.frames import FrameTemplate, Taken, private_slot
from shmbroker.lane.shm_lane import ShmWorkerLane
from shmbroker.memory import layout
from shmbroker.worker.batching import ALONE_NS, DEADLINE_MARGIN_NS, MOST_HOLD_NS, STEP_HOLD_NS, STEP_PART, Batch, Batching
from shmbroker.worker.channel import WorkerChannel
from shmbroker.worker.ops import OpDefinition
from shmbroker.worker.prepared_call import PreparedCall
from tests.worker.conftest import GEOMETRY, BareClient, Serving

ROW = TensorSpec((1, 1, 4), torch.float32)
OPS = 3
OP_NS = 100_000
GAP_NS = 50_000
TOKEN_GAP_NS = 5_000_000
"""What a client takes itself before an op, and before the first one of a token."""


def twice(x: torch.Tensor, *, out: torch.Tensor, index: int) -> None:
    torch.mul(x, 2, out=out)


TWICE = OpDefinition("twice", twice, lambda x, index: x, row_wise=True)


def prepared(channel: WorkerChannel, taken: Taken) -> PreparedCall | None:
    return channel.known(taken) or channel.opened_ahead(taken)


@dataclass
class Caller:
    """A client that calls op after op, token after token."""

    batching: Batching
    channel: WorkerChannel
    lane: ShmWorkerLane
    templates: list[FrameTemplate]

    def call(self, op: int, now_ns: int, deadline_ns: int = 0) -> bool:
        """Whether it is held."""
        slot = private_slot(layout.SUBMISSION_SLOT_BYTES)
        begin = GEOMETRY.arena_offset
        self.templates[op].write(slot, 1, deadline_ns, now_ns, [begin, begin + 256], [0, 0])
        self.channel.wait(bytes(slot.bytes[: self.templates[op].nbytes]))
        return self.batching.holds(self.channel, self.lane, now_ns, prepared)


@pytest.fixture
def caller(serving: Serving, new_client: Callable[[], BareClient]) -> Callable[..., Caller]:
    """Makes clients of a worker; every op was run by each, so that its kind is known."""

    def make(batching: Batching, user: int | None = 1) -> Caller:
        client = new_client()
        channel, _ = serving.open_shm(client)
        channel.user = user
        strides = contiguous_strides(ROW.shape)
        ids = [channel.bind(TWICE.bind({"index": index}, {})) for index in range(OPS)]
        made = Caller(
            batching,
            channel,
            ShmWorkerLane(client.segment, 0, PollingBell()),
            [FrameTemplate(op_id, [(ROW, strides)], [(ROW, strides)]) for op_id in ids],
        )
        for op in range(OPS):
            made.call(op, 1)
            channel.run_frame(channel.next_waiting(), False)
        return made

    return make


def run(batching: Batching, batch: Batch, now_ns: int) -> tuple[list[WorkerChannel], int]:
    """As the frame loop does; who was in it, and when it is over. Together they take no longer than one."""
    together = batching.begin(batch, now_ns)
    calls = list(batch.held)
    for held in calls:
        held.channel.next_waiting()
    done_ns = now_ns + OP_NS * (1 if together else len(calls))
    batching.ended(batch, done_ns, OP_NS if together else None)
    if not together:
        for held in calls:
            batch.gatherer.costs.measured(held.rows, OP_NS)
    return [held.channel for held in calls], done_ns


def tokens(batching: Batching, callers: list[Caller], count: int, now_ns: int) -> tuple[int, list[int]]:
    """Have each make so many tokens, each coming a little later than the one before it; the time, and how many calls each run had."""
    sizes = []
    for _ in range(count):
        for op in range(OPS):
            now_ns += GAP_NS if op else TOKEN_GAP_NS
            for caller in callers:
                now_ns += 10_000
                caller.call(op, now_ns)
            while (seconds := batching.seconds(now_ns)) is not None:
                due = batching.due(now_ns)
                for batch in due:
                    members, now_ns = run(batching, batch, now_ns)
                    sizes.append(len(members))
                if not due:
                    now_ns += 1 + int(seconds * 1e9)
    return now_ns, sizes


def test_clients_that_decode_meet_and_stay_together(caller: Callable[..., Caller]) -> None:
    """B1."""
    batching = Batching("user")
    callers = [caller(batching) for _ in range(3)]
    now_ns, _ = tokens(batching, callers, 8, 1)
    _, sizes = tokens(batching, callers, 4, now_ns)
    assert sizes == [3] * 4 * OPS


def together(batching: Batching, callers: list[Caller]) -> int:
    return tokens(batching, callers, 8, 1)[0]


def both_come(batching: Batching, first: Caller, other: Caller, now_ns: int) -> Batch:
    """To the first op, at one instant."""
    first.call(0, now_ns)
    other.call(0, now_ns)
    (batch,) = batching.due(now_ns)
    return batch


def test_a_client_is_waited_for_half_a_token_where_they_meet(caller: Callable[..., Caller]) -> None:
    """B2."""
    batching = Batching("user")
    first, other = caller(batching), caller(batching)
    now_ns = together(batching, [first, other]) + TOKEN_GAP_NS
    assert first.call(0, now_ns)
    assert not batching.due(now_ns)
    seconds = batching.seconds(now_ns)
    assert seconds is not None
    assert STEP_HOLD_NS < seconds * 1e9 <= (TOKEN_GAP_NS + OPS * (OP_NS * 2 + GAP_NS * 2)) / 2
    other.call(0, now_ns + 1_000_000)
    (batch,) = batching.due(now_ns + 1_000_000)
    assert len(batch.held) == 2


def test_a_client_that_is_on_its_way_is_waited_for_a_moment_at_the_other_ops(caller: Callable[..., Caller]) -> None:
    """B2, B5: and no longer, whatever it does."""
    batching = Batching("user")
    first, other = caller(batching), caller(batching)
    now_ns = together(batching, [first, other]) + TOKEN_GAP_NS
    for one in (first, other):
        one.call(0, now_ns)
    _, now_ns = run(batching, batching.due(now_ns)[0], now_ns)
    now_ns += GAP_NS
    assert first.call(1, now_ns)
    assert not batching.due(now_ns)
    assert batching.seconds(now_ns) == pytest.approx(max(STEP_HOLD_NS, STEP_PART * OP_NS) / 1e9)
    now_ns += STEP_HOLD_NS
    (batch,) = batching.due(now_ns)
    members, now_ns = run(batching, batch, now_ns)
    assert members == [first.channel]
    other.call(1, now_ns)
    _, now_ns = run(batching, batching.due(now_ns)[0], now_ns)
    assert first.call(2, now_ns)
    assert not batching.due(now_ns), "it comes next to where the other is"
    other.call(2, now_ns + 1000)
    assert len(batching.due(now_ns + 1000)[0].held) == 2


def test_no_call_is_held_past_its_deadline(caller: Callable[..., Caller]) -> None:
    """B2."""
    batching = Batching("user")
    first, other = caller(batching), caller(batching)
    now_ns = together(batching, [first, other]) + TOKEN_GAP_NS
    first.call(0, now_ns, deadline_ns=now_ns + 2 * DEADLINE_MARGIN_NS)
    seconds = batching.seconds(now_ns)
    assert seconds is not None
    assert seconds * 1e9 <= DEADLINE_MARGIN_NS
    batching.clear()
    first.channel.waiting.clear()
    first.call(0, now_ns, deadline_ns=now_ns + 1)
    assert batching.due(now_ns)


def test_who_has_gone_is_not_waited_for(caller: Callable[..., Caller]) -> None:
    """B5."""
    batching = Batching("user")
    first, other = caller(batching), caller(batching)
    now_ns = together(batching, [first, other]) + TOKEN_GAP_NS
    first.call(0, now_ns)
    assert not batching.due(now_ns)
    batching.forget(other.channel)
    assert len(batching.due(now_ns)) == 1
    batching.forget(first.channel)
    assert batching.seconds(now_ns) is None
    assert not batching.is_held(first.channel)


def test_who_has_not_come_for_long_is_not_waited_for(caller: Callable[..., Caller]) -> None:
    """B5: its user reads what it wrote."""
    batching = Batching("user")
    first, other = caller(batching), caller(batching)
    now_ns = together(batching, [first, other])
    now_ns, _ = tokens(batching, [first], 8, now_ns)
    first.call(0, now_ns + TOKEN_GAP_NS)
    assert batching.due(now_ns + TOKEN_GAP_NS)


@pytest.mark.parametrize(
    ("among", "users", "expected"), [("user", (1, 2), 1), ("user", (1, None), 1), ("user", (None, None), 1), ("all", (1, 2), 2)]
)
def test_calls_of_several_users_are_together_only_where_all_may_be(
    caller: Callable[..., Caller], among: str, users: tuple[int | None, int | None], expected: int
) -> None:
    """B3: and one whose user is not known is nobody's."""
    batching = Batching(among)  # type: ignore[arg-type]
    callers = [caller(batching, user) for user in users]
    now_ns = together(batching, callers)
    _, sizes = tokens(batching, callers, 4, now_ns)
    assert set(sizes) == {expected}


def test_what_does_not_pay_is_not_held(caller: Callable[..., Caller]) -> None:
    """B1."""
    batching = Batching("user")
    first, other = caller(batching), caller(batching)
    now_ns = together(batching, [first, other]) + TOKEN_GAP_NS
    batch = both_come(batching, first, other, now_ns)
    for _ in range(60):
        batch.gatherer.costs.measured(2, 3 * OP_NS)
    _, now_ns = run(batching, batch, now_ns)
    now_ns += GAP_NS
    first.call(1, now_ns)  # of the same shapes
    assert batching.due(now_ns)


def test_a_client_whose_calls_fail_is_left_alone_for_a_while(caller: Callable[..., Caller]) -> None:
    """B4."""
    batching = Batching("user")
    first, other = caller(batching), caller(batching)
    now_ns = together(batching, [first, other]) + TOKEN_GAP_NS
    batch = both_come(batching, first, other, now_ns)
    batching.leave_alone(batch.held[0], now_ns)
    _, now_ns = run(batching, batch, now_ns)
    assert not first.call(1, now_ns + GAP_NS)
    first.channel.waiting.clear()
    assert first.call(1, now_ns + int(ALONE_NS))


def test_no_call_is_held_for_longer_than_a_second(caller: Callable[..., Caller]) -> None:
    """B2: whatever a client says of when it called."""
    batching = Batching("user")
    first, other = caller(batching), caller(batching)
    now_ns = 10**15
    for _ in range(4):
        for one in (first, other):
            now_ns += 10 * int(MOST_HOLD_NS)
            one.call(0, now_ns)
            while not (due := batching.due(now_ns)):
                seconds = batching.seconds(now_ns)
                assert seconds is not None
                assert seconds <= MOST_HOLD_NS / 1e9
                now_ns += 1 + int(seconds * 1e9)
            for batch in due:
                run(batching, batch, now_ns)


def test_a_frame_is_looked_at_once(caller: Callable[..., Caller]) -> None:
    batching = Batching("user")
    first, looks = caller(batching), []
    first.channel.wait(b"x" * 2000)

    def look(channel: WorkerChannel, taken: Taken) -> None:
        looks.append(taken)

    for _ in range(3):
        assert not batching.holds(first.channel, first.lane, 1, look)
    assert len(looks) <= 1


def test_nothing_is_kept_for_clients_that_are_gone(caller: Callable[..., Caller]) -> None:
    batching = Batching("user")
    callers = [caller(batching) for _ in range(2)]
    now_ns = together(batching, callers) + TOKEN_GAP_NS
    callers[0].call(0, now_ns)
    gatherer = weakref.ref(batching.due(now_ns + 10**9)[0].gatherer)
    for one in callers:
        batching.forget(one.channel)
    assert gatherer() is None


def test_cleared_it_holds_nothing(caller: Callable[..., Caller]) -> None:
    """Not the calls either, whose tensors keep their clients' memory."""
    batching = Batching("user")
    first, other = caller(batching), caller(batching)
    now_ns = together(batching, [first, other]) + TOKEN_GAP_NS
    batch = both_come(batching, first, other, now_ns)
    calls = list(batch.held)
    batching.clear()
    assert batching.seconds(now_ns) is None
    assert [held.decoder.held for held in calls] == [None, None], "no cycle keeps them"
