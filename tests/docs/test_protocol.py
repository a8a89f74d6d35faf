"""The model of the queues holds, and speaks of the rules that the code has."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from shmbroker.lane import doorbell, queue

FOLDER = Path(__file__).parents[2] / "docs" / "protocol"
MODEL = (FOLDER / "queues.pml").read_text()
SCRIPT = (FOLDER / "check.sh").read_text()

SEARCHES = re.findall(r"^check (?:'[^']+'|\w+) \w+ '([^']+)' (.+)$", SCRIPT, re.MULTILINE)
"""Names and macros."""

missing = [program for program in ("spin", "cc") if shutil.which(program) is None]


@pytest.mark.skipif(bool(missing), reason=f"checking the model needs {' and '.join(missing)}: apt-get install spin gcc")
def test_every_configuration_holds_and_every_planted_bug_is_found() -> None:
    done = subprocess.run([FOLDER / "check.sh"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall("^ok ", done.stdout, re.MULTILINE)) == len(SEARCHES)


def test_the_rules_that_the_model_names_are_those_of_the_code() -> None:
    told = set(re.findall(r"^([QD]\d)  ", f"{queue.__doc__}\n{doorbell.__doc__}", re.MULTILINE))
    body = MODEL.split("*/", 1)[1]
    named = {rule for comment in re.findall(r"/\*.*?\*/", body, re.DOTALL) for rule in re.findall(r"\b[QD]\d\b", comment)}
    assert {"Q1", "Q2", "Q3", "D1", "D3", "D4"} <= named
    assert named <= told


def test_every_macro_of_a_search_is_one_of_the_model() -> None:
    assert len(SEARCHES) == len(re.findall("^check ", SCRIPT, re.MULTILINE))
    known = set(re.findall(r"^#if(?:n?def)? (\w+)", MODEL, re.MULTILINE))
    for name, macros in SEARCHES:
        assert {macro.split("=")[0] for macro in macros.split()} <= known, name


def test_the_readme_lists_every_search_in_order() -> None:
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \|(?: \d+ \|)? \d+ \|$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert rows == [name for name, _ in SEARCHES]
