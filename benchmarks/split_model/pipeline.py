"""Prefill with one thread in each process, with and without parts of the prompt on their way at once."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import shmbroker
from benchmarks.split_model.processes import START_SECONDS
from benchmarks.split_model.work import prefill
from benchmarks.table import Table
from shmbroker.models.checkpoint import Checkpoint
from tee_worker import Split, offload
from tee_worker.planning.own_part import own_part

LENGTHS = {512: (1, 2, 4), 1024: (1, 4, 8), 2048: (1, 4, 8)}
"""Tokens of a prompt, and how many parts of it are on their way at once."""


def pipelines(client: shmbroker.Client, model: Path, rounds: int, lengths: Mapping[int, tuple[int, ...]]) -> list[dict[str, Any]]:
    """A row for each split, length and number of parts; seconds are medians."""
    table = Table(
        "Prefill in parts, one thread in each process", ["split", "tokens", "--pipeline", "prefill s", "speed-up", "worker computes"]
    )
    rows: list[dict[str, Any]] = []
    for tokens, ways in lengths.items():
        for split in (Split.FUSED, Split.OP):
            rows += _one_split(client, Checkpoint.at(model), split, tokens, ways, rounds)
    for row in rows:
        table.row(
            row["split"], str(row["tokens"]), str(row["pipeline"]), f"{row['seconds']:.3f}", f"{row['speed_up']:.2f}",
            f"{row['computes']:.0%} of it",
        )  # fmt: skip
    table.show()
    return rows


def _one_split(
    client: shmbroker.Client, source: Checkpoint, split: Split, tokens: int, ways: tuple[int, ...], rounds: int
) -> list[dict[str, Any]]:
    channels = {pipeline: client.channel(wait=START_SECONDS) for pipeline in ways}
    models = {pipeline: own_part(source, torch.float32, split) for pipeline in ways}
    for pipeline, channel in channels.items():
        offload(models[pipeline], channel, split, pipeline=pipeline)
    times: dict[int, list[float]] = {pipeline: [] for pipeline in ways}
    for number in range(rounds + 1):
        for pipeline, model in models.items():
            channels[pipeline].forget_statistics()
            seconds = prefill(model, tokens)
            if number:  # the first is for warming up
                times[pipeline].append(seconds)
    base = statistics.median(times[1])
    rows = []
    for pipeline, measured in times.items():
        seconds = statistics.median(measured)
        rows.append(
            {
                "split": split.value,
                "tokens": tokens,
                "pipeline": pipeline,
                "seconds": seconds,
                "speed_up": base / seconds,
                "computes": channels[pipeline].report().total.compute_ms / 1e3 / measured[-1],
            }
        )
    for channel in channels.values():
        channel.close()
    return rows
