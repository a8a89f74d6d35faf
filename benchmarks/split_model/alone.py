"""The whole model in a process of its own, as a user would run it: ``python -m benchmarks.split_model.alone THREADS MODEL TOKENS TOKENS TOKENS``."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.split_model.processes import on_all_cores
from benchmarks.split_model.work import Times, Work, medians
from shmbroker.models.checkpoint import Checkpoint

DEFAULT_SPIN_COUNT = 300_000
"""Of GNU OpenMP, when neither it nor the wait policy is set (GOMP_SPINCOUNT). Idle threads spin there: faster for one process, ruinous for two
that take turns (``shmbroker.console.share_cpus``)."""

ROUNDS = 4
"""The first is for warming up."""


def alone(work: Work, threads: int) -> Times:
    """Medians."""
    environment = {**os.environ, "GOMP_SPINCOUNT": str(DEFAULT_SPIN_COUNT)}
    command = [sys.executable, "-m", "benchmarks.split_model.alone", str(threads), *map(str, dataclasses.astuple(work))]
    found = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Times(*json.loads(found.splitlines()[-1]))


def measure(work: Work, threads: int) -> Times:
    """In this process."""
    with on_all_cores(threads):
        model = Checkpoint.at(work.model).model(torch.float32)
        return medians([work.times(model) for _ in range(ROUNDS)][1:])


if __name__ == "__main__":
    threads, folder, *tokens = sys.argv[1:]
    print(json.dumps(measure(Work(Path(folder), *map(int, tokens)), int(threads))))
