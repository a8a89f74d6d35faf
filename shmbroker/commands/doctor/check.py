"""A check's outcome: one line for people, with the remedy, and figures for programs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

import msgspec


class State(Enum):
    """How it stands. Only a failure makes the exit status 1."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Check(msgspec.Struct, frozen=True):
    """What one check found."""

    name: str
    state: State
    text: str
    remedy: str = ""
    """What to do, where it is not ok."""
    figures: dict[str, Any] = {}


def ok(name: str, text: str, **figures: Any) -> Check:
    """Nothing to do."""
    return Check(name, State.OK, text, "", figures)


def warn(name: str, text: str, remedy: str, **figures: Any) -> Check:
    """It works, not as well as it could."""
    return Check(name, State.WARN, text, remedy, figures)


def fail(name: str, text: str, remedy: str, **figures: Any) -> Check:
    """It does not work."""
    return Check(name, State.FAIL, text, remedy, figures)


def content(path: str) -> str:
    """Of a small file of the kernel's; empty where it is not there or may not be read."""
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
