"""The clients of this process that are open: closed at its end, and disowned in forked children, whose they are not."""

from __future__ import annotations

import atexit
import logging
import os
import weakref
from typing import Protocol

from shmbroker.errors import ShmBrokerError

log = logging.getLogger(__name__)


class OpenClient(Protocol):
    """What is done to each of them."""

    def close(self) -> None:
        """At the end of the process."""

    def disown(self) -> None:
        """In a forked child."""


_open: weakref.WeakSet[OpenClient] = weakref.WeakSet()


def add(client: OpenClient) -> None:
    """Close it at the end of the process, if it is open and alive then."""
    _open.add(client)


def discard(client: OpenClient) -> None:
    """It is closed. A second time does nothing."""
    _open.discard(client)


def _disown_all() -> None:
    for client in list(_open):
        client.disown()


os.register_at_fork(after_in_child=_disown_all)


def _close_all() -> None:
    for client in list(_open):
        try:
            client.close()
        except (ShmBrokerError, OSError) as error:
            log.debug("closing at exit: %s", error)


atexit.register(_close_all)
