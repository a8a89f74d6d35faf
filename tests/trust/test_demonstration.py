"""What anybody can run: a worker that reads, and one that lies."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.processes import run
from tests.tee_worker.conftest import talking

__all__ = ["talking"]

PROMPT = "my name is ada, and this is a secret"


def test_the_demonstration_shows_what_is_read_and_that_lies_are_noticed(talking: Path) -> None:
    done = run(
        sys.executable, "-m", "tee_worker", "demo-trust", "--model", str(talking), "--prompt", PROMPT, "--max-new-tokens", "4", "--json"
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    read = {one["trust"]: one["recovered"] for one in shown["readings"]}
    assert read["plain"] == read["verify"] == len(PROMPT)
    assert read["blind"] <= 5, "one of 97 by chance, in 36 places"
    noticed = {one["trust"]: one["noticed"] for one in shown["lies"]}
    assert noticed == {"plain": False, "verify": True, "blind": True}
    assert "gave a wrong result: row" in shown["lies"][-1]["told"]
    for line in ("A worker that reads.", "A worker that lies once"):
        assert line in done.stderr
