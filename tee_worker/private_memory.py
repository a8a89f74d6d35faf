"""The memory of this process that it shares with nobody."""

from __future__ import annotations


def private_bytes() -> int:
    """As the kernel counts it: resident, and of no file and no shared segment."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0
