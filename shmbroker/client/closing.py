"""Closing: steps that are all done, each once, whoever asks for it, how often, in which thread, and from wherever.

Z1  All steps are done, the last one added first, whatever one of them raises; the first error is raised in the end.
Z2  What an interrupt kept from being done is done the next time.
Z3  Who closes what another thread is closing waits for it; not so from within shmbroker (a future's callback, a finaliser), for whose end that one may wait.
Z4  From a finaliser, which may have interrupted any line of shmbroker with any lock held, it is done by a thread of its own, and not waited for.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from types import FrameType

log = logging.getLogger(__name__)

_OURS = tuple(f"shmbroker.{room}." for room in ("arena", "call", "client", "control", "lane", "memory", "trace"))
"""Where a client's locks are held."""

_CALLBACKS = {
    ("shmbroker.call.future", "settle"),
    ("shmbroker.client.failover_op", "_over"),
    ("shmbroker.client.failover_op", "_send_again"),
}
"""Functions that run a future's callbacks, with no lock held (C5)."""


class Closing:
    """The end of one thing: steps are added while it is set up, and :meth:`close` does them. Thread-safe once it is set up."""

    def __init__(self, name: str) -> None:
        """``name``: of the thing, for the log."""
        self._name = name
        self._steps: list[Callable[[], object]] = []
        self._lock = threading.Lock()

    def add(self, step: Callable[..., object], *arguments: object) -> None:
        """Have ``step(*arguments)`` done before those that were added earlier; also one that another step adds. A second time it must do nothing."""
        self._steps.append(lambda: step(*arguments))

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return not self._steps

    def close(self) -> None:
        """Do what is left of the steps. Raises the first error that one of them did (Z1)."""
        caller = sys._getframe(1)
        if called_amid(caller, _CALLBACKS):
            try:
                threading.Thread(target=self._close_later, name="shmbroker-close", daemon=True).start()
                return
            except RuntimeError:  # no thread starts any more: the interpreter ends, and no other thread holds anything up
                pass
        if not self._lock.acquire(blocking=False):
            if called_amid(caller, ()):
                return  # Z3
            self._lock.acquire()
        try:
            self._do_steps()
        finally:
            self._lock.release()

    def _close_later(self) -> None:
        try:
            self.close()
        except Exception:
            log.exception("closing %s, from a finaliser", self._name)

    def _do_steps(self) -> None:
        first: BaseException | None = None
        interrupted: list[Callable[[], object]] = []
        while self._steps:
            step = self._steps[-1]
            try:
                step()
            except BaseException as error:
                first = first or error
                if not isinstance(error, Exception):
                    interrupted.append(step)
            self._steps.remove(step)  # which may have added others
        self._steps = interrupted[::-1]
        if first is not None:
            raise first


def called_amid(frame: FrameType | None, allowed: object) -> bool:
    """Whether ``frame``, and what of shmbroker called it, was called by other code that shmbroker called: other than by its functions in ``allowed``."""
    entered = False
    ours_before = True
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        ours = module.startswith(_OURS)
        entered = entered or not ours
        if entered and ours and not ours_before and (module, frame.f_code.co_name) not in allowed:  # type: ignore[operator]
            return True
        ours_before = ours
        frame = frame.f_back
    return False
