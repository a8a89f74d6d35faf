"""``model``: the embedded model split over two real processes against the same model in this process: prefill and decode, in turns."""

from __future__ import annotations

import contextlib
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
from shmbroker import embedded_model
from shmbroker.checkpoint import Checkpoint
from shmbroker.local import stop_process
from tee_worker import Split, offload
from tee_worker.parts import own_part

PREFILL_TOKENS = 512
DECODE_TOKENS = 32
PROMPT_TOKENS = 32
SPLITS = (Split.FUSED, Split.OP, Split.LAYER)


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


def run(rounds: int = 5, threads: int = 2) -> dict[str, Any]:
    """Measure; seconds, and each split's speed as a part of the whole model's."""
    folder = embedded_model.ensure()
    source = Checkpoint.at(folder)
    generator = torch.Generator().manual_seed(0)
    long, short = (torch.randint(100, 40_000, (1, count), generator=generator) for count in (PREFILL_TOKENS, PROMPT_TOKENS))
    with _everywhere(threads), shmbroker.local_broker():
        command = [sys.executable, "-m", "gpu_worker", "--log-level", "warning", "serve", "--model", str(folder), "--threads", str(threads)]
        worker = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            with shmbroker.connect(arena="1G", timeout=120.0) as client:
                models: dict[str, Any] = {"in one process": source.model(torch.float32)}
                for split in SPLITS:
                    models[split.value] = own_part(source, torch.float32, split)
                    offload(models[split.value], client.channel(wait=60.0), split)
                times: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
                for number in range(rounds + 1):
                    for name, model in models.items():
                        measured = {"prefill": _prefill(model, long), "decode": _decode(model, short)}
                        if number:  # the first is for warming up
                            for what, seconds in measured.items():
                                times[name][what].append(seconds)
                del models, model
        finally:
            stop_process(worker)
    medians = {name: {what: statistics.median(seconds) for what, seconds in kinds.items()} for name, kinds in times.items()}
    whole = medians["in one process"]
    table = Table(
        f"SmolLM2-135M, float32, {threads} threads in each process",
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
