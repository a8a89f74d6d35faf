"""Reading trace files, one or several as one, also where their end is missing."""

from __future__ import annotations

import os
import tempfile
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
    """Write the events of all ``paths`` in order of time to ``out``, mode 0600; returns how many. Raises :class:`BadInput`."""
    paths = list(paths)
    if any(os.path.exists(path) and os.path.exists(out) and os.path.samefile(path, out) for path in paths):
        raise BadInput(f"{os.fspath(out)!r} is one of the traces to be merged: name another file for the result, first")
    events = sorted((event for path in paths for event in read(path)), key=lambda event: event.get("ts", 0.0))
    text = b"[\n" + b",\n".join(map(msgspec.json.encode, events)) + b"\n]\n"
    try:
        _write(Path(out), text)
    except OSError as error:
        raise BadInput(f"the merged trace cannot be written to {os.fspath(out)!r}: {error.strerror}; what was there is as it was") from None
    return len(events)


def _write(out: Path, text: bytes) -> None:
    """For its owner alone, as the traces are (0600); whole or not at all, so that a full disk takes no earlier file. A pipe or device is written to."""
    if out.exists() and not out.is_file():
        out.write_bytes(text)
        return
    out = out.resolve()
    fd, beside = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(text)
        os.replace(beside, out)
    except BaseException:
        os.unlink(beside)
        raise
