"""What all sealed layers of one model share: the counts, and the end that a wrong result brings."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence

import msgspec

from shmbroker.call.statistics import TrustCounts
from shmbroker.errors import WrongResult, anew
from shmbroker.trust.pads import Alive, Pads
from tee_worker.trust.modes import PLAIN, TrustOptions


class TrustReport(msgspec.Struct, frozen=True):
    """What a mode means, and what came of it so far. Rows are tokens, for each product."""

    mode: str
    arithmetic: str
    bits: int
    """Of a weight; 0 where weights are as the model has them."""
    meaning: str
    checked: int
    """Rows whose results were checked."""
    rejected: int
    pads_taken: int
    pads_reused: int
    pads_waited: int
    """Of those taken, the rows that waited for a pad to be made."""
    pads_from: str
    same_host_shares: bool

    def render(self) -> str:
        """In lines for people."""
        lines = [f"trust {self.mode!r}{', approximate' if self.arithmetic == 'float' else ''}: {self.meaning}"]
        if self.mode != "plain":
            lines.append(f"{self.checked} rows checked, {self.rejected} rejected")
        if self.pads_taken:
            lines[-1] += f"; {self.pads_taken} pads taken, {self.pads_reused} reused, {self.pads_waited} waited for, made {self.pads_from}"
        if self.same_host_shares:
            lines.append("both workers are on this host: what each is given hides nothing from whoever controls the host")
        return "\n".join(lines)


def plain_report() -> TrustReport:
    """Of a run that trusts its worker."""
    return TrustReport("plain", "", 0, PLAIN.told(), 0, 0, 0, 0, 0, "", False)


class TrustSession:
    """Of one model. Thread-safe."""

    def __init__(self, options: TrustOptions, worker: Callable[[], str], keep_apart: Callable[[], None], pads_from: str) -> None:
        """``worker``: who computes now, by name. ``keep_apart``: raises where two workers are one. ``pads_from``: who makes the pads."""
        self.options = options
        self.alive = Alive() if options.mode.hides else None
        self.pads: list[Pads] = []
        self._worker = worker
        self._keep_apart = keep_apart
        self._pads_from = pads_from
        self._lock = threading.Lock()
        self._calls = itertools.count(1)
        self._checked = 0
        self._rejected = 0
        self._ended: WrongResult | None = None

    def begin(self) -> int:
        """The number of a call that is to be made. Raises :class:`WrongResult` after the end, :class:`PadsLost` in a child."""
        if self._ended is not None:
            raise anew(self._ended)
        if self.alive is not None:
            self.alive.check()
            self._keep_apart()
        return next(self._calls)

    def passed(self, rows: int) -> None:
        """So many rows were right."""
        with self._lock:
            self._checked += rows

    def reject(self, modules: Sequence[str], call: int, row: int) -> WrongResult:
        """End the session: the error to raise."""
        error = WrongResult(
            f"worker {self._worker()!r} gave a wrong result: row {row} of call {call}, {', '.join(modules)}; nothing of it was used, and this session has "
            "ended: find out what that worker is, and start anew with another"
        )
        with self._lock:
            self._rejected += 1
            self._ended = self._ended or error
        for pads in self.pads:
            pads.close()
        return error

    def counts(self) -> TrustCounts:
        """For status and metrics."""
        taken = sum(pads.taken for pads in self.pads)
        return TrustCounts(self.options.mode.value, self._checked, self._rejected, taken, sum(pads.waited for pads in self.pads))

    @property
    def trouble(self) -> str:
        """Why no call can be made any more; empty while one can."""
        return "" if self._ended is None else str(self._ended)

    def report(self) -> TrustReport:
        """Counts so far."""
        options = self.options
        return TrustReport(
            mode=options.mode.value,
            arithmetic=options.arithmetic.value,
            bits=options.bits if options.ring else 0,
            meaning=options.told(),
            checked=self._checked,
            rejected=self._rejected,
            pads_taken=sum(pads.taken for pads in self.pads),
            pads_reused=sum(pads.reused for pads in self.pads),
            pads_waited=sum(pads.waited for pads in self.pads),
            pads_from=self._pads_from,
            same_host_shares=options.same_host_shares,
        )
