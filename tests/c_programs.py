"""C programs of the tests: compiled against the core as whoever uses it compiles his own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

import shmbroker

STRICT = ("-std=c11", "-pedantic", "-Wall", "-Wextra", "-Werror")
HERE = "cc"
"""The compiler of this machine."""

RUN_SECONDS = 300.0
"""In which a program of a test must be at its end: many times what it takes."""


_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
"""Without the sanitizer that the tests themselves may run under: these programs bring their own."""


def compiler(name: str = HERE, package: str = "gcc") -> str:
    """Its path; skips the test where there is none."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} on this machine (Debian: apt-get install {package})")
    return found


def compiled(source: Path, program: Path, *flags: str, by: str | None = None, include: str | None = None) -> Path:
    """``program``, made of ``source`` with the headers in ``include``, those of the package if not said otherwise."""
    command = (by or compiler(), *STRICT, *flags, "-I", include or shmbroker.get_include(), str(source), "-o", str(program), "-pthread")
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return program


def sanitizing(folder: Path, sanitizer: str) -> tuple[str, str]:
    """GCC, and its flag for ``sanitizer``; skips the test where programs with it cannot be made or run."""
    by, flag = compiler("gcc"), f"-fsanitize={sanitizer}"
    probe = folder / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    made = subprocess.run([by, flag, str(probe), "-o", str(folder / "probe")], capture_output=True, check=False, env=_ENVIRONMENT)
    if made.returncode or ran(folder / "probe").returncode:
        pytest.skip(f"programs with {flag} cannot be made or run on this machine")
    return by, flag


def ran(program: Path, *arguments: str, under: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run to its end, in the environment of the test."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return subprocess.run(
        [*under, str(program), *arguments], capture_output=True, text=True, check=False, timeout=RUN_SECONDS, env=environment
    )
