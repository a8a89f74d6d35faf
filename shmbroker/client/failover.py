"""Failover: a channel that goes on with another worker of the same service when its own dies or drains.

The client holds inputs and output room of every call, so a call that was lost is sent again, to whoever takes over: its op may so be run twice, and
must be one that can be (a function of its inputs; no state on the worker). What a dead worker has half written is never looked at.

A worker takes over only if it tells the same identity as the first one (``Worker(identity=...)``): another model's answer would be a wrong answer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from shmbroker.call.client_memory import ClientMemory
from shmbroker.call.remote_op import RemoteOp
from shmbroker.call.report import Report
from shmbroker.call.statistics import OpStatistics, TrustCounts, nothing_told
from shmbroker.client.channel import Channel
from shmbroker.client.failover_op import FailoverOp
from shmbroker.errors import BadInput, NoSuchService, ShmBrokerError, WorkerLost, anew
from shmbroker.lane.outputs import OutSpec

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.05

Open = Callable[[frozenset[str]], Channel]
"""Opens a channel to a worker that is none of these. Raises :class:`NoSuchService` when there is none."""


class FailoverChannel:
    """Made by :meth:`Client.failover_channel`; used like a :class:`Channel`. Thread-safe."""

    def __init__(self, memory: ClientMemory, service: str, open_channel: Open, patience: float) -> None:
        self.memory = memory
        self.service = service
        self.patience = patience
        self.failovers = 0
        """How often another worker has taken over."""
        self._open_channel = open_channel
        self._lock = threading.Lock()
        self._passed_over: set[str] = set()
        self._closed = False
        self._statistics: list[OpStatistics] = []
        self._socket_bytes = 0
        self._later: deque[Callable[[], None]] = deque()
        self._background = False
        """Whether a thread is at it."""
        self._background_lock = threading.Lock()
        self._trust: Callable[[], TrustCounts] = nothing_told
        self.refuse: Callable[[Channel], bool] = lambda found: False
        """Whether a worker that could take over must not."""
        self._counted: Channel | None = None
        """The lost channel whose bytes are counted already."""
        self.channel = open_channel(frozenset())
        """The one in use."""

    @property
    def trust(self) -> Callable[[], TrustCounts]:
        """As :class:`Channel`'s; of whichever is in use."""
        return self._trust

    @trust.setter
    def trust(self, told: Callable[[], TrustCounts]) -> None:
        self._trust = self.channel.trust = told

    @property
    def lane(self) -> str:
        """Of the channel in use; so are ``doorbell``, ``control``, ``worker_name`` and ``worker_pid``."""
        return self.channel.lane

    @property
    def doorbell(self) -> str:
        """See ``lane``."""
        return self.channel.doorbell

    @property
    def control(self) -> str:
        """See ``lane``."""
        return self.channel.control

    @property
    def worker_name(self) -> str:
        """See ``lane``."""
        return self.channel.worker_name

    @property
    def worker_pid(self) -> int:
        """See ``lane``."""
        return self.channel.worker_pid

    def bind(self, op: str, *, out_spec: OutSpec | None = None, **static: Any) -> FailoverOp:
        """As :meth:`Channel.bind`; bound anew on each worker that takes over."""
        statistics = OpStatistics(op)
        self._statistics.append(statistics)

        def bind(channel: Channel) -> RemoteOp:
            bound = channel.bind_counted(op, statistics, out_spec=out_spec, **static)
            if bound.in_place:
                raise BadInput(
                    f"op {op!r} works in place: sent again to another worker, it would read what the first one has half written; bind it on a "
                    "client.channel()"
                )
            return bound

        return FailoverOp(self, op, bind)

    def replace(self, lost: Channel, error: ShmBrokerError) -> None:
        """Have another worker take over from ``lost``, unless one has already. Raises ``error``'s kind when none comes in time."""
        with self._lock:
            if self._closed:
                raise anew(error) from None
            if self.channel is not lost:
                return
            if self.memory.refused:
                raise anew(error) from None
            log.warning("%s; looking for another worker that offers %r", error, self.service)
            self._replace(lost, error, self.patience)

    def _replace(self, lost: Channel, error: ShmBrokerError, patience: float) -> None:
        """With the lock held."""
        begun = time.monotonic()
        self._passed_over.add(lost.worker_id)
        if self._counted is not lost:  # an earlier attempt may have found nobody
            self._counted = lost
            self._socket_bytes += lost.report().socket_bytes
        lost.close()
        found = self._next(lost, error, begun + patience)
        found.trust = self._trust
        self.channel = found
        if self._closed:  # meanwhile: whoever closed did not know of it
            found.close()
            raise anew(error) from None
        self.failovers += 1
        log.warning(
            "worker %r (pid %d) took over after %.2f s", self.channel.worker_name, self.channel.worker_pid, time.monotonic() - begun
        )

    def trouble(self) -> str:
        """Why no call could be made now, in words; empty when one can. If the worker is dead, and another can take over, it does so now.

        Never waits for a worker that is not there yet.
        """
        channel = self.channel
        error = channel.loss()
        if error is None:
            return ""
        if self._closed:
            return "the channel is closed"
        if not self._lock.acquire(blocking=False):
            return f"{error}; a call is waiting for another worker"
        try:
            if self.channel is channel:
                self._replace(channel, error, 0.0)
        except ShmBrokerError as reason:
            return str(reason)
        finally:
            self._lock.release()
        return ""

    def _next(self, lost: Channel, error: ShmBrokerError, until: float) -> Channel:
        refused = ""
        while True:
            try:
                found = self._open_channel(frozenset(self._passed_over))
            except (NoSuchService, ShmBrokerError) as why:
                if not isinstance(why, NoSuchService):
                    refused = f" ({why})"
            else:
                if found.identity == lost.identity and not self.refuse(found):
                    return found
                refused = f" (worker {found.worker_name!r} offers it with other weights or ops: {found.identity}, not {lost.identity})"
                if found.identity == lost.identity:
                    refused = f" (worker {found.worker_name!r} must not be given this)"
                self._passed_over.add(found.worker_id)
                found.close()
            if self._closed or self.memory.refused:
                raise anew(error) from None
            if time.monotonic() >= until:
                raise WorkerLost(
                    f"{error}; none took over within {self.patience:g} s{refused}: start one, or wait longer (--failover)"
                ) from None
            time.sleep(_LOOK_SECONDS)

    def report(self) -> Report:
        """As :meth:`Channel.report`, over all workers so far; tells how often another one took over."""
        channel = self.channel
        socket_bytes = self._socket_bytes + channel.report().socket_bytes
        return Report.of(self._statistics, channel.lane, channel.doorbell, channel.control, socket_bytes, self.failovers, channel.device)

    def forget_statistics(self) -> None:
        """As :meth:`Channel.forget_statistics`, of all ops, whichever worker they are bound on."""
        for one in self._statistics:
            one.reset()
        self.channel.forget_statistics()

    # --- calls that no thread waits for -----------------------------------------------------------------------------------------------

    def later(self, action: Callable[[], None]) -> None:
        """Have ``action()`` done in the background: what may wait for another worker, or must not be done by this thread."""
        with self._background_lock:
            self._later.append(action)
            if not self._background:
                threading.Thread(target=self._run_later, name="shmbroker-failover", daemon=True).start()
                self._background = True

    def _run_later(self) -> None:
        while True:
            with self._background_lock:
                if not self._later:
                    self._background = False
                    return
                action = self._later.popleft()
            try:
                action()
            except Exception:  # the others wait for their turn
                log.exception("sending calls again")
            del action

    # --- leaving ----------------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the channel in use; nobody takes over any more. A second time does nothing."""
        self._closed = True
        self.channel.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.failovers} failovers"
        return f"<FailoverChannel for {self.service!r}, {state}, on {self.channel!r}>"
