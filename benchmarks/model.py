"""``model``: the embedded model split over two real processes against the same model in one: prefill and decode, in turns; and the pipeline."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

import shmbroker
from benchmarks.table import Table
from shmbroker.client.local_broker import stop_process
from shmbroker.models import embedded
from shmbroker.models.checkpoint import Checkpoint
from tee_worker import Split, offload
from tee_worker.planning.own_part import own_part

PREFILL_TOKENS = 512
DECODE_TOKENS = 32
PROMPT_TOKENS = 32
SPLITS = (Split.FUSED, Split.OP, Split.BLOCK, Split.LAYER)
PIPELINES = ((512, (1, 2, 4)), (1024, (1, 4, 8)), (2048, (1, 4, 8)))
"""Tokens of a prompt, and how many parts of it are on their way at once."""
WHOLE = "in one process"
ALONE = "in one process, OpenMP's default"
"""Idle threads spin there: faster for one process, ruinous for two that take turns (``shmbroker.console.share_cpus``)."""
DEFAULT_SPIN_COUNT = 300_000
"""Of GNU OpenMP, when neither it nor the wait policy is set (GOMP_SPINCOUNT)."""


@contextlib.contextmanager
def _everywhere(threads: int) -> Iterator[None]:
    """All cores and so many threads, whatever the other benchmarks have set; idle threads of both processes sleep."""
    before, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(range(os.cpu_count() or 1)))
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        os.sched_setaffinity(0, cores)


def _prefill(model: Any, ids: torch.Tensor) -> float:
    begun = time.perf_counter()
    with torch.inference_mode():
        model(ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - begun


def _decode(model: Any, ids: torch.Tensor) -> float:
    begun = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=DECODE_TOKENS, min_new_tokens=DECODE_TOKENS, do_sample=False
        )
    return time.perf_counter() - begun


def _prompt(tokens: int) -> torch.Tensor:
    return torch.randint(100, 40_000, (1, tokens), generator=torch.Generator().manual_seed(tokens))


@contextlib.contextmanager
def _worker(threads: int) -> Iterator[None]:
    """A broker and a GPU worker with the embedded model."""
    model = str(embedded.ensure())
    command = [sys.executable, "-m", "gpu_worker", "--log-level", "warning", "serve", "--model", model, "--threads", str(threads)]
    with _everywhere(threads), shmbroker.local_broker():
        worker = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            yield
        finally:
            stop_process(worker)


def _alone(threads: int) -> dict[str, float]:
    """The whole model in a process of its own, as a user would run it."""
    environment = {**os.environ, "GOMP_SPINCOUNT": str(DEFAULT_SPIN_COUNT)}
    code = f"from benchmarks.model import measure_alone; measure_alone({threads})"
    found = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True).stdout
    measured: dict[str, float] = json.loads(found.splitlines()[-1])
    return measured


def measure_alone(threads: int) -> None:
    """In the process of :func:`_alone`: one line of JSON."""
    with _everywhere(threads):
        model = Checkpoint.at(embedded.ensure()).model(torch.float32)
        times = [(_prefill(model, _prompt(PREFILL_TOKENS)), _decode(model, _prompt(PROMPT_TOKENS))) for _ in range(4)][1:]
    print(json.dumps({"prefill": statistics.median(one[0] for one in times), "decode": statistics.median(one[1] for one in times)}))


def splits(rounds: int, threads: int) -> dict[str, Any]:
    """Seconds of prefill and decode of each split, in turns with the whole model in this process."""
    source = Checkpoint.at(embedded.ensure())
    alone = [_alone(threads)]
    with _worker(threads), shmbroker.connect(arena="1G", timeout=120.0) as client:
        models: dict[str, Any] = {WHOLE: source.model(torch.float32)}
        for split in SPLITS:
            for pipeline in (1, 2) if split in (Split.FUSED, Split.OP) else (1,):
                name = split.value if pipeline == 1 else f"{split.value}, --pipeline {pipeline}"
                models[name] = own_part(source, torch.float32, split)
                offload(models[name], client.channel(wait=60.0), split, pipeline=pipeline)
        times: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
        for number in range(rounds + 1):
            for name, model in models.items():
                measured = {"prefill": _prefill(model, _prompt(PREFILL_TOKENS)), "decode": _decode(model, _prompt(PROMPT_TOKENS))}
                if number:  # the first is for warming up
                    for what, seconds in measured.items():
                        times[name][what].append(seconds)
        del models, model
    alone.append(_alone(threads))
    medians = {name: {what: statistics.median(seconds) for what, seconds in kinds.items()} for name, kinds in times.items()}
    medians[ALONE] = {what: min(one[what] for one in alone) for what in alone[0]}
    whole = medians[WHOLE]
    table = Table(
        f"SmolLM2-135M, float32, prefill of {PREFILL_TOKENS} tokens, {threads} threads in each process",
        ["", "prefill s", "of one process", "decode tokens/s", "of one process"],
    )
    for name, kinds in medians.items():
        table.row(
            name,
            f"{kinds['prefill']:.3f}",
            f"{whole['prefill'] / kinds['prefill']:.2f}",
            f"{DECODE_TOKENS / kinds['decode']:.1f}",
            f"{whole['decode'] / kinds['decode']:.2f}",
        )
    table.show()
    return {"threads": threads, "prefill_tokens": PREFILL_TOKENS, "decode_tokens": DECODE_TOKENS, "seconds": medians}


def pipelines(rounds: int, lengths: int) -> list[dict[str, Any]]:
    """Prefill with one thread in each process, with and without parts on their way at once."""
    source = Checkpoint.at(embedded.ensure())
    table = Table(
        "Prefill in parts, one thread in each process", ["split", "tokens", "--pipeline", "prefill s", "speed-up", "worker computes"]
    )
    rows: list[dict[str, Any]] = []
    with _worker(1), shmbroker.connect(arena="2G", timeout=120.0) as client:
        for tokens, ways in PIPELINES[:lengths]:
            for split in (Split.FUSED, Split.OP):
                channels = {pipeline: client.channel(wait=60.0) for pipeline in ways}
                models = {pipeline: own_part(source, torch.float32, split) for pipeline in ways}
                for pipeline, channel in channels.items():
                    offload(models[pipeline], channel, split, pipeline=pipeline)
                times: dict[int, list[float]] = {pipeline: [] for pipeline in ways}
                for number in range(rounds + 1):
                    for pipeline, model in models.items():
                        channels[pipeline].forget_statistics()
                        seconds = _prefill(model, _prompt(tokens))
                        if number:
                            times[pipeline].append(seconds)
                base = statistics.median(times[1])
                for pipeline, measured in times.items():
                    seconds = statistics.median(measured)
                    share = channels[pipeline].report().total.compute_ms / 1e3 / measured[-1]
                    table.row(split.value, str(tokens), str(pipeline), f"{seconds:.3f}", f"{base / seconds:.2f}", f"{share:.0%} of it")
                    rows.append(
                        {
                            "split": split.value,
                            "tokens": tokens,
                            "pipeline": pipeline,
                            "seconds": seconds,
                            "speed_up": base / seconds,
                            "computes": share,
                        }
                    )
                for channel in channels.values():
                    channel.close()
                del models, model
    table.show()
    return rows


def run(rounds: int = 5, threads: int = 2, lengths: int = len(PIPELINES)) -> dict[str, Any]:
    """Measure both. ``lengths``: of how many of the prompts' lengths the pipeline is measured."""
    return {"splits": splits(rounds, threads), "pipelines": pipelines(max(1, rounds // 2), lengths)}
