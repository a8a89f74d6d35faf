"""What a :class:`CompletionLoop` waits on, in a test's hands: calls, sources of completions, doorbells, futures, a clock and locks."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator

from shmbroker.call.completions import CompletionLoop, release_waiter
from shmbroker.call.state import DONE, OUTSTANDING, CallState
from shmbroker.lane.python_ends import Receiver
from tests.threads import STUCK_SECONDS, InThread


def do_nothing() -> None:
    """Do nothing."""


class FakeCall:
    """A call to be waited for. :attr:`following` is set as soon as a thread waits for it behind a leader; right before, ``on_follow`` is called."""

    def __init__(
        self, deadline_ns: int = 0, on_finish: Callable[[], object] = do_nothing, on_follow: Callable[[], object] = do_nothing
    ) -> None:
        self.state: CallState = OUTSTANDING
        self.deadline_ns = deadline_ns
        self.on_finish = on_finish
        self.on_follow = on_follow
        self.expired = 0
        self.following = threading.Event()
        self._wake: threading.Lock | None = None

    @property
    def done(self) -> bool:
        """Whether its completion was taken."""
        return self.state is DONE

    @property
    def wake(self) -> threading.Lock | None:
        """What its follower waits for."""
        return self._wake

    @wake.setter
    def wake(self, wake: threading.Lock | None) -> None:
        if wake is not None:
            self.on_follow()
        self._wake = wake
        if wake is not None:
            self.following.set()

    def finish(self) -> None:
        """Its completion was taken."""
        self.state = DONE
        wake = self._wake
        if wake is not None:
            release_waiter(wake)
        self.on_finish()

    def expire(self) -> None:
        """Count it."""
        self.expired += 1


class FakeSource:
    """Completions that a test puts in. Fails whoever reads while another does (C1), and knows who has read.

    ``look`` is called in the midst of each reading.
    """

    receivers: tuple[Receiver, ...] = ()

    def __init__(self, look: Callable[[], None] = do_nothing) -> None:
        self.look = look
        self.readers: list[int] = []
        """The thread of each drain."""
        self.checked = 0
        """How often the peer's life was looked at."""
        self.crowded = False
        """Two threads have read at once."""
        self._answered: deque[FakeCall] = deque()
        self._reading = threading.Lock()

    def answer(self, *calls: FakeCall) -> None:
        """Have completions of ``calls`` to be taken."""
        self._answered.extend(calls)

    def has_frames(self) -> bool:
        """Whether any is there."""
        return bool(self._answered)

    def drain(self) -> None:
        """Finish all that were answered."""
        with self._alone():
            self.readers.append(threading.get_ident())
            self.look()
            while self._answered:
                self._answered.popleft().finish()

    def check_peer(self) -> None:
        """Count it."""
        with self._alone():
            self.checked += 1
            self.look()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._reading.acquire(blocking=False):
            self.crowded = True
            raise AssertionError("two threads read at once")
        try:
            yield
        finally:
            self._reading.release()


class FakeFuture:
    """Calls ``callback`` when it is settled."""

    def __init__(self, callback: Callable[[], object]) -> None:
        self._callback = callback
        self.settled = 0

    def settle(self) -> None:
        """Count it, and call back."""
        self.settled += 1
        self._callback()


class Blocked:
    """A thread that is blocked on a doorbell, and for how long it wants to be."""

    def __init__(self, seconds: float) -> None:
        self.thread = threading.get_ident()
        self.seconds = seconds
        self._error: BaseException | None = None
        self._woken = threading.Event()

    def stay(self) -> None:
        """Be blocked until :meth:`wake`."""
        assert self._woken.wait(STUCK_SECONDS), "never woken"
        if self._error is not None:
            raise self._error

    def wake(self, error: BaseException | None = None) -> None:
        """As by a ring, or by the end of its time: what of both it was, the state decides. Or by a signal, whose handler raises ``error``."""
        self._error = error
        self._woken.set()


class HandRungBell:
    """A doorbell in the test's hand: who blocks on it is told of, and stays until the test wakes it, whatever time it asked for."""

    def __init__(self) -> None:
        self._blocked: queue.SimpleQueue[Blocked] = queue.SimpleQueue()

    def block(self, ready: Callable[[], bool], receivers: tuple[Receiver, ...], seconds: float) -> bool:
        """For :class:`CompletionLoop`."""
        blocked = Blocked(seconds)
        self._blocked.put(blocked)
        blocked.stay()
        return ready()

    def next_blocked(self) -> Blocked:
        """The next who blocks; waited for."""
        return self._blocked.get(timeout=STUCK_SECONDS)

    @property
    def nobody_else(self) -> bool:
        """Whether nobody blocks, or has, but those that :meth:`next_blocked` has told of."""
        return self._blocked.empty()


class CountingBell:
    """A doorbell that remembers how often it was rung, as a semaphore does. Fails whoever blocks on it while another does (C1)."""

    def __init__(self) -> None:
        self._rung = threading.Semaphore(0)
        self._blocking = threading.Lock()

    def ring(self) -> None:
        """Wake who blocks, or will."""
        self._rung.release()

    def block(self, ready: Callable[[], bool], receivers: tuple[Receiver, ...], seconds: float) -> bool:
        """For :class:`CompletionLoop`."""
        assert self._blocking.acquire(blocking=False), "two threads block at once"
        try:
            if not ready():
                self._rung.acquire(timeout=seconds)
            return ready()
        finally:
            self._blocking.release()


class Clock:
    """Time that passes when a test says so. Stands for the module ``time``."""

    def __init__(self) -> None:
        self.now_ns = 10**15

    def monotonic_ns(self) -> int:
        """The time."""
        return self.now_ns

    def after(self, seconds: float) -> int:
        """The time in so many seconds."""
        return self.now_ns + round(seconds * 1e9)

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now_ns = self.after(seconds)


class WatchedLocks:
    """Locks that tell of threads that have to wait for them. Stands for the module ``threading``.

    With a ``clock``, who waits for a certain time does not wait at all: the time passes at once.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock
        self.waits: list[float] = []
        """How long threads were willing to wait, where there was a limit."""
        self._waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.Thread = threading.Thread

    def Lock(self) -> WatchedLock:
        """A new lock."""
        return WatchedLock(self)

    def waits_for_one(self) -> None:
        """A thread is about to wait without a limit."""
        self._waiting.put(threading.get_ident())

    def next_waiting(self) -> int:
        """The next thread that waits for a lock without a limit; waited for."""
        return self._waiting.get(timeout=STUCK_SECONDS)


class WatchedLock:
    """Made by :class:`WatchedLocks`."""

    def __init__(self, told: WatchedLocks) -> None:
        self._told = told
        self._lock = threading.Lock()
        self.release = self._lock.release
        self.locked = self._lock.locked

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """As a lock's."""
        if self._lock.acquire(blocking=False):
            return True
        if not blocking:
            return False
        if timeout < 0:
            self._told.waits_for_one()
            return self._lock.acquire()
        self._told.waits.append(timeout)
        if self._told.clock is None:
            return self._lock.acquire(timeout=timeout)
        self._told.clock.advance(timeout)
        return False

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


def waiting(loop: CompletionLoop, call: FakeCall, deadline_ns: int = 0) -> InThread[bool]:
    """A thread that waits for ``call``."""
    return InThread(lambda: loop.wait(call, deadline_ns))


def followers(loop: CompletionLoop, calls: list[FakeCall]) -> list[InThread[bool]]:
    """A thread that waits for each, behind a leader that there is already."""
    threads = [waiting(loop, call) for call in calls]
    for call in calls:
        assert call.following.wait(STUCK_SECONDS)
    return threads


class Trouble(Exception):
    """Raised where it is least wanted."""


def raise_trouble() -> None:
    raise Trouble
