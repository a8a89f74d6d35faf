"""Prefill and decode at each split, in turns with the whole model in this process."""

from __future__ import annotations

from typing import Any

import torch

import shmbroker
from benchmarks.split_model.processes import START_SECONDS
from benchmarks.split_model.work import Times, Work, medians
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


def splits(client: shmbroker.Client, work: Work, rounds: int) -> dict[str, Times]:
    """Medians by split. Idle threads of both processes sleep."""
    source = Checkpoint.at(work.model)
    models: dict[str, Any] = {WHOLE: source.model(torch.float32)}
    channels = []
    for name, (split, pipeline) in WAYS.items():
        models[name] = own_part(source, torch.float32, split)
        channels.append(client.channel(wait=START_SECONDS))
        offload(models[name], channels[-1], split, pipeline=pipeline)
    times: dict[str, list[Times]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            times[name].append(work.times(model))
    for channel in channels:
        channel.close()
    return {name: medians(measured[1:]) for name, measured in times.items()}  # the first is for warming up


def show(work: Work, threads: int, by_split: dict[str, Times], alone: Times) -> dict[str, Any]:
    """Print the table; the figures. ``alone``: where idle threads do not sleep."""
    rows, whole = {**by_split, ALONE: alone}, by_split[WHOLE]
    table = Table(
        f"{work.model.name}, float32, prefill of {work.prefill_tokens} tokens, {threads} threads in each process",
        ["", "prefill s", "of one process", "decode tokens/s", "of one process"],
    )
    for name, row in rows.items():
        table.row(
            name, f"{row.prefill:.3f}", f"{whole.prefill / row.prefill:.2f}", f"{work.decode_tokens / row.decode:.1f}",
            f"{whole.decode / row.decode:.2f}",
        )  # fmt: skip
    table.show()
    return {
        "threads": threads,
        "prefill_tokens": work.prefill_tokens,
        "decode_tokens": work.decode_tokens,
        "seconds": {name: row._asdict() for name, row in rows.items()},
    }
