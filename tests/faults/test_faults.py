"""Killing, in short: ten cells of the matrix and some seconds of chaos. ``make kill-matrix`` and ``make chaos`` do all of it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator

import pytest

from tests.processes import run


@pytest.fixture
def folder() -> Iterator[dict[str, str]]:
    """A folder for sockets, whose paths must be short, and patience: here it is asked that all is well in the end, not how soon."""
    with tempfile.TemporaryDirectory(prefix="faults-", dir="/tmp") as path:
        yield {"SHMBROKER_RUNTIME_DIR": path, "FAULTS_PATIENCE": "40"}


def test_whoever_is_killed_at_a_step_of_the_protocol_the_others_are_told_or_served_and_nothing_is_left(folder: dict[str, str]) -> None:
    """K1 to K5, at ten steps."""
    done = run(sys.executable, "-m", "tests.faults.matrix", "--short", seconds=1800.0, **folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 passed, 0 failed" in done.stdout


def test_killing_at_random_under_load_spoils_nothing_hangs_nobody_and_leaves_nothing(folder: dict[str, str]) -> None:
    """K1 to K5."""
    done = run(sys.executable, "-m", "tests.faults.chaos", "8", "7", seconds=1800.0, **folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all held" in done.stdout


def test_every_fault_point_has_a_case_and_every_case_a_fault_point() -> None:
    done = run(sys.executable, "-c", "from tests.faults.matrix import mismatches; print(mismatches())")
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_a_fault_point_is_a_comment_in_a_program_that_is_not_under_test() -> None:
    code = "import shmbroker.client.client, shmbroker.worker.worker, builtins; print(hasattr(builtins, '__fault_point__'))"
    assert run(sys.executable, "-c", code).stdout == "False\n"
