"""Every benchmark runs, as its user runs it, and hands over figures. How long it takes is not looked at."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cuda
from benchmarks.__main__ import NAMES
from benchmarks.compare import SUBTRACTED
from tests.processes import run

SECONDS = 1800.0
"""In which a quick benchmark ends, on a machine that does much else."""

MAY_BE_NOUGHT = ("idle_percent", "server_cpu_us", "client_cpu_us", "worker_cpu_us", "computes", "cpu_ms", "cpu_part")
"""What is counted in the kernel's ticks, or is a part of something short."""


def numbers(figures: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """Every number of some figures, with the names that lead to it."""
    if isinstance(figures, (dict, list)):
        for name, inner in figures.items() if isinstance(figures, dict) else enumerate(figures):
            yield from numbers(inner, (*path, str(name)))
    elif isinstance(figures, (int, float)) and not isinstance(figures, bool):
        yield path, figures


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_runs_from_the_command_line_and_hands_over_its_figures(name: str, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = run(sys.executable, "-m", "benchmarks", name, "--quick", "--json", str(file), seconds=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    header, _, table = done.stdout.partition(f"\n== {name}\n")
    assert "cores" in header
    assert table.strip()
    figures = json.loads(file.read_text())
    assert set(figures) == {"machine", name}
    if name == "cuda" and "left_out" in figures[name]:
        assert figures[name]["left_out"] in table
        return
    found = dict(numbers(figures[name]))
    assert found
    for path, value in found.items():
        if "/".join(path) not in SUBTRACTED:
            assert value > 0 or (value == 0 and set(path) & set(MAY_BE_NOUGHT)), path
    if name == "steps":
        assert set(SUBTRACTED) < {"/".join(path) for path in found}


@pytest.mark.parametrize("told", ["0", "1,-2", "many", ""])
def test_a_number_of_clients_that_is_none_is_refused(told: str) -> None:
    done = run(sys.executable, "-m", "benchmarks", "serve", "--concurrency", told)
    assert done.returncode == 2
    assert "give numbers above 0, e.g. 1,4,8" in done.stderr


def test_without_a_gpu_the_cuda_benchmark_says_so_and_is_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here: make test-gpu and python -m benchmarks cuda measure it")
    assert "nothing is measured" in cuda.run()["left_out"]
    assert capsys.readouterr().out.count("\n") == 1
