"""Contenders whose client is a process of its own, too: one that is no Python, or one that takes more of its process than a call.

Such a client measures itself: for each line with a number of seconds on its standard input it calls for so long, once at least, and writes how many calls
it made, a line end, and so many 8-byte numbers, the nanoseconds of each.
"""

from __future__ import annotations

import array
import contextlib
import subprocess
import sys
from collections.abc import Callable

from benchmarks.measure import Call
from benchmarks.peer import ready


class Driven(Call):
    """The round trips of such a client."""

    def __init__(self, client: subprocess.Popen[bytes], busy: int = 0) -> None:
        super().__init__(lambda: self.turn(0.0), busy)
        self._client = client

    def turn(self, seconds: float) -> list[int]:
        """Have the client call for so long, once at least. Raises where it has ended."""
        there, back = self._client.stdin, self._client.stdout
        assert there is not None
        assert back is not None
        with contextlib.suppress(BrokenPipeError):  # of one that has ended nothing comes, either
            there.write(f"{seconds}\n".encode())
            there.flush()
        count = int(back.readline() or 0)
        samples = array.array("Q", back.read(8 * count))
        if not samples:
            raise RuntimeError("the client of a contender has ended; its own words are above")
        return samples.tolist()


def drive(call: Callable[[], object]) -> None:
    """Be such a client, until nothing more is asked."""
    measured = Call(call)
    ready()
    for line in sys.stdin:
        samples = array.array("Q", measured.turn(float(line)))
        sys.stdout.buffer.write(f"{len(samples)}\n".encode() + samples.tobytes())
        sys.stdout.buffer.flush()
