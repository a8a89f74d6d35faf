"""The states of a call, and who may change which.

=================  =========================  ======================================================================================
from               to                         changed by
=================  =========================  ======================================================================================
``OUTSTANDING``    ``DONE``                   the leader of the waiters, which took its completion (``Call.finish``)
``OUTSTANDING``    ``EXPIRED``                whoever waits for it, when its deadline has passed (``Call.expire``)
``EXPIRED``        ``DONE``                   the leader, when the answer comes after all: the error stays that of the deadline
any                ``DONE``                   whoever finds that no answer can come (``Call.fail``)
=================  =========================  ======================================================================================

A waiter whose deadline passes in the very moment in which the leader finishes the call may put ``EXPIRED`` over ``DONE``: its caller has then been
told of the deadline, and nobody waits for the call any more.
"""

from __future__ import annotations

import enum


class CallState(enum.Enum):
    """Where a call stands."""

    OUTSTANDING = "outstanding"
    """It was made, and the worker has not answered. It holds its blocks."""
    EXPIRED = "expired"
    """Its caller was told that the deadline has passed. It still holds its blocks: the worker may be at it."""
    DONE = "done"
    """Answered, or never to be: what it has, results or an error, is final."""


# Names of their own: looking up a member of an enum costs as much as a step of a call.
OUTSTANDING = CallState.OUTSTANDING
EXPIRED = CallState.EXPIRED
DONE = CallState.DONE
