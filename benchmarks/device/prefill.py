"""The prefill of a model at each split and dtype, against the same model on the same device in one process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import shmbroker
from benchmarks.device.timing import median_seconds, synchronize
from benchmarks.split_model.processes import CALL_SECONDS, START_SECONDS, gpu_worker
from benchmarks.split_model.work import prompt
from benchmarks.table import Table
from shmbroker.models.checkpoint import Checkpoint
from tee_worker import Split, offload
from tee_worker.planning.own_part import own_part

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WHOLE = "in one process"


def prefills(
    device: str,
    model: Path,
    tokens: int,
    seconds: float,
    dtypes: Mapping[str, torch.dtype] = DTYPES,
    splits: Iterable[Split] = tuple(Split),
) -> dict[str, dict[str, float]]:
    """Milliseconds by dtype and split; ``seconds`` for each."""
    result = {name: _one_dtype(device, model, tokens, seconds, name, dtype, splits) for name, dtype in dtypes.items()}
    table = Table(f"prefill of {tokens} tokens, {model.name}, on {device}", ["split", *[f"{name} ms" for name in result]])
    for row in (WHOLE, *[split.value for split in splits]):
        table.row(row, *[f"{rows[row]:.1f}" for rows in result.values()])
    table.show()
    return result


@torch.inference_mode()
def _one_dtype(
    device: str, model: Path, tokens: int, seconds: float, name: str, dtype: torch.dtype, splits: Iterable[Split]
) -> dict[str, float]:
    ids, source = prompt(tokens), Checkpoint.at(model)
    whole: Any = source.model(dtype)
    whole.to(device)

    def in_one() -> None:
        whole(ids.to(device), use_cache=True, logits_to_keep=1)
        synchronize(device)

    result = {WHOLE: median_seconds(in_one, seconds) * 1e3}
    whole = None  # its memory is the worker's next
    with gpu_worker(model, 1, "--device", device, "--dtype", name):
        for split in splits:
            with shmbroker.connect(arena="1G", timeout=CALL_SECONDS) as client:
                own = own_part(source, dtype, split)
                offload(own, client.channel(wait=START_SECONDS), split)
                result[split.value] = median_seconds(partial(own, ids, use_cache=True, logits_to_keep=1), seconds) * 1e3
                del own
    return result
