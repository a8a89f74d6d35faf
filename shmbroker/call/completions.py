"""Waiting for completions: several threads may wait, one of them reads for all.

C1  One thread at a time, the leader, takes completions and blocks on the doorbell; the others wait for a word from it.
C2  A leader whose own call is done hands the lead to one that still waits.
C3  Nobody waits for longer than ``RECHECK_SECONDS`` at once, and after each such wait the peers' lives and the deadlines are looked at.
C4  Whoever must read alone for a moment (to close, to count the dead) is made way for after at most one such wait.
C5  A future's callbacks run when the lead is given up, so they may make calls and wait for them, and close the client.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from threading import get_ident
from typing import Protocol

from shmbroker.call.state import DONE, CallState
from shmbroker.lane.doorbell import RECHECK_SECONDS
from shmbroker.lane.ends import spin
from shmbroker.lane.python_ends import Receiver


class Waitable(Protocol):
    """A call that is waited for."""

    state: CallState
    wake: threading.Lock | None
    deadline_ns: int

    def expire(self) -> None:
        """Its deadline has passed."""


class Settling(Protocol):
    """A future of a call that is done."""

    def settle(self) -> None:
        """Take over the outcome; a second time does nothing."""


class Source(Protocol):
    """Where completions come from: a queue pair."""

    has_frames: Callable[[], bool]
    """Whether a completion is there to be taken."""
    receivers: tuple[Receiver, ...]
    """Where completions come from, to be looked at before blocking."""

    def drain(self) -> None:
        """Take all completions there are and finish their calls."""

    def check_peer(self) -> None:
        """Fail all outstanding calls when the peer is dead."""


CLOSING_SECONDS = 5.0
"""How long whoever closes waits for the background thread: it is done at once, unless a callback runs in it that does not return."""


class _Settled:
    """For the background thread: a call that is done, so that it looks for futures to settle."""

    def __init__(self) -> None:
        self.state: CallState = DONE
        self.wake: threading.Lock | None = None
        self.deadline_ns = 0

    def expire(self) -> None:
        """It has no deadline."""


BlockUntil = Callable[[Callable[[], bool], tuple[Receiver, ...], float], bool]


class CompletionLoop:
    """The waiters on one doorbell. ``block`` looks at the receivers for a while, then blocks until ``ready()``, at most so many seconds."""

    # What compiled calls look at too has slots.
    __slots__ = ("__dict__", "__weakref__", "_wanted")

    def __init__(self, block: BlockUntil, look_seconds: float = 0.0) -> None:
        """``look_seconds``: how long a leader looks at the receivers before it asks ``block``, which does the same and more."""
        self._block = block
        self._look_seconds = look_seconds
        self._set_sources([])
        self._leader = threading.Lock()
        self._followers: list[Waitable] = []
        self._unsettled: deque[Settling] = deque()
        """Futures whose calls are done, to be settled when the lead is given up: their callbacks may call, and wait, themselves (C5)."""
        self._wanted = 0
        """Threads that want the lead for a moment (C4). Counted, like the sources are changed, under a lock."""
        self._wanted_lock = threading.Lock()
        self._watched: queue.SimpleQueue[Waitable | None] = queue.SimpleQueue()
        self._watcher: threading.Thread | None = None
        self._watcher_lock = threading.Lock()

    def add(self, source: Source) -> None:
        """Take completions from ``source`` too."""
        with self._wanted_lock:  # two channels may be opened at once
            self._set_sources([*self._sources, source])

    def remove(self, source: Source) -> None:
        """No longer; when this returns, no thread reads from ``source``."""

        def remove() -> None:
            with self._wanted_lock:
                self._set_sources([other for other in self._sources if other is not source])

        self.alone(remove)

    def check_peers(self) -> None:
        """Look at all peers' lives now, rather than after the next wait; left to the leader where there is one, who does so anyway."""
        if self._leader.acquire(False):
            try:
                self._check_peers()
            finally:
                self._give_up_lead()

    def look(self) -> None:
        """Take what completions there are, or see that a peer has died, without waiting; left to the leader where there is one."""
        if not self._wanted and self._leader.acquire(False):
            try:
                if self._ready():
                    self._drain()
                else:
                    self._check_peers()
            finally:
                self._give_up_lead()

    def alone(self, action: Callable[[], None], *, settle_here: bool = True) -> None:
        """Do ``action`` while no other thread takes completions; a leader makes way within ``RECHECK_SECONDS``.

        ``settle_here``: run the callbacks of what became done in this thread, not in the background.
        """
        with self._wanted_lock:
            self._wanted += 1
        try:
            with self._leader:
                action()
        finally:
            with self._wanted_lock:
                self._wanted -= 1
            self._hand_over()
            if settle_here:
                self._settle()
            elif self._unsettled:
                self.watch(_Settled())

    def wait(self, call: Waitable, deadline_ns: int) -> bool:
        """Wait until ``call`` is done, at most until ``deadline_ns`` (CLOCK_MONOTONIC; 0 for ever); returns whether it is."""
        leader = self._leader
        while call.state is not DONE:
            if not self._wanted and leader.acquire(False):
                try:
                    patient = self._lead(call, deadline_ns)
                finally:
                    leader.release()
                    if self._followers:
                        self._hand_over()
                    if self._unsettled:
                        self._settle()
                if not patient:
                    return call.state is DONE
            elif not self._follow(call, deadline_ns):
                return call.state is DONE
        return True

    def wait_any(self, seconds: float) -> None:
        """Take what there is, or wait for one completion: for a caller that needs a free slot rather than a certain call."""
        if self._leader.acquire(timeout=min(seconds, RECHECK_SECONDS)):
            try:
                if self._block(self._ready, self._receivers, min(seconds, RECHECK_SECONDS)):
                    self._drain()
                else:
                    self._check_peers()
            finally:
                self._give_up_lead()

    def _lead(self, call: Waitable, deadline_ns: int) -> bool:
        """Read for all until ``call`` is done; False when its deadline came first."""
        # Most calls are answered within the time of a look. A deadline that passes meanwhile is seen right after.
        if self._receivers and self._look_seconds and spin(self._receivers, self._look_seconds):
            self._drain()
            if call.state is DONE:
                return True
        block = self._block
        while True:
            left = RECHECK_SECONDS
            if deadline_ns:
                left = max(0.0, (deadline_ns - time.monotonic_ns()) / 1e9)
            # self._ready anew each time: a channel may have been opened meanwhile, and its completions are this leader's to read.
            if block(self._ready, self._receivers, left if left < RECHECK_SECONDS else RECHECK_SECONDS):
                self._drain()
            elif left > 0:
                self._check_peers()
            if call.state is DONE or self._wanted:
                return True
            if left <= 0:
                return False

    def _follow(self, call: Waitable, deadline_ns: int) -> bool:
        """Wait for a word from the leader; False when the deadline came first."""
        wake = threading.Lock()
        wake.acquire()
        call.wake = wake
        self._followers.append(call)
        left = RECHECK_SECONDS
        if deadline_ns:
            left = (deadline_ns - time.monotonic_ns()) / 1e9
        try:
            # The leader may have finished the call, or left, before it could see this follower.
            if call.state is not DONE and (self._wanted or self._leader.locked()) and left > 0:
                wake.acquire(timeout=min(left, RECHECK_SECONDS))
        finally:
            self._followers.remove(call)
            call.wake = None
        return left > 0

    def settle_later(self, future: Settling) -> None:
        """Have a future settled as soon as whoever leads has given up the lead."""
        self._unsettled.append(future)

    def _settle(self) -> None:
        while self._unsettled:
            try:
                future = self._unsettled.popleft()
            except IndexError:  # another thread was faster
                return
            future.settle()

    def _give_up_lead(self) -> None:
        self._leader.release()
        self._hand_over()
        self._settle()

    def _hand_over(self) -> None:
        for call in self._followers:
            wake = call.wake
            if call.state is not DONE and wake is not None:
                release_waiter(wake)
                return

    def _drain_all(self) -> None:
        for source in self._sources:
            source.drain()

    def _any_ready(self) -> bool:
        return any([source.has_frames() for source in self._sources])

    def _set_sources(self, sources: list[Source]) -> None:
        self._sources = sources
        self._receivers = tuple([receiver for source in sources for receiver in source.receivers])
        # With one source, as most clients have, its own look is all that is needed, and its own draining.
        self._ready, self._drain = (sources[0].has_frames, sources[0].drain) if len(sources) == 1 else (self._any_ready, self._drain_all)

    def _check_peers(self) -> None:
        for source in self._sources:
            source.check_peer()

    # --- calls that no thread waits for ---------------------------------------------------------------------------------------------

    @property
    def is_led(self) -> Callable[[], bool]:
        """What tells whether somebody reads, and :attr:`followers` who waits meanwhile: for calls that need not wait for either."""
        return self._leader.locked

    @property
    def followers(self) -> list[Waitable]:
        """Those that wait for a word from the leader."""
        return self._followers

    @property
    def look_seconds(self) -> float:
        """How long a leader looks at the receivers before it blocks."""
        return self._look_seconds

    def watch(self, call: Waitable) -> None:
        """Have ``call`` completed in the background: for futures with callbacks, which nobody need wait for."""
        with self._watcher_lock:
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, name="shmbroker-completions", daemon=True)
                self._watcher.start()
        self._watched.put(call)

    def _watch(self) -> None:
        calls: list[Waitable] = []
        while True:
            while not calls or not self._watched.empty():
                call = self._watched.get()
                if call is None:
                    return
                calls.append(call)
            now = time.monotonic_ns()
            deadlines = [call.deadline_ns for call in calls if call.deadline_ns]
            self.wait(calls[0], min([now + int(RECHECK_SECONDS * 1e9), *deadlines]))
            self._settle()  # also what others left
            now = time.monotonic_ns()
            for call in calls:
                if call.state is not DONE and call.deadline_ns and now >= call.deadline_ns:
                    call.expire()
            calls = [call for call in calls if call.state is not DONE and not (call.deadline_ns and now >= call.deadline_ns)]
            call = None  # or it would keep the last one's tensors alive until the next comes

    def close(self) -> None:
        """End the background thread, once the calls it watches are done, and let go of the memory that waiting looks at.

        A callback may do so in that thread, which then ends when the callback has returned. A second time does nothing.
        """
        with self._watcher_lock:  # not one that is just being started
            watcher = self._watcher
        if watcher is not None:
            self._watched.put(None)
            if watcher.ident != get_ident():
                watcher.join(CLOSING_SECONDS)
        self._block = _closed


def _closed(ready: Callable[[], bool], receivers: tuple[Receiver, ...], seconds: float) -> bool:
    return False


def release_waiter(wake: threading.Lock) -> None:
    """Let a follower look again; harmless when somebody was faster."""
    try:
        wake.release()
    except RuntimeError:
        pass
