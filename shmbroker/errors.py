"""Every error that shmbroker raises on purpose. A leaf: imports nothing of ours, and any part may import it.

Each message says what happened, with the figures, and what to do next.
"""

from __future__ import annotations

import sys
from typing import TypeVar


class ShmBrokerError(Exception):
    """Base of all errors below: catch this to catch whatever shmbroker itself has to complain of."""


class BadInput(ShmBrokerError, ValueError):
    """An argument that cannot be used: an unknown dtype, too many tensors, a name with odd characters."""


class ArenaFull(ShmBrokerError, MemoryError):
    """No room for a block was released before the deadline. The message names the oldest holders."""


class ArenaTooSmall(ArenaFull):
    """A block larger than the whole arena was asked for: waiting could not help. Says how large it must be."""


class ArenaBusy(ShmBrokerError):
    """A finaliser used the arena in the midst of its own thread's placing a block."""


class SharedMemoryFull(ShmBrokerError, OSError):
    """The shared-memory file system has less room than a segment needs."""


class QuotaExceeded(SharedMemoryFull):
    """A process asked for more shared memory than the broker grants to one (``shmbroker serve --max-bytes``)."""


class TooManyClients(ShmBrokerError):
    """As many clients as the broker takes have a segment (``shmbroker serve --max-clients``)."""


class TooManyOpenFiles(ShmBrokerError, OSError):
    """No more files may be opened here, or in the process that was asked (RLIMIT_NOFILE)."""


class SegmentError(ShmBrokerError):
    """A segment cannot be used: gone, still being made, of another layout version, or not one of ours."""


class BrokerUnreachable(ShmBrokerError, ConnectionError):
    """No broker answered on this instance."""


class InstanceInUse(ShmBrokerError):
    """Another broker already serves this instance."""


class NoSuchService(ShmBrokerError, LookupError):
    """No worker offers the service that a channel was asked for."""


class ProtocolMismatch(ShmBrokerError):
    """The peer speaks another version of the control protocol or of the memory layout."""


class PeerRefused(ShmBrokerError):
    """A peer answered a control request with an error of its own; the text is the peer's."""


class ChannelError(ShmBrokerError):
    """A channel that cannot be opened or that was closed."""


class WorkerLost(ChannelError, ConnectionError):
    """The worker died or went away while calls were outstanding or before one was sent."""


class WrongResult(ShmBrokerError):
    """A worker's result is not the product that was asked for. The session has ended: nothing of it is used, and nothing more is asked."""


class PadsLost(ShmBrokerError):
    """A process has no pads: it is a fork of the one that made them, or their session has ended. It must open a session of its own."""


class CudaRefused(ShmBrokerError):
    """The CUDA driver refused what was asked of it, or there is none. ``code``: its number for the reason, 0 when it was never asked."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class CallError(ShmBrokerError):
    """A call that did not succeed."""


class Busy(CallError):
    """A worker has as many channels, or as many rows waiting, as it takes. Nothing was begun: the same may be asked again in a moment."""


class RemoteOpError(CallError):
    """The op raised on the worker: in a call, when it was bound, or when it was tried out for its shapes.

    ``type_name`` is the worker's exception type, the message has its text. ``worker_traceback`` tells where it was raised, as text, innermost call
    last; empty where the worker does not carry it (setting ``tracebacks``). Python shows it below the error.
    """

    def __init__(self, message: str, type_name: str = "", worker_traceback: str = "") -> None:
        super().__init__(message)
        self.type_name = type_name
        self.worker_traceback = worker_traceback
        if worker_traceback and sys.version_info >= (3, 11):
            self.add_note(self._note())

    def __str__(self) -> str:
        message = super().__str__()
        return message if sys.version_info >= (3, 11) or not self.worker_traceback else f"{message}\n{self._note()}"

    def _note(self) -> str:
        return f"On the worker (most recent call last):\n{self.worker_traceback.rstrip()}"


class BadFrame(CallError):
    """A frame that the reader rejects: an offset outside the segment, a dtype it does not know, ..."""


class CallTimeout(CallError, TimeoutError):
    """No completion came before the deadline. The blocks of the call stay held until the worker is done."""


class WorkerDraining(CallError):
    """The worker is shutting down and takes no new calls."""


_Error = TypeVar("_Error", bound=BaseException)


def anew(error: _Error) -> _Error:
    """Another error of the same kind and words, to be raised in place of one that is kept.

    An error that is raised keeps, through its traceback, all that its callers had in hand: raised a second time, that of both.
    """
    another = type(error).__new__(type(error), *error.args)
    another.args = error.args
    another.__dict__.update(error.__dict__)
    another.__cause__ = error.__cause__
    return another


def text_of(error: BaseException) -> str:
    """The error's text, also of an error that cannot tell it."""
    try:
        return str(error)
    except Exception:
        return "(its text cannot be told)"


def describe(error: BaseException) -> str:
    """Type and text."""
    return f"{type(error).__name__}: {text_of(error)}"
