"""A channel as its worker sees it: how a frame of it is run."""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from shmbroker.control.liveness import Watch
from shmbroker.control.messages import OpenChannel
from shmbroker.errors import describe
from shmbroker.lane.completion_frames import Completion, CompletionFields, pack_text
from shmbroker.lane.ends import fence
from shmbroker.lane.frame_layout import SUBMISSION_HEADER
from shmbroker.lane.frames import Taken, taken_of
from shmbroker.lane.op_error import pack_op_error
from shmbroker.memory.layout import TEXT_BYTES, ChannelStatistics, Status, offset_of
from shmbroker.memory.statistics_block import StatisticsBlock
from shmbroker.worker.counters import ChannelCounters
from shmbroker.worker.device_completions import InFlight
from shmbroker.worker.device_memory import Launched
from shmbroker.worker.frame_opener import FrameOpener, Rejected
from shmbroker.worker.kept_tensors import DEFAULT_KEPT_BYTES, KeptTensors
from shmbroker.worker.mapped_segment import MappedSegment
from shmbroker.worker.ops import BoundOp
from shmbroker.worker.pieces import PieceSize, RunUnits
from shmbroker.worker.prepared_call import PreparedCall
from shmbroker.worker.shares import Share

log = logging.getLogger(__name__)

_KNOWN_CALLS = 4096
"""Frames remembered with their tensors; beyond that the record starts over."""

_WORKER_STATISTICS = offset_of(ChannelStatistics, "worker_revision")
_WORD = (1 << 64) - 1
_call_id_bytes = slice(8, 16)
_OP_ID_BYTES = 4
"""With which a frame's constant part begins."""

_clock_ns = time.monotonic_ns


def _nobody() -> int:
    return 0


@dataclass(slots=True)
class Unfinished:
    """A call that is run in pieces, between two of them."""

    call_id: int
    key: bytes
    queued_ns: int
    prepared: PreparedCall
    known: bool
    size: PieceSize
    units: int
    run: RunUnits | None
    done: int = 0
    """Of the units."""
    compute_ns: int = 0


@dataclass(slots=True)
class WorkerChannel:
    """One open channel: the ops bound on it, what is kept for it, and the calls it knows.

    :meth:`run`, :meth:`go_on` and :meth:`close` are called by whoever has the turn. ``waiting`` is its lane's thread's. The control thread binds and
    publishes: it adds to ``ops`` and ``state`` what calls look up, and reads ``counters``. Whoever completes a call that a device worked on adds to
    ``counters`` too, and forgets a call that failed; each is one step of a dict.
    """

    number: int
    opened: OpenChannel
    mapped: MappedSegment
    watch: Watch
    share: Share
    """Of the worker's time: its client's."""
    user: int | None = None
    """That its client ran as when it connected, as the kernel says; None where that cannot be told from here."""
    token: bytes = b""
    ops: dict[int, BoundOp] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    """What ops keep for this channel."""
    counters: ChannelCounters = field(default_factory=ChannelCounters)
    tracebacks: bool = True
    """Whether an op's error carries its traceback to the client."""
    waiting: deque[tuple[bytes, int]] = field(default_factory=deque)
    """Frames that were taken and not yet run, with the rows that each was counted as."""
    waiting_rows: int = 0
    lane_waiting: Callable[[], int] = _nobody
    """How many frames wait in its lane."""
    share_ppm: int = 0
    """Of the time that the worker computed lately: its client's."""
    unfinished: Unfinished | None = None
    """The call that is being run in pieces."""
    _published: tuple[int, ...] = ()
    kept: KeptTensors = field(default_factory=lambda: KeptTensors(DEFAULT_KEPT_BYTES))
    _op_ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _prepared: dict[bytes, PreparedCall] = field(default_factory=dict)
    _opener: FrameOpener = field(init=False)

    def __post_init__(self) -> None:
        self._opener = FrameOpener(self.mapped, self.ops, self.kept)

    def bind(self, op: BoundOp) -> int:
        """Give ``op`` a number on this channel."""
        op_id = next(self._op_ids)
        self.ops[op_id] = op
        return op_id

    def wait(self, frame: bytes, rows: int = 0) -> None:
        """Have a frame that was taken wait for its turn."""
        self.waiting.append((frame, rows))
        self.waiting_rows += rows

    def next_waiting(self) -> bytes:
        """The frame that has waited longest."""
        frame, rows = self.waiting.popleft()
        self.waiting_rows -= rows
        return frame

    def run_frame(self, frame: bytes, draining: bool, divide: bool = False) -> CompletionFields | InFlight | None:
        """:meth:`run` for a frame that may be of any length."""
        if len(frame) < SUBMISSION_HEADER.size:
            self.counters.calls += 1
            self.counters.errors += 1
            text = pack_text(f"a frame of {len(frame)} bytes is shorter than its header")
            return Completion(int.from_bytes(frame[_call_id_bytes], "little"), Status.BAD_FRAME, 0, 0, text)
        return self.run(taken_of(frame), draining, divide)

    def run(self, taken: Taken, draining: bool, divide: bool = False) -> CompletionFields | InFlight | None:
        """Run a call that was taken. Every outcome, also of a frame that makes no sense, is a completion.

        ``divide``: run only the first piece of a long call, where it can be divided: then None is returned, and :meth:`go_on` runs the next one.
        """
        taken_ns = _clock_ns()
        call_id, deadline_ns, submitted_ns, key, frame = taken
        if draining:
            return Completion(call_id, Status.DRAINING, 0, 0, b"")
        counters = self.counters
        counters.calls += 1
        queued_ns = taken_ns - submitted_ns if taken_ns > submitted_ns else 0
        counters.queued_ns += queued_ns
        if deadline_ns and taken_ns > deadline_ns:
            counters.errors += 1
            return Completion(call_id, Status.EXPIRED, queued_ns, 0, b"")
        prepared = self._prepared.get(key)
        known = prepared is not None
        begun_ns = taken_ns
        try:
            if prepared is None:
                prepared = self._opener.open(frame, key)
                prepared.watch()
                begun_ns = _clock_ns()
            if divide and prepared.pieces is not None:
                units, run_units = prepared.pieces.begin()
                if units > 1:
                    self.unfinished = Unfinished(call_id, key, queued_ns, prepared, known, prepared.pieces.size, units, run_units)
                del run_units  # what it holds of the inputs must not be taken for the op's doing
                if units > 1:
                    return self.go_on()
            # fault: before op running
            launched = prepared.run()
            # fault: after result written
        except Rejected as error:
            counters.errors += 1
            log.warning("call %d of %s was refused: %s", call_id, self.opened.client_name, error)
            return Completion(call_id, Status.BAD_FRAME, queued_ns, 0, pack_text(str(error)))
        except BaseException as error:  # whatever the op raises, SystemExit too, is the answer to the call; the worker lives on
            return self.failed(call_id, key, queued_ns, begun_ns, error)
        compute_ns = _clock_ns() - begun_ns
        counters.compute_ns += compute_ns
        in_flight = None
        if launched is not None:
            if self.mapped.memory.asynchronous and hasattr(launched, "wait"):
                in_flight = self._in_flight(cast(Launched, launched), call_id, key, queued_ns, begun_ns)
            launched = None  # an op may return an input
        if in_flight is not None and known:
            return in_flight
        return self.ended(call_id, key, queued_ns, begun_ns, compute_ns, prepared, known, in_flight)

    def ended(
        self,
        call_id: int,
        key: bytes,
        queued_ns: int,
        begun_ns: int,
        compute_ns: int,
        prepared: PreparedCall,
        known: bool = True,
        in_flight: InFlight | None = None,
    ) -> CompletionFields | InFlight:
        """What becomes of a call whose op was run, or launched: its completion. ``known``: that it has run before."""
        try:
            changed = in_flight is None and prepared.changed()
            if changed or not known:
                self._look_closer(key, prepared, changed)
        except Exception as error:  # ContractBroken; and what an odd tensor makes of the look at it must not end the worker
            return self.failed(call_id, key, queued_ns, begun_ns, error)
        return in_flight or (call_id, 0, queued_ns, compute_ns, b"")

    def go_on(self) -> CompletionFields | None:
        """Run the next piece of the call that is ``unfinished``. Returns its completion after the last one, None before."""
        one = self.unfinished
        assert one is not None
        assert one.run is not None
        units = one.size.next(one.units - one.done)
        begun_ns = _clock_ns()
        try:
            one.run(one.done, one.done + units)
            piece_ns = _clock_ns() - begun_ns
            one.size.measured(units, piece_ns)
            one.done += units
            one.compute_ns += piece_ns
            self.counters.compute_ns += piece_ns
            if one.done < one.units:
                return None
            self.unfinished = one.run = None  # what it holds of the inputs must not be taken for the op's doing
            changed = one.prepared.changed()
            if changed or not one.known:
                self._look_closer(one.key, one.prepared, changed)
        except BaseException as error:  # as in run
            self.unfinished = None
            return self.failed(one.call_id, one.key, one.queued_ns, begun_ns - one.compute_ns, error)
        return one.call_id, 0, one.queued_ns, one.compute_ns, b""

    def known(self, taken: Taken) -> PreparedCall | None:
        """The call of a frame that was met before."""
        return self._prepared.get(taken[3])

    def may_be_opened(self, taken: Taken) -> bool:
        """Whether it is worth looking at a frame before its turn: its op can be run for several."""
        op = self.ops.get(int.from_bytes(taken[3][:_OP_ID_BYTES], "little"))
        return op is not None and op.batch_key is not None

    def opened_ahead(self, taken: Taken) -> PreparedCall | None:
        """The call of a frame whose kind is known. None for any other, also a bad one: that is told when it is run."""
        try:
            opened = self._opener.open(taken[4], taken[3], ahead=True)
        except BaseException:  # of an out_spec too
            return None
        if not opened.repeatable:
            return None
        opened.watch()
        self._keep(taken[3], opened)
        return opened

    def expired(self, taken: Taken, taken_ns: int) -> CompletionFields | None:
        """The completion of a call that is to be run with others, where its deadline is over."""
        call_id, deadline_ns, submitted_ns, _, _ = taken
        if not deadline_ns or taken_ns <= deadline_ns:
            return None
        queued_ns = max(0, taken_ns - submitted_ns)
        self.counters.calls += 1
        self.counters.errors += 1
        self.counters.queued_ns += queued_ns
        return Completion(call_id, Status.EXPIRED, queued_ns, 0, b"")

    def batched(self, taken: Taken, taken_ns: int, compute_ns: int, calls: int) -> CompletionFields:
        """The completion of a call that was run with others, ``calls`` in all. ``compute_ns``: its part of the time."""
        counters, queued_ns = self.counters, max(0, taken_ns - taken[2])
        counters.calls += 1
        counters.queued_ns += queued_ns
        counters.compute_ns += compute_ns
        counters.batched += 1
        counters.batched_with += calls
        return taken[0], 0, queued_ns, compute_ns, b""

    def _look_closer(self, key: bytes, prepared: PreparedCall, changed: bool) -> None:
        """At a call that has run for the first time, or after which an input is not as it was. Raises :class:`ContractBroken`."""
        if changed:
            self._prepared.pop(key, None)
            prepared.check()
        else:
            prepared.check_copies()
            self._keep(key, prepared)

    def failed(self, call_id: int, key: bytes, queued_ns: int, begun_ns: int, error: BaseException) -> CompletionFields:
        """The completion of a call whose op has raised ``error``, or has done what it may not."""
        self.counters.errors += 1
        self._prepared.pop(key, None)
        ended_ns = _clock_ns()
        log.warning("call %d of %s failed: %s", call_id, self.opened.client_name, describe(error), exc_info=error)
        text = pack_text(pack_op_error(error, TEXT_BYTES, traceback=self.tracebacks))
        return Completion(call_id, Status.OP_ERROR, queued_ns, ended_ns - begun_ns, text)

    def _in_flight(self, launched: Launched, call_id: int, key: bytes, queued_ns: int, begun_ns: int) -> InFlight:
        """A call that its device still works on; computing, here, is all until its last copy is done."""
        launched_ns = _clock_ns()

        def finish(error: BaseException | None) -> CompletionFields:
            if error is not None:
                return self.failed(call_id, key, queued_ns, begun_ns, error)
            done_ns = _clock_ns()
            self.counters.compute_ns += done_ns - launched_ns
            return call_id, 0, queued_ns, done_ns - begun_ns, b""

        return InFlight(launched, finish)

    def publish(self) -> None:
        """Tell in the client's segment what has been counted since the last time, for whoever looks."""
        counters = self.counters
        waiting = len(self.waiting) + self.lane_waiting()
        counted: tuple[int, ...] = (counters.calls, counters.errors, counters.compute_ns, counters.queued_ns, waiting, self.share_ppm)
        counted = *counted, counters.batched, counters.batched_with
        if counted != self._published:
            self._published = counted
            segment = self.mapped.segment
            block = StatisticsBlock(segment, segment.geometry.statistics_of(self.opened.index) + _WORKER_STATISTICS, fence)
            # What a client claims (when it submitted) must not make a number that has no room.
            block.write((_clock_ns(), *[min(value, _WORD) for value in counted]))

    def close(self) -> None:
        """Let go of the client's memory, and of what was kept for it. A call that is unfinished is left so: nobody waits for it."""
        self.unfinished = None
        self.waiting.clear()
        self._prepared.clear()
        self._opener.forget()
        self.kept.clear()
        self.watch.close()

    def _keep(self, key: bytes, prepared: PreparedCall) -> None:
        """For the next frame that is the same; or remember that its kind is sound, where it was tried out."""
        if prepared.tried_as is not None:
            prepared.op.prove(prepared.tried_as)
        if not prepared.repeatable:
            return
        if len(self._prepared) >= _KNOWN_CALLS:
            self._prepared.clear()
        self._prepared[key] = prepared
