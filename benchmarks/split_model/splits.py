"""Prefill and decode at each split, in turns with the whole model in this process."""

from __future__ import annotations

import statistics
from typing import Any

import torch

import shmbroker
from benchmarks.split_model.alone import alone
from benchmarks.split_model.processes import CALL_SECONDS, START_SECONDS, gpu_worker
from benchmarks.split_model.work import Work
from benchmarks.table import Table
from shmbroker.models.checkpoint import Checkpoint
from tee_worker import Split, offload
from tee_worker.planning.own_part import own_part

WAYS = {
    "fused": (Split.FUSED, 1),
    "fused, --pipeline 2": (Split.FUSED, 2),
    "op": (Split.OP, 1),
    "op, --pipeline 2": (Split.OP, 2),
    "block": (Split.BLOCK, 1),
    "layer": (Split.LAYER, 1),
}
"""Split, and how many parts of a prompt are on their way at once."""
WHOLE = "in one process"
ALONE = "in one process, OpenMP's default"


def splits(work: Work, rounds: int, threads: int, arena: str) -> dict[str, Any]:
    """Seconds of prefill and decode by split, medians. Both processes' idle threads sleep; where the model is alone they do not."""
    source = Checkpoint.at(work.model)
    alones = [alone(work, threads)]
    with gpu_worker(work.model, threads), shmbroker.connect(arena=arena, timeout=CALL_SECONDS) as client:
        models: dict[str, Any] = {WHOLE: source.model(torch.float32)}
        for name, (split, pipeline) in WAYS.items():
            models[name] = own_part(source, torch.float32, split)
            offload(models[name], client.channel(wait=START_SECONDS), split, pipeline=pipeline)
        times: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
        for number in range(rounds + 1):
            for name, model in models.items():
                measured = {"prefill": work.prefill(model), "decode": work.decode(model)}
                if number:  # the first is for warming up
                    for what, seconds in measured.items():
                        times[name][what].append(seconds)
        del models, model
    if rounds > 1:  # later again: the machine's speed may have changed meanwhile
        alones.append(alone(work, threads))
    medians = {name: {what: statistics.median(seconds) for what, seconds in kinds.items()} for name, kinds in times.items()}
    medians[ALONE] = {what: min(one[what] for one in alones) for what in alones[0]}
    whole = medians[WHOLE]
    table = Table(
        f"{work.model.name}, float32, prefill of {work.prefill_tokens} tokens, {threads} threads in each process",
        ["", "prefill s", "of one process", "decode tokens/s", "of one process"],
    )
    for name, kinds in medians.items():
        table.row(
            name,
            f"{kinds['prefill']:.3f}",
            f"{whole['prefill'] / kinds['prefill']:.2f}",
            f"{work.decode_tokens / kinds['decode']:.1f}",
            f"{whole['decode'] / kinds['decode']:.2f}",
        )
    table.show()
    return {"threads": threads, "prefill_tokens": work.prefill_tokens, "decode_tokens": work.decode_tokens, "seconds": medians}
