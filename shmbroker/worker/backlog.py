"""How many rows may wait at a worker, and which calls are refused beyond that.

W5  A call is refused only when its client has another one waiting: who waits for nothing is always let in, however many rows others have waiting.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from shmbroker.lane.completion_frames import Completion
from shmbroker.lane.frame_layout import DESCRIPTOR, HEADER_BYTES, ID_AND_TIMES, SUBMISSION_HEADER
from shmbroker.memory.layout import Status
from shmbroker.worker.channel import WorkerChannel

_MOST_ROWS = 1 << 31
"""That a call counts as: what a frame says is not checked yet."""


def rows_of(frame: bytes) -> int:
    """Of the first output that a frame names, by all its dimensions but the last; 1 where it names none."""
    if len(frame) < HEADER_BYTES:
        return 1
    input_count, output_count = SUBMISSION_HEADER.unpack_from(frame)[-4:-2]
    at = HEADER_BYTES + input_count * DESCRIPTOR.size
    if not output_count or len(frame) < at + DESCRIPTOR.size:
        return 1
    _, _, _, ndim, _, _, _, *dims = DESCRIPTOR.unpack_from(frame, at)
    return int(min(max(1, math.prod(dims[: max(0, min(ndim, 8) - 1)])), _MOST_ROWS))


class Backlog:
    """Lets frames in while no more than ``most_rows`` rows wait. Used by the threads of both lanes, each for its own channels."""

    def __init__(self, most_rows: int) -> None:
        self._most_rows = most_rows

    def let_in(self, channel: WorkerChannel, frame: bytes, others: Iterable[WorkerChannel]) -> Completion | None:
        """Have ``frame`` wait in its channel; the completion that refuses it where it may not. ``others``: all channels that frames may wait in."""
        rows, waiting, own = rows_of(frame), 0, False
        for one in others:
            if one.waiting:
                waiting += one.waiting_rows
                own = own or one.share is channel.share
        if own and waiting + rows > self._most_rows:
            channel.counters.calls += 1
            channel.counters.errors += 1
            told = f"{waiting} rows wait, {rows} more would be more than the {self._most_rows} that may (--max-waiting-rows)"
            return Completion(ID_AND_TIMES.unpack_from(frame, 8)[0], Status.BUSY, 0, 0, told.encode())
        channel.wait(frame, rows)
        return None
