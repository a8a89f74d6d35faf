"""How a worker's time is shared: the client that has had least of it goes first.

Start-time fair queueing (P. Goyal, H. Vin, H. Cheng, "Start-time Fair Queuing", 1997). Each client has a finish tag: the time that it was charged,
divided by its weight. What it wants to run next starts where its last one finished, but not before where the one that was begun last started, which
is the worker's virtual time; of those that wait, the one with the earliest start runs.

W1  Of the clients that wait, the one that has had least time for its weight goes first; those within 0.2 ms of each other are alike.
W2  None waits for ever: between two turns of a client that waits, each other one has, for its weight, no more than that client had in the first of
    the two, and one turn.
W3  Who wanted nothing has saved up nothing: it comes back as one that has had as much as the one whose turn was begun last.
W4  Time that was had while nobody else wanted any is owed to nobody.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shmbroker.errors import BadInput

MOST_AHEAD_NS = 2e9
"""How far a client gets ahead of the virtual time: what it had beyond that, in one call that could not be divided, is forgiven."""

ALIKE_NS = 2e5
"""Clients that are no further ahead of the virtual time than this have a turn each, one after the other."""

Key = tuple[float, float, int]
"""By which clients that wait are compared: the start of what they want to run, what they have had, and when they last had a turn."""


@dataclass(slots=True, eq=False)
class Share:
    """What one client has had of a worker's time."""

    client: str
    weight: float
    finish: float = 0.0
    """Its finish tag."""
    channels: int = 0
    """Open ones."""
    turns: int = 0
    """The number of its last turn."""


def checked_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """The same, as floats. Raises :class:`BadInput` for a weight that is not a number above 0."""
    for name, weight in weights.items():
        if not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise BadInput(
                f"weight {weight!r} of client {name!r} cannot be used: give a number above 0, e.g. 2 for twice the time of others"
            )
    return {name: float(weight) for name, weight in weights.items()}


class Shares:
    """The shares of all clients of a worker. ``weights``: by a client's name, where it is not 1.

    Opened and closed by the thread that opens channels; everything else is done by whoever has the turn. A device's time may be
    charged by the thread that waits for it: where two charge at one instant, one charge may be missing.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self.several = False
        """Whether more than one client has a channel open: with one there is nothing to share."""
        self._weights = dict(weights or {})
        self._shares: dict[str, Share] = {}
        self._now = 0.0
        """The virtual time: the start of the turn that was begun last."""
        self._latest = 0.0
        """Of all finish tags."""
        self._turns = 0

    def open(self, client: str, name: str) -> Share:
        """The share of ``client``, whose name is ``name``, with one more channel open."""
        share = self._shares.get(client)
        if share is None:
            share = self._shares[client] = Share(client, self._weights.get(name, 1.0))
        share.channels += 1
        self.several = len(self._shares) > 1
        return share

    def close(self, share: Share) -> None:
        """One channel of it less; with the last one it is forgotten."""
        share.channels -= 1
        if not share.channels:
            del self._shares[share.client]
            self.several = len(self._shares) > 1

    def key(self, share: Share) -> Key:
        """What the client of ``share`` is compared by, while it waits (W1, W3)."""
        finish = share.finish
        return (finish if finish > self._now else self._now), finish, share.turns

    def is_ahead(self, share: Share) -> bool:
        """Whether its client has had so much that others go first. Those that are not are all alike: calls of microseconds are not worth comparing."""
        return share.finish > self._now + ALIKE_NS

    def begin(self, share: Share) -> None:
        """A turn of ``share`` begins."""
        if share.finish > self._now:
            self._now = share.finish
        else:
            share.finish = self._now
        self._turns += 1
        share.turns = self._turns

    def join(self, share: Share) -> None:
        """``share`` takes part in the turn of another that has begun: what it is ahead it stays."""
        share.finish = max(share.finish, self._now)
        self._turns += 1
        share.turns = self._turns

    def charge(self, share: Share, nanoseconds: float) -> None:
        """``share`` has had so much time (W2)."""
        share.finish = min(share.finish + nanoseconds / share.weight, self._now + MOST_AHEAD_NS)
        if share.finish > self._latest:
            self._latest = share.finish

    def rest(self) -> None:
        """Nobody wants anything now (W4)."""
        if self._latest > self._now:
            self._now = self._latest
