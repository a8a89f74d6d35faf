"""Two checkouts side by side: what is compared, and that it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.compare import SUBTRACTED, compare, show
from benchmarks.figures import times
from benchmarks.peer import ROOT
from tests.processes import run


def test_times_are_found_wherever_they_stand_and_nothing_else_is() -> None:
    figures = {
        "sizes": {"64": {"floor": {"median_us": 1.5, "p99_us": 9.0}}},
        "rows": [{"nbytes": 64, "calls_per_second": 3.0, "client_cpu_us": None, "worker_cpu_us": 2}],
        "seconds": {"layer": {"prefill": 0.25}},
        "steps_ns": {"wait": 700.0},
        "compiled": True,
        "left_out": {"ray": "not installed"},
    }
    assert times(figures) == {
        "sizes/64/floor/median_us": 1.5,
        "rows/0/worker_cpu_us": 2.0,
        "seconds/layer/prefill": 0.25,
        "steps_ns/wait": 700.0,
    }


def test_of_steps_the_best_round_counts_and_of_others_the_median() -> None:
    here, there = [{"row": 3.0}, {"row": 1.0}, {"row": 2.0}], [{"row": 4.0}, {"row": 4.0}, {"row": 5.0}]
    best, median = compare("steps", here, there)["row"], compare("rtt", here, there)["row"]
    assert (best.here, best.there, best.ratio) == (1.0, 4.0, 0.25)
    assert (median.here, median.there, median.ratio) == (2.0, 4.0, 0.5)
    assert median.rounds == (0.25, 0.4, 0.75), "each with its own other side"


def test_of_a_difference_the_median_counts_since_a_disturbance_can_make_it_less() -> None:
    row = SUBTRACTED[0]
    one = compare("steps", [{row: 3.0}, {row: -9.0}, {row: 2.0}], [{row: 4.0}, {row: 4.0}, {row: 5.0}])[row]
    assert (one.here, one.there) == (2.0, 4.0)


def test_a_row_that_only_one_checkout_has_is_told_and_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    show("rtt", 1, [{"both": 1.0, "new": 1.0}], [{"both": 2.0, "old": 1.0}])
    shown = capsys.readouterr().out
    assert "0.500" in shown
    assert "only here: new\nonly there: old\n" in shown
    assert set(compare("rtt", [{"both": 1.0, "new": 1.0}], [{"both": 2.0, "old": 1.0}])) == {"both"}


def test_a_checkout_is_compared_with_itself(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = run(
        sys.executable,
        "-m",
        "benchmarks.compare",
        str(ROOT),
        "--names",
        "alloc",
        "--rounds",
        "1",
        "--quick",
        "--json",
        str(file),
        seconds=300.0,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "here / there" in done.stdout
    assert "only" not in done.stdout
    rounds = json.loads(file.read_text())["alloc"]
    assert rounds["here"][0].keys() == rounds["there"][0].keys()


def test_a_name_that_is_not_known_and_a_folder_that_is_no_checkout_are_told(tmp_path: Path) -> None:
    done = run(sys.executable, "-m", "benchmarks.compare", str(ROOT), "--names", "steps,fast")
    assert done.returncode == 2
    assert "there is no fast; there are: rtt" in done.stderr
    done = run(sys.executable, "-m", "benchmarks.compare", str(tmp_path), "--names", "steps")
    assert done.returncode == 1
    assert f"{tmp_path} is no checkout" in done.stderr
