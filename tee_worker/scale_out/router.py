"""Which replica takes a request: the one with the fewest, and of those the one that was asked longest ago."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

AVOID = "avoid"
"""The argument of a request that names replicas that are not to take it while there are others."""


class LeastLoadedRouter(RequestRouter):
    """By its own count of what it has sent and what has ended.

    Ray's own router prefers the node that asks, and its notes of replicas' queues stay above the truth for seconds after requests that came together.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """As Ray makes it."""
        self._turns = itertools.count(1)
        self._last: dict[ReplicaID, int] = {}
        self._under_way: Counter[ReplicaID] = Counter()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One after the other, in the order in which they are to be tried: one that has as many as it takes refuses."""
        avoided = (pending_request.kwargs.get(AVOID) or ()) if pending_request is not None else ()
        wanted = [one for one in candidate_replicas if one.replica_id.unique_id not in avoided] or candidate_replicas
        return [[one] for one in sorted(wanted, key=lambda one: (self._under_way[one.replica_id], self._last.get(one.replica_id, 0)))]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """It has one more."""
        super().on_send_request(replica_id)
        self._under_way[replica_id] += 1
        self._last[replica_id] = next(self._turns)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """It has one less, however that ended."""
        self._under_way[replica_id] = max(0, self._under_way[replica_id] - 1)
