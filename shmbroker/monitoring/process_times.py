"""CPU time of processes, from ``/proc``."""

from __future__ import annotations

import os
from pathlib import Path

_USER_TIME_FIELD = 11
"""Of ``/proc/PID/stat``, counted after the command's closing bracket (proc(5), fields 14 and 15)."""


def cpu_seconds(pid: int) -> float | None:
    """CPU time that the process has used, in user and kernel mode; None when it is gone or not to be seen."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()
    return (int(fields[_USER_TIME_FIELD]) + int(fields[_USER_TIME_FIELD + 1])) / os.sysconf("SC_CLK_TCK")
