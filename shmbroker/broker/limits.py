"""How much shared memory a broker grants: so many bytes to a process, so many clients in all."""

from __future__ import annotations

from dataclasses import dataclass

from shmbroker.errors import BadInput, QuotaExceeded, TooManyClients
from shmbroker.settings.schema import DEFAULTS

DEFAULT_MAX_CLIENTS = DEFAULTS.max_clients

FILES_PER_CLIENT = 3
"""Two connections and the watch on its process."""

OWN_FILES = 32
"""What the broker has open for itself, what it keeps in reserve for refusals, and one file to look with."""


@dataclass(frozen=True, slots=True)
class Limits:
    """``max_bytes``: of all segments of one process together, 0 for no quota. ``max_clients``: that have a segment at a time.

    They guard against mistakes. A process tells its own pid, so who lies about it is not held back; what holds whoever it be is the size of
    ``/dev/shm``.
    """

    max_bytes: int = 0
    max_clients: int = DEFAULT_MAX_CLIENTS

    def check_files(self, limit: int) -> None:
        """Raise :class:`BadInput` where a process that may have ``limit`` files open cannot serve ``max_clients``."""
        needed = OWN_FILES + FILES_PER_CLIENT * self.max_clients
        if needed > limit:
            raise BadInput(
                f"--max-clients {self.max_clients} takes {needed} open files, {FILES_PER_CLIENT} for each client, and the hard limit of this process is "
                f"{limit}: give at most {max(0, limit - OWN_FILES) // FILES_PER_CLIENT}, or raise the limit (ulimit -Hn; systemd: LimitNOFILE=; docker "
                "run --ulimit nofile=)"
            )

    def check(self, pid: int, asked: int, had: int, clients: int) -> None:
        """Whether process ``pid``, which has ``had`` bytes, may have ``asked`` more, where ``clients`` have a segment already.

        Raises :class:`QuotaExceeded`, :class:`TooManyClients`.
        """
        if clients >= self.max_clients:
            raise TooManyClients(
                f"{clients} clients have a segment, as many as this broker takes: close some, or start it with a larger --max-clients"
            )
        if self.max_bytes and had + asked > self.max_bytes:
            raise QuotaExceeded(
                f"a segment of {asked} bytes was asked for by process {pid}, which has {had} bytes already; the quota of a process is "
                f"{self.max_bytes} bytes: ask for a smaller --arena, close other clients of this process, or start the broker with a larger "
                "--max-bytes"
            )
