"""Prefill and decode of a model at each split and dtype, against the same model on the same device in one process."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch

import shmbroker
from benchmarks.device.timing import median_seconds, synchronize
from benchmarks.split_model.processes import CALL_SECONDS, START_SECONDS, gpu_worker
from benchmarks.split_model.work import Work, prompt
from benchmarks.table import Table
from shmbroker.models.checkpoint import Checkpoint
from tee_worker import Split, offload
from tee_worker.planning.own_part import own_part

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WHOLE = "in one process"

Rows = dict[str, dict[str, float]]
"""By split: milliseconds of a prefill, and of a token that is decoded; where it is split, of the mean call, and of the worker's part of it, copies included."""


def model_times(
    device: str,
    work: Work,
    seconds: float,
    dtypes: Mapping[str, torch.dtype] = DTYPES,
    splits: Iterable[Split] = tuple(Split),
) -> dict[str, Rows]:
    """By dtype and split; about ``seconds`` for each. The TEE worker has half of the processors: as many threads share a core elsewhere."""
    threads = max(1, (os.cpu_count() or 1) // 2)
    result = {name: _one_dtype(device, work, seconds, name, dtype, splits, threads) for name, dtype in dtypes.items()}
    columns = [f"{name} {what}" for name in result for what in ("prefill ms", "token ms")]
    table = Table(
        f"{work.model.name} on {device}, prefill of {work.prefill_tokens} tokens, {threads} threads in the TEE worker", ["split", *columns]
    )
    for row in (WHOLE, *[split.value for split in splits]):
        table.row(row, *[text for rows in result.values() for text in (f"{rows[row]['prefill_ms']:.1f}", f"{rows[row]['token_ms']:.2f}")])
    table.show()
    calls = Table(
        "the mean call there, mostly of decode", ["split", *[f"{name} {what}" for name in result for what in ("ms", "of it computing")]]
    )
    for row in [split.value for split in splits]:
        calls.row(row, *[f"{rows[row][what]:.2f}" for rows in result.values() for what in ("call_ms", "computing_ms")])
    calls.show()
    return result


@torch.inference_mode()
def _one_dtype(device: str, work: Work, seconds: float, name: str, dtype: torch.dtype, splits: Iterable[Split], threads: int) -> Rows:
    source = Checkpoint.at(work.model)
    whole: Any = source.model(dtype)
    whole.to(device)
    result = {WHOLE: _times(whole, work, seconds, device)}
    del whole  # its memory is the worker's next
    with gpu_worker(work.model, threads, "--device", device, "--dtype", name):
        for split in splits:
            with shmbroker.connect(arena="1G", timeout=CALL_SECONDS) as client:
                own, channel = own_part(source, dtype, split), client.channel(wait=START_SECONDS)
                offload(own, channel, split)
                result[split.value] = _times(own, work, seconds, "cpu")
                total = channel.report().total
                result[split.value] |= {"call_ms": total.rpc_ms / total.calls, "computing_ms": total.compute_ms / total.calls}
                del own
    return result


def _times(model: Any, work: Work, seconds: float, device: str) -> dict[str, float]:
    """Of a model whose inputs lie on ``device``. A token's: of a decode less that of its first token."""

    def prefill() -> None:
        model(prompt(work.prefill_tokens).to(device), use_cache=True, logits_to_keep=1)
        synchronize(device)

    def decode(tokens: int) -> None:
        ids = prompt(work.prompt_tokens).to(device)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

    one, all_of_them = (median_seconds(partial(decode, tokens), seconds, 1, 3) for tokens in (1, work.decode_tokens))
    return {"prefill_ms": median_seconds(prefill, seconds) * 1e3, "token_ms": (all_of_them - one) / (work.decode_tokens - 1) * 1e3}
