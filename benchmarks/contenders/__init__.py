"""Ways to hand a tensor to another process and get one back, a file each, with both ends of it: here it calls, and as a program it is the peer.

A peer holds a torch tensor of what it was sent, and answers with a tensor of its own of the same size; it computes nothing. Where that is otherwise, the
file says so.
"""

from __future__ import annotations

import importlib.util


def missing(package: str) -> str | None:
    """Why a contender is left out, if it is."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed (pip install -e '.[bench]')"
    return None
