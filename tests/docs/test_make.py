"""What ``make run`` says while it installs: pip's own words, as lines of how far it is."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from tests.processes import run

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("install", ROOT / "install.py")
assert _spec is not None
assert _spec.loader is not None
install = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(install)

PIP = """\
Looking in indexes: https://pypi.org/simple
Collecting click>=8.1 (from shmbroker==0.1.0)
  Downloading click-8.5.1-py3-none-any.whl.metadata (2.3 kB)
Processing /wheels/rich-15.0.0-py3-none-any.whl
Requirement already satisfied: pip in ./lib
Downloading click-8.5.1-py3-none-any.whl (126 kB)
Building wheels for collected packages: shmbroker
  Building editable for shmbroker (pyproject.toml): started
Installing collected packages: rich, click
Successfully installed click-8.5.1 rich-15.0.0
"""


def test_packages_are_counted_as_they_are_found_and_fetched() -> None:
    progress = install.Progress(74)
    assert [told for line in PIP.splitlines() if (told := progress.told(line)) is not None] == [
        "1 packages of at most 74 found, 0 fetched; looking up click>=8.1",
        "2 packages of at most 74 found, 1 fetched; looking up rich-15.0.0-py3-none-any.whl",
        "2 packages of at most 74 found, 2 fetched; fetching click-8.5.1-py3-none-any.whl (126 kB)",
        "building the compiled parts",
        "unpacking them: a minute or two on a slow machine",
    ]


def test_there_are_as_many_packages_as_are_pinned() -> None:
    pins = install.pins(["--constraint", str(ROOT / "constraints.txt")])
    assert pins == len(re.findall("==", (ROOT / "constraints.txt").read_text())) > 50


def test_what_pip_fails_with_is_the_status_and_its_words_are_seen() -> None:
    done = run(sys.executable, str(ROOT / "install.py"), sys.executable, "--no-index", "no-such-package-of-ours")
    assert done.returncode == 1
    assert "No matching distribution found for no-such-package-of-ours" in done.stderr


def test_each_step_of_make_run_is_told(tmp_path: Path) -> None:
    done = subprocess.run(["make", "-n", f"VENV={tmp_path}", "run"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.findall(r"\d of \d", done.stdout) == ["1 of 3", "2 of 3", "3 of 3"]
