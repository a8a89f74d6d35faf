"""Asking a broker what it knows."""

from __future__ import annotations

from shmbroker.control import messages as m
from shmbroker.control.access import Access
from shmbroker.control.joining import ask_broker, resolve_instance
from shmbroker.control.sockets import Requester


def ask(instance: str | None) -> m.StatusReport:
    """Ask the broker of ``instance``. Raises :class:`BrokerUnreachable`."""
    name = resolve_instance(instance)
    access = Access.of(name)
    context = access.context()
    requester = Requester(context, access.endpoint)
    try:
        return ask_broker(requester, m.GetStatus(), m.StatusReport, name)
    finally:
        requester.close()
        context.term()
