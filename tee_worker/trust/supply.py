"""Pads made ahead of time, by a thread that takes what time the others leave."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref

from shmbroker.errors import PadsLost
from shmbroker.trust.pads import Pads
from tee_worker.trust.session import TrustSession

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.005
"""Between two looks at a full supply."""

_NICE = 10
_END_SECONDS = 5.0
_AGAIN_SECONDS = 1.0
"""After an error, of a second worker for one."""


class PadSupply:
    """Keeps the pads of a session at their targets until it is closed, or nobody holds the session any more."""

    def __init__(self, session: TrustSession) -> None:
        self._stop = threading.Event()
        self.full = threading.Event()
        """Set whenever all targets are met."""
        weakly = weakref.ref(session)
        self._thread = threading.Thread(target=_run, args=(weakly, self._stop, self.full), name="shmbroker-pads", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Make no more."""
        self._stop.set()

    def join(self) -> None:
        """Wait a moment for the thread: one that waits for a second worker ends with that."""
        self._thread.join(_END_SECONDS)


def _run(weakly: weakref.ref[TrustSession], stop: threading.Event, full: threading.Event) -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)  # of this thread alone, on Linux
    while not stop.is_set():
        session = weakly()
        if session is None:
            return
        neediest = _neediest(session)
        try:
            if neediest is not None:
                full.clear()
                neediest.make_ahead()
        except PadsLost:
            return
        except Exception as error:  # whoever calls makes pads itself, and is told why
            log.warning("making pads ahead of time: %s", error)
            full.clear()
            del session
            stop.wait(_AGAIN_SECONDS)
            continue
        del session
        if neediest is None:
            full.set()
            stop.wait(_LOOK_SECONDS)


def _neediest(session: TrustSession) -> Pads | None:
    """The pads of which the largest share is missing."""
    if session.trouble:
        return None
    missing = max(session.pads, key=lambda pads: pads.missing / max(pads.target, 1), default=None)
    return missing if missing is not None and missing.missing > 0 else None
