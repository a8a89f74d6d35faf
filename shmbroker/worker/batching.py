"""Which calls of several clients are computed together, and who is waited for: clients that decode, kept in step.

A call that is held waits for the same op's call of other clients. Clients that go through the same ops over and over, token by token, meet at one of
them, where each waits for those that are on their way; from there on those that were computed together are waited for a moment at each op.

B1  A call is held only while a client is expected that calls the same op as often, and only where their calls together took less time than one by one
    (or it is still to be found out).
B2  At one op of a token it is held for at most half of its client's token; at each other one for at most 0.3 ms, or a fifth of what the op takes for
    many, if that is longer; and never past its deadline.
B3  Only calls of clients of one user are computed together, unless those of all may be; each client is given its own rows and no others.
B4  Where calls that are computed together fail, each is run by itself and has its own outcome.
B5  A client that is gone, or does something else, is not waited for.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from shmbroker.lane.frame_layout import SUBMISSION_HEADER
from shmbroker.lane.frames import Taken, taken_of
from shmbroker.lane.shm_lane import ShmWorkerLane
from shmbroker.worker.backlog import rows_of
from shmbroker.worker.channel import WorkerChannel
from shmbroker.worker.gathering import MOST_ROWS, Costs, Form, Gatherer, form_of
from shmbroker.worker.prepared_call import PreparedCall

Among = Literal["user", "all"]
"""Whose calls may be computed together: those of one user's clients, or of all."""

STEP_HOLD_NS = 300_000
"""At most, at an op that clients come to one after the other anyway;"""

STEP_PART = 0.2
"""or for this part of the time that the op takes for many, if that is longer."""

TOKEN_PART = 0.5
"""Of the time that its client's token takes without being held: how long a call is held, at most, at the op where clients meet."""

DEADLINE_MARGIN_NS = 1_000_000
"""Before a call's deadline, beside the time that it takes."""

_AGES = 3.0
"""Of its own token's time: a client that has not come for so long is not on its way."""

_LONGER = 4.0
"""Than those before: a token that took more counts as one that took so many times as long, since its client may have done something else."""

_CLEARLY = 2.0
"""How much longer a client's own time must be before another op, for that to be the better one to meet at."""

_NEW = 0.5
"""The part that one token has in what is known of a client's time."""

_MOST_FORMS = 1024
"""Frames of a channel that are remembered; beyond that the record starts over."""

MOST_HOLD_NS = 1e9
"""Of any call, however slow its client seems."""

ALONE_NS = 1e9
"""How long the calls of a client are run by themselves, after one has failed with others and by itself."""

Prepare = Callable[[WorkerChannel, Taken], PreparedCall | None]
"""The call of a frame that may be run with others."""


@dataclass(slots=True, eq=False)
class Decoder:
    """A client's channel, as far as it goes through the same ops over and over."""

    channel: WorkerChannel
    user: Hashable
    came_ns: dict[Gatherer, int] = field(default_factory=dict)
    """When it last came to each op."""
    forms: dict[bytes, tuple[Form, Gatherer] | None] = field(default_factory=dict)
    """By a frame's constant part."""
    token_ns: float = 0.0
    """Between two calls of the same op; 0 as long as none was called twice."""
    own_token_ns: float = 0.0
    """Of it, what is left without being held."""
    meeting: Gatherer | None = None
    """The op at which others are waited for."""
    met_ns: int = 0
    """When it last came there."""
    held_ns: int = 0
    """How long calls have been held since."""
    done_ns: int = 0
    """When its last call was done."""
    alone_until_ns: float = 0.0
    """Its calls are run by themselves until then."""
    refused: bytes | None = None
    """The frame that was looked at last, and is to be run by itself."""
    last: Gatherer | None = None
    """The op that it came to last."""
    held: Held | None = None


@dataclass(slots=True, eq=False)
class Held:
    """A call that waits for others of its kind."""

    decoder: Decoder
    lane: ShmWorkerLane
    taken: Taken
    prepared: PreparedCall
    rows: int
    seen_ns: int
    until_ns: float

    @property
    def channel(self) -> WorkerChannel:
        """Whose call it is."""
        return self.decoder.channel


@dataclass(slots=True, eq=False)
class Batch:
    """The calls of one kind that are held."""

    gatherer: Gatherer
    user: Hashable
    held: list[Held] = field(default_factory=list)

    @property
    def until_ns(self) -> float:
        """When the first of them is held no longer."""
        return min([one.until_ns for one in self.held])


class Batching:
    """Holds calls and tells which are due. The frame thread's own. ``among``: see :data:`Among`."""

    def __init__(self, among: Among) -> None:
        self._all = among == "all"
        self._decoders: dict[int, Decoder] = {}
        """By the channel's number."""
        self._gatherers: weakref.WeakValueDictionary[Hashable, Gatherer] = weakref.WeakValueDictionary()
        """By form and user: what one user's clients do tells nothing to another's. They end with the last channel that uses them."""
        self._costs: weakref.WeakValueDictionary[Hashable, Costs] = weakref.WeakValueDictionary()
        self._batches: dict[tuple[Gatherer, Hashable], Batch] = {}

    # --- coming and going ---------------------------------------------------------------------------------------------------------------

    def holds(self, channel: WorkerChannel, lane: ShmWorkerLane, now_ns: int, prepare: Prepare) -> bool:
        """Whether the call that is next on ``channel`` is held; it becomes so here, where it is one that may be computed with others.

        ``prepare`` is asked once for each frame.
        """
        decoder = self._decoders.get(channel.number)
        if decoder is None:
            user = None if self._all else channel.user if channel.user is not None else ("unknown", channel.number)
            decoder = self._decoders[channel.number] = Decoder(channel, user)
        if decoder.held is not None:
            return True
        if channel.unfinished is not None or not channel.waiting or now_ns < decoder.alone_until_ns:
            return False
        frame = channel.waiting[0][0]
        if frame is decoder.refused:
            return False
        decoder.refused = frame
        if len(frame) < SUBMISSION_HEADER.size or rows_of(frame) > MOST_ROWS:
            return False
        taken = taken_of(frame)
        prepared = prepare(channel, taken)
        if prepared is None:
            return False
        known = decoder.forms[taken[3]] if taken[3] in decoder.forms else self._learn(decoder, taken[3], prepared)
        if known is None:
            return False
        decoder.refused = None
        self._hold(decoder, lane, taken, prepared, known, now_ns)
        return True

    def is_held(self, channel: WorkerChannel) -> bool:
        """Whether its next call is held."""
        decoder = self._decoders.get(channel.number)
        return decoder is not None and decoder.held is not None

    def forget(self, channel: WorkerChannel) -> None:
        """It is gone, and what was held of it (B5)."""
        decoder = self._decoders.pop(channel.number, None)
        if decoder is not None and decoder.held is not None:
            self._release([decoder.held])

    def clear(self) -> None:
        """Hold nothing any more."""
        self._release([one.held for one in self._decoders.values() if one.held is not None])
        self._decoders.clear()

    # --- what is due --------------------------------------------------------------------------------------------------------------------

    def due(self, now_ns: int) -> list[Batch]:
        """Calls that are held no longer, by those that are to be run together."""
        return [batch for batch in self._batches.values() if batch.until_ns <= now_ns or not any(self._missing(batch, now_ns))]

    def seconds(self, now_ns: int) -> float | None:
        """Until something is due that is held now; None where nothing is."""
        if not self._batches:
            return None
        return max(0.0, (min([batch.until_ns for batch in self._batches.values()]) - now_ns) / 1e9)

    # --- running them -------------------------------------------------------------------------------------------------------------------

    def begin(self, batch: Batch, now_ns: int) -> bool:
        """Let go of the calls of ``batch``, to be run now; returns whether together."""
        for held in batch.held:
            held.decoder.held_ns += now_ns - held.seen_ns
        calls = list(batch.held)
        self._release(calls)
        batch.held = calls
        return batch.gatherer.costs.is_worth_trying([held.rows for held in calls])

    def ended(self, batch: Batch, done_ns: int, together_ns: int | None) -> None:
        """They were run, in so much time ``together``; None where they were not."""
        for held in batch.held:
            held.decoder.done_ns = done_ns
        if together_ns is not None:
            batch.gatherer.costs.measured(sum([held.rows for held in batch.held]), together_ns)

    def leave_alone(self, held: Held, now_ns: int) -> None:
        """A call has failed with others, and by itself."""
        held.decoder.alone_until_ns = now_ns + ALONE_NS

    # --- inside -------------------------------------------------------------------------------------------------------------------------

    def _learn(self, decoder: Decoder, key: bytes, prepared: PreparedCall) -> tuple[Form, Gatherer] | None:
        form = form_of(prepared)
        if len(decoder.forms) >= _MOST_FORMS:
            decoder.forms.clear()
        if form is None:
            decoder.forms[key] = None
            return None
        gatherer = self._gatherers.get((form.key, decoder.user))
        if gatherer is None:
            costs = self._costs.setdefault((form.shapes, decoder.user), Costs())
            gatherer = self._gatherers[form.key, decoder.user] = Gatherer(prepared, costs)
        decoder.forms[key] = form, gatherer
        return form, gatherer

    def _hold(
        self, decoder: Decoder, lane: ShmWorkerLane, taken: Taken, prepared: PreparedCall, known: tuple[Form, Gatherer], now_ns: int
    ) -> None:
        form, gatherer = known
        came_ns = min(max(taken[2], decoder.done_ns), now_ns) if decoder.done_ns else now_ns  # as its client says, within what can be
        self._note(decoder, gatherer, came_ns)
        longest_ns = max(gatherer.costs.by_rows.values(), default=0.0)
        at_most_ns = decoder.own_token_ns * TOKEN_PART if gatherer is decoder.meeting else max(STEP_HOLD_NS, STEP_PART * longest_ns)
        until_ns: float = now_ns + min(at_most_ns, MOST_HOLD_NS)
        if taken[1]:
            until_ns = min(until_ns, taken[1] - DEADLINE_MARGIN_NS - 2 * longest_ns)
        held = decoder.held = Held(decoder, lane, taken, prepared, form.rows, now_ns, until_ns)
        batch = self._batches.get((gatherer, decoder.user))
        if batch is None:
            batch = self._batches[gatherer, decoder.user] = Batch(gatherer, decoder.user)
        batch.held.append(held)
        rows = [one.rows for one in batch.held]
        if (
            gatherer is decoder.meeting
        ):  # those who meet here now are together at all other ops too: it is all of them that must be worth it
            others = [one for one in self._decoders.values() if self._comes_to(one, batch, came_ns)]
        else:
            others = list(self._missing(batch, now_ns))
        if not gatherer.costs.pays([*rows, *[form.rows] * len(others)]):
            held.until_ns = now_ns

    def _note(self, decoder: Decoder, gatherer: Gatherer, now_ns: int) -> None:
        """That the client came to this op."""
        if decoder.done_ns:
            gatherer.gap_ns = _mixed(gatherer.gap_ns, now_ns - decoder.done_ns)
        if decoder.last is not None:
            decoder.last.following = weakref.ref(gatherer)
        decoder.last = gatherer
        last_ns = decoder.came_ns.get(gatherer)
        decoder.came_ns[gatherer] = now_ns
        if last_ns is None:
            return
        decoder.token_ns = _mixed(decoder.token_ns, now_ns - last_ns)
        if decoder.meeting is None or gatherer is decoder.meeting:
            self._choose_meeting(decoder, now_ns)
        if gatherer is decoder.meeting:
            if decoder.met_ns:
                decoder.own_token_ns = _mixed(decoder.own_token_ns, now_ns - decoder.met_ns - decoder.held_ns)
            decoder.met_ns, decoder.held_ns = now_ns, 0

    def _choose_meeting(self, decoder: Decoder, now_ns: int) -> None:
        """The op before which clients take longest themselves, which is where a token begins; or the one that others have chosen."""
        recent_ns = now_ns - _AGES * decoder.token_ns
        decoder.came_ns = {one: came_ns for one, came_ns in decoder.came_ns.items() if came_ns >= recent_ns}
        longest = max(decoder.came_ns, key=lambda one: one.gap_ns)
        now = decoder.meeting
        if now is not None and now in decoder.came_ns and longest.gap_ns < _CLEARLY * now.gap_ns:
            return
        others = [
            one.meeting for one in self._decoders.values() if one is not decoder and one.meeting in decoder.came_ns
        ]  # of one user, all
        theirs = max(others, key=others.count, default=None)
        chosen = theirs if theirs is not None and longest.gap_ns < _CLEARLY * theirs.gap_ns else longest
        if chosen is not now:
            decoder.meeting, decoder.met_ns, decoder.own_token_ns = chosen, 0, decoder.own_token_ns or decoder.token_ns

    def _missing(self, batch: Batch, now_ns: int) -> Iterator[Decoder]:
        """The clients that calls of ``batch`` are held for (B1, B5)."""
        gatherer, until_ns = batch.gatherer, batch.until_ns
        meeting = any(held.decoder.meeting is gatherer for held in batch.held)
        for other in self._decoders.values():
            if not self._comes_to(other, batch, now_ns):
                continue
            if meeting:
                if other.came_ns[gatherer] + other.token_ns <= until_ns:
                    yield other
            elif other.held is None and self._comes_next(other, gatherer, now_ns):
                yield other

    @staticmethod
    def _comes_next(other: Decoder, gatherer: Gatherer, now_ns: int) -> bool:
        """Whether another client comes to this op next, and soon: it takes no longer itself than clients do."""
        if other.last is None or other.last.following is None or other.last.following() is not gatherer:
            return False
        return now_ns < other.done_ns + 2 * gatherer.gap_ns + STEP_HOLD_NS

    def _comes_to(self, other: Decoder, batch: Batch, now_ns: int) -> bool:
        """Whether another client comes to the op of ``batch`` once a token, also lately."""
        if other.user != batch.user or not other.token_ns or any(held.channel.share is other.channel.share for held in batch.held):
            return False
        came_ns = other.came_ns.get(batch.gatherer)
        return came_ns is not None and now_ns < came_ns + _AGES * other.token_ns

    def _release(self, calls: Sequence[Held]) -> None:
        for held in calls:
            held.decoder.held = None
        for key, batch in list(self._batches.items()):
            batch.held = [held for held in batch.held if held.decoder.held is held]
            if not batch.held:
                del self._batches[key]


def _mixed(known: float, new: float) -> float:
    if not known:
        return new
    return known + _NEW * (min(new, _LONGER * known) - known)
