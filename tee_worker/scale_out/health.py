"""Whether a replica is to be replaced: only when its own patience is over, so that whoever supervises it does not end what is recovering."""

from __future__ import annotations

import time
from collections.abc import Callable


class Health:
    """Of one replica. ``patience``: seconds that its calls wait for a GPU worker."""

    def __init__(self, patience: float, now: Callable[[], float] = time.monotonic) -> None:
        self._patience = patience
        self._now = now
        self._since: float | None = None

    def verdict(self, trouble: str) -> str:
        """Why it is to be replaced; empty while it is not. ``trouble``: why no call can be made now; empty when one can."""
        if not trouble:
            self._since = None
            return ""
        if self._since is None:
            self._since = self._now()
        waited = self._now() - self._since
        return f"no GPU worker for {waited:.0f} s, with a patience of {self._patience:g} s: {trouble}" if waited > self._patience else ""
