"""Reading trace files, one or several as one, also where their end is missing."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from shmbroker.errors import BadInput

Event = dict[str, Any]


def read(path: str | os.PathLike[str]) -> list[Event]:
    """The events of a trace file. A last line that was not written whole is passed over. Raises :class:`BadInput`."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise BadInput(f"trace {os.fspath(path)!r} cannot be read: {error.strerror}") from None
    lines = [line for line in text.split(b"\n") if line.strip()]
    if not lines or lines[0].strip() != b"[":
        raise BadInput(f"{os.fspath(path)!r} is not a trace that --trace has written")
    events: list[Event] = []
    for number, line in enumerate(lines[1:], 2):
        if line.strip() == b"]":
            break
        try:
            events.append(msgspec.json.decode(line.strip().rstrip(b","), type=Event))
        except msgspec.DecodeError as error:
            if number == len(lines):
                break  # its process was killed while it wrote
            raise BadInput(f"trace {os.fspath(path)!r}, line {number}: {error}") from None
    return events


def merge(out: str | os.PathLike[str], paths: Iterable[str | os.PathLike[str]]) -> int:
    """Write the events of all ``paths`` in order of time to ``out``; returns how many. Raises :class:`BadInput`."""
    events = sorted((event for path in paths for event in read(path)), key=lambda event: event.get("ts", 0.0))
    text = b"[\n" + b",\n".join(map(msgspec.json.encode, events)) + b"\n]\n"
    try:
        Path(out).write_bytes(text)
    except OSError as error:
        raise BadInput(f"the merged trace cannot be written to {os.fspath(out)!r}: {error.strerror}") from None
    return len(events)
