"""A client's side of a service: connecting, channels, failover. Programs import what they need of it from here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shmbroker.call.client_memory import ClientMemory
    from shmbroker.call.report import Report
    from shmbroker.client.channel import Channel
    from shmbroker.client.client import Client, connect
    from shmbroker.client.failover import FailoverChannel
    from shmbroker.client.protocols import Bindable, Op

__all__ = ["Bindable", "Channel", "Client", "ClientMemory", "FailoverChannel", "Op", "Report", "connect"]

# Who starts a private broker imports this package too, and must not pay for torch: the names are loaded when they are first asked for.
_HOME = {
    "Bindable": "shmbroker.client.protocols",
    "Channel": "shmbroker.client.channel",
    "Client": "shmbroker.client.client",
    "ClientMemory": "shmbroker.call.client_memory",
    "FailoverChannel": "shmbroker.client.failover",
    "Op": "shmbroker.client.protocols",
    "Report": "shmbroker.call.report",
    "connect": "shmbroker.client.client",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'shmbroker.client' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
