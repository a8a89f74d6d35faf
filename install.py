"""What ``make`` installs with: pip, which says nothing for minutes where it is quiet, told as one line of what it does and how far it is.

``python install.py PYTHON ARGUMENT...`` runs ``PYTHON -m pip install ARGUMENT...`` and ends with its status. Needs nothing that is not in Python.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

EVERY_SECONDS = 5.0
"""Between two lines where there is no terminal, on which one line is written over."""

_FOUND = re.compile(r"(Collecting|Processing) (\S+)")
_FETCHED = re.compile(r"\s*(?:Downloading|Using cached) (\S+) \((.*)\)")
_PHASES = {
    "Installing build dependencies": "fetching what the compiled parts are built with",
    "Building editable": "building the compiled parts",
    "Installing collected packages": "unpacking them: a minute or two on a slow machine",
}


class Progress:
    """What pip has said so far. ``most``: packages that there can be; 0: not known."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._found = 0
        self._fetched = 0

    def told(self, line: str) -> str | None:
        """What a line of pip's means for whoever waits; None for one that tells nothing new."""
        if match := _FOUND.match(line):
            self._found += 1
            self._fetched += match[1] == "Processing"  # a file that is here already
            return self._so_far(f"looking up {Path(match[2]).name}")
        match = _FETCHED.match(line)
        if match and not match[1].endswith(".metadata"):
            self._fetched += 1
            return self._so_far(f"fetching {Path(match[1]).name} ({match[2]})")
        return next((text for words, text in _PHASES.items() if line.strip().startswith(words)), None)

    def _so_far(self, now: str) -> str:
        most = f" of at most {self._most}" if self._most else ""
        return f"{self._found} packages{most} found, {self._fetched} fetched; {now}"


def pins(arguments: list[str]) -> int:
    """How many packages the file after ``--constraint`` pins."""
    if "--constraint" not in arguments:
        return 0
    return sum("==" in line for line in Path(arguments[arguments.index("--constraint") + 1]).read_text().splitlines())


def main() -> int:
    """Run pip; returns its status."""
    python, *arguments = sys.argv[1:]
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", *arguments]
    progress, terminal, shown = Progress(pins(arguments)), sys.stdout.isatty(), float("-inf")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            told = progress.told(line)
            if told is None:
                continue
            if terminal:
                print(f"\r\033[K  {told}"[:100], end="", flush=True)
            elif time.monotonic() - shown >= EVERY_SECONDS or told in _PHASES.values():
                print(f"  {told}", flush=True)
                shown = time.monotonic()
    if terminal:
        print("\r\033[K", end="", flush=True)
    return pip.returncode


if __name__ == "__main__":
    sys.exit(main())
