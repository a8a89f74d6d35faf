"""A trace file: what a process did when, in Chrome's trace event format, for ui.perfetto.dev or chrome://tracing (docs/traces.md).

The file is valid JSON after every batch that is written, whatever ends the process: a batch overwrites the closing bracket and brings its own.
Op names, shapes, dtypes and sizes only; never values of tensors, nor arguments of calls.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
from collections import deque
from typing import Any

import msgspec

from shmbroker.errors import BadInput

log = logging.getLogger(__name__)

BATCH_SECONDS = 0.2
"""How often what was recorded is written: so much is lost when the process is killed."""

MOST_WAITING = 1 << 18
"""Events kept for the next batch; beyond that the oldest are lost: a full disk must not fill the memory."""

_END = b"\n]\n"

Event = dict[str, Any]


class Trace:
    """An open trace file of this process. Thread-safe. Raises :class:`BadInput` when the file cannot be written or is in use."""

    def __init__(self, path: str | os.PathLike[str], process: str) -> None:
        self._path = os.fspath(path)
        self._pid = os.getpid()
        try:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise BadInput(f"the trace cannot be written to {self._path!r}: {error.strerror}; give another file (--trace)") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._fd, 0)
        except OSError as error:
            os.close(self._fd)
            reason = "another trace is being written to it" if isinstance(error, BlockingIOError) else error.strerror
            raise BadInput(f"the trace cannot be written to {self._path!r}: {reason}; give another file (--trace)") from None
        self._events: deque[Event] = deque(maxlen=MOST_WAITING)
        self._threads: set[int] = set()
        self._stop = threading.Event()
        self._broken = False
        first = msgspec.json.encode({"ph": "M", "name": "process_name", "pid": self._pid, "tid": 0, "args": {"name": process}})
        self._length = 0
        self._put(b"[\n" + first)
        self._writer = threading.Thread(target=self._write, name="shmbroker-trace", daemon=True)
        self._writer.start()

    # --- recording: times in nanoseconds of CLOCK_MONOTONIC, which is one clock for all processes of a machine ------------------------

    def span(self, name: str, begun_ns: int, ended_ns: int, **details: Any) -> None:
        """Something that this thread did. Spans of one thread lie inside or beside each other."""
        duration = max(0, ended_ns - begun_ns) / 1000
        self._add({"ph": "X", "name": name, "ts": begun_ns / 1000, "dur": duration, "args": details})

    def begin(self, kind: str, name: str, number: str, at_ns: int, **details: Any) -> None:
        """Something begins that ends elsewhere, or while others of its kind last. ``kind`` and ``number`` tell which ends."""
        self._add({"ph": "b", "cat": kind, "name": name, "id": number, "ts": at_ns / 1000, "args": details})

    def end(self, kind: str, name: str, number: str, at_ns: int, **details: Any) -> None:
        """It ends."""
        self._add({"ph": "e", "cat": kind, "name": name, "id": number, "ts": at_ns / 1000, "args": details})

    def flow(self, step: str, number: str, at_ns: int) -> None:
        """A point of an arrow between spans, in the span of this thread at that time: ``s`` where it starts, ``t`` on its way, ``f`` its end."""
        self._add({"ph": step, "cat": "call", "name": "call", "id": number, "ts": at_ns / 1000, "bp": "e"})

    def _add(self, event: Event) -> None:
        thread = threading.get_native_id()
        if thread not in self._threads:
            self._threads.add(thread)
            name = threading.current_thread().name
            self._events.append({"ph": "M", "name": "thread_name", "pid": self._pid, "tid": thread, "args": {"name": name}})
        event["pid"] = self._pid
        event["tid"] = thread
        self._events.append(event)

    # --- writing ------------------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Write what is left. What is recorded later is lost."""
        if self._stop.is_set() or os.getpid() != self._pid:
            return
        self._stop.set()
        self._writer.join()
        os.close(self._fd)

    def _write(self) -> None:
        while not self._stop.wait(BATCH_SECONDS):
            self._batch()
        self._batch()

    def _batch(self) -> None:
        parts: list[bytes] = []
        for _ in range(len(self._events)):
            parts += b",\n", msgspec.json.encode(self._events.popleft())
        if parts and not self._broken:
            try:
                self._put(b"".join(parts))
            except OSError as error:
                self._broken = True
                log.warning("the trace in %r ends here: %s", self._path, error)

    def _put(self, data: bytes) -> None:
        """Write at the end, over the bracket."""
        whole = memoryview(data + _END)
        done = 0
        while done < len(whole):
            done += os.pwrite(self._fd, whole[done:], self._length + done)
        self._length += len(data)


def numbers_of(channel: int) -> int:
    """Where the numbers of a channel's calls begin, in all traces: from the channel's own number, which is not to be known."""
    return int.from_bytes(hashlib.blake2b(channel.to_bytes(8, "little"), digest_size=4).digest(), "little") << 32


def number_of(base: int, call_id: int) -> str:
    """The number of a call, the same in its client's trace and in its worker's."""
    return f"{base | (call_id & 0xFFFFFFFF):#x}"
