"""shmbroker: hand tensors to another process through shared memory, without copying and without serializing them."""

from __future__ import annotations

import errno
import importlib
import os
from typing import TYPE_CHECKING

from shmbroker.errors import TooManyOpenFiles
from shmbroker.version import __version__

if TYPE_CHECKING:
    from shmbroker.arena.spec import TensorSpec
    from shmbroker.call.kept import Kept
    from shmbroker.client.client import Client, connect
    from shmbroker.client.local_broker import LocalBroker, local_broker
    from shmbroker.errors import (
        ArenaFull,
        ArenaTooSmall,
        BadFrame,
        BadInput,
        BrokerUnreachable,
        Busy,
        CallError,
        CallTimeout,
        ChannelError,
        CudaRefused,
        InstanceInUse,
        NoSuchService,
        PadsLost,
        PeerRefused,
        ProtocolMismatch,
        QuotaExceeded,
        RemoteOpError,
        SegmentError,
        SharedMemoryFull,
        ShmBrokerError,
        TooManyClients,
        WorkerDraining,
        WorkerLost,
        WrongResult,
    )
    from shmbroker.worker.worker import Worker

# The broker imports this package too, and must not pay for torch: public names are loaded when they are first asked for.
_HOME = {
    "Client": "shmbroker.client.client",
    "connect": "shmbroker.client.client",
    "Kept": "shmbroker.call.kept",
    "LocalBroker": "shmbroker.client.local_broker",
    "local_broker": "shmbroker.client.local_broker",
    "TensorSpec": "shmbroker.arena.spec",
    "Worker": "shmbroker.worker.worker",
}

__all__ = [
    "ArenaFull",
    "ArenaTooSmall",
    "BadFrame",
    "BadInput",
    "BrokerUnreachable",
    "Busy",
    "CallError",
    "CallTimeout",
    "ChannelError",
    "Client",
    "CudaRefused",
    "InstanceInUse",
    "Kept",
    "LocalBroker",
    "NoSuchService",
    "PadsLost",
    "PeerRefused",
    "ProtocolMismatch",
    "QuotaExceeded",
    "RemoteOpError",
    "SegmentError",
    "SharedMemoryFull",
    "ShmBrokerError",
    "TensorSpec",
    "TooManyClients",
    "TooManyOpenFiles",
    "Worker",
    "WorkerDraining",
    "WorkerLost",
    "WrongResult",
    "__version__",
    "connect",
    "get_include",
    "local_broker",
]


def get_include() -> str:
    """The folder with the headers of the core in C, for a compiler's ``-I``: ``#include <shmbroker.h>``. See docs/c.md."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "include")


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'shmbroker' has no attribute {name!r}")
    try:
        value: object = getattr(importlib.import_module(_HOME.get(name, "shmbroker.errors")), name)
    except (OSError, ImportError) as error:
        if os.strerror(errno.EMFILE) not in str(error):
            raise
        raise TooManyOpenFiles(
            f"shmbroker.{name} cannot be loaded, as no file can be opened ({error}): close what is not needed, or raise the limit (ulimit -n)"
        ) from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
