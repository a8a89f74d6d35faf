"""Open files: how many the broker may have, and how many it has."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from shmbroker.broker.limits import FILES_PER_CLIENT, OWN_FILES
from shmbroker.commands.doctor.check import Check, content, ok, warn
from shmbroker.control import messages as m

_FULL = 0.8
"""The part of its limit from which on it is worth a word."""


def checks(report: m.StatusReport | None) -> Iterator[Check]:
    """All of this family. ``report``: of the broker, if one answers; what another user's has open may not be seen."""
    if report is None:
        return
    try:
        opened = len(os.listdir(f"/proc/{report.pid}/fd"))
    except OSError:
        return
    found = re.search(r"^Max open files\s+(\d+)", content(f"/proc/{report.pid}/limits"), re.MULTILINE)
    if found is None:
        return
    limit = int(found[1])
    text = f"the broker has {opened} of {limit}, {FILES_PER_CLIENT} for each client"
    figures = {"open": opened, "limit": limit}
    if opened + OWN_FILES > limit * _FULL:
        yield warn(
            "open files", text, "start it with a larger limit (ulimit -n; systemd: LimitNOFILE=; docker run --ulimit nofile=)", **figures
        )
    else:
        yield ok("open files", text, **figures)
