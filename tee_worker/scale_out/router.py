"""Which replica takes a request: the one with the fewest, and of those the one that was asked longest ago."""

from __future__ import annotations

import itertools
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

AVOID = "avoid"
"""The argument of a request that names replicas that are not to take it while there are others."""


class LeastLoadedRouter(RequestRouter):
    """Ray's own prefers the node that asks, and of two that have nothing to do always takes the same."""

    def initialize_state(self, **kwargs: Any) -> None:
        """As Ray makes it."""
        self._turns = itertools.count(1)
        self._last: dict[ReplicaID, int] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All in one rank: Ray takes the first of those with the shortest queue."""
        avoided = (pending_request.kwargs.get(AVOID) or ()) if pending_request is not None else ()
        wanted = [one for one in candidate_replicas if one.replica_id.unique_id not in avoided] or candidate_replicas
        return [sorted(wanted, key=lambda one: self._last.get(one.replica_id, 0))]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        """It was asked last."""
        self._last[replica_id] = next(self._turns)
