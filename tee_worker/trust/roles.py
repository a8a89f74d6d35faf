"""Two workers of which each is given half of a secret: neither may ever be given the other half, whoever takes over.

T5  A worker is given rows or pads, never both: other services, other processes, a segment for each.
T6  Two workers on one host are refused unless that is asked for: they hide nothing from the host.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from shmbroker.call.statistics import TrustCounts, nothing_told
from shmbroker.client import Bindable, Channel, FailoverChannel
from shmbroker.errors import BadInput, WorkerLost
from tee_worker.trust.modes import Trust, TrustOptions


class Roles:
    """Who computes, and who is given the pads. Raises :class:`BadInput` for two that are one, or that hide nothing from their host."""

    def __init__(self, channel: Bindable, second: Bindable | None, options: TrustOptions) -> None:
        self._channel = channel
        self._second = second
        self._seen: tuple[set[int], set[int]] = set(), set()
        """Processes that were given rows, and those that were given pads."""
        if second is None:
            if options.same_host_shares and options.mode is not Trust.SHARES:
                raise BadInput("same_host_shares is of two workers: give second=, or leave it out")
            if options.mode is Trust.SHARES:
                raise BadInput("trust 'shares' needs a second worker: --second SERVICE, or offload(second=channel) on a client of its own")
            return
        if not options.mode.hides:
            raise BadInput(f"a second worker is of modes 'shares' and 'blind' (--pads-from); trust {options.mode.value!r} has one")
        if second.memory is channel.memory:
            raise BadInput("both workers would map one segment, and see both halves: open the second channel on a client of its own")
        if not options.same_host_shares:
            raise BadInput(
                "both workers are on this host: together they see everything, and so does whoever controls the host; to try it out all the same, give "
                "--same-host-shares (offload: TrustOptions(same_host_shares=True))"
            )
        if _service(channel) == _service(second) is not None:
            raise BadInput(
                f"both workers offer service {_service(channel)!r}: one could take over from the other; start the second with another --service"
            )
        self._keep_others_out(channel, self._seen[1])
        self._keep_others_out(second, self._seen[0])
        self.keep_apart()

    @staticmethod
    def _keep_others_out(channel: object, pids: set[int]) -> None:
        """Whoever was given the other half takes over from nobody."""
        real = _real(channel)
        if isinstance(real, FailoverChannel):
            real.refuse = lambda found: found.worker_pid in pids

    def keep_apart(self) -> None:
        """See that the two are two. Raises :class:`WorkerLost` where one process is both now."""
        first, second = self._channel, self._second
        if second is None:
            return
        for seen, channel in zip(self._seen, (first, second), strict=True):
            if (pid := _pid(channel)) is not None:
                seen.add(pid)
        if both := self._seen[0] & self._seen[1]:
            raise WorkerLost(f"process {min(both)} is both workers now, or was: a worker is never given both halves; start another")

    def tell(self, counts: Callable[[], TrustCounts]) -> None:
        """Have status and metrics tell what is done about results that are not believed."""
        real = _real(self._channel)
        if real is None:
            return
        weakly = weakref.WeakMethod(counts)  # the channel outlives the session

        def told() -> TrustCounts:
            living = weakly()
            return nothing_told() if living is None else living()

        real.trust = told

    def names(self) -> str:
        """Who may have given a wrong result."""
        return _name(self._channel) if self._second is None else f"{_name(self._channel)} or {_name(self._second)}"

    def second_name(self) -> str:
        """Who is given the pads."""
        return _name(self._second)


def _real(channel: object) -> Channel | FailoverChannel | None:
    """Below what passes calls on."""
    inner = getattr(channel, "channel_below", channel)
    return inner if isinstance(inner, Channel | FailoverChannel) else None


def _service(channel: object) -> str | None:
    real = _real(channel)
    return None if real is None else real.service


def _pid(channel: object) -> int | None:
    real = _real(channel)
    return None if real is None else real.worker_pid


def _name(channel: object) -> str:
    real = _real(channel)
    return "the GPU worker" if real is None else real.worker_name
