"""The modes as they are measured, and a model in each."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

import shmbroker
from benchmarks.split_model.processes import START_SECONDS
from shmbroker.models.checkpoint import Checkpoint
from tee_worker import offload
from tee_worker.offloading.offload import Offloaded
from tee_worker.trust.modes import Arithmetic, Trust, TrustOptions

PLAIN = "plain"
APPROXIMATE = "verify, float"
VERIFY = "verify"
BLIND = "blind, pads ready"

_LOOK_SECONDS = 0.01


def ways(pads: int) -> dict[str, TrustOptions]:
    """Options by name."""
    return {
        PLAIN: TrustOptions(),
        APPROXIMATE: TrustOptions(mode=Trust.VERIFY, arithmetic=Arithmetic.FLOAT),
        VERIFY: TrustOptions(mode=Trust.VERIFY),
        BLIND: TrustOptions(mode=Trust.BLIND, pads=pads),
    }


@contextlib.contextmanager
def split_model(client: shmbroker.Client, folder: Path, options: TrustOptions) -> Iterator[tuple[Any, Offloaded]]:
    """The model of a checkpoint, its linear layers elsewhere at split ``fused``."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    model = Checkpoint.at(folder).model(torch.float32)
    channel = client.channel(wait=START_SECONDS)
    moved = offload(model, channel, trust=options, check=False)
    try:
        yield model, moved
    finally:
        if moved.sealed is not None:
            moved.sealed.close()
        channel.close()


def await_pads(moved: Offloaded) -> None:
    """Until all are there that are to be made ahead of time."""
    while moved.sealed is not None and any(pads.missing > 0 for pads in moved.sealed.session.pads):
        time.sleep(_LOOK_SECONDS)
