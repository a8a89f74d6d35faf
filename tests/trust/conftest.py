"""What the tests of the trust modes share: a tiny model, workers that have it, honest ones and others, and clients."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import shmbroker
from shmbroker.control.status import ask
from tee_worker import offload
from tee_worker.offloading.offload import Offloaded
from tee_worker.trust.modes import Arithmetic, Trust, TrustOptions
from tests.peers import broker
from tests.processes import running, wait_until
from tests.tee_worker.conftest import tiny

__all__ = ["broker", "tiny"]

IDS = torch.tensor([[5, 17, 3, 88, 41, 2, 60, 9, 33, 71, 12]])
NEW_TOKENS = 6

VERIFY = TrustOptions(mode=Trust.VERIFY)
APPROXIMATE = TrustOptions(mode=Trust.VERIFY, arithmetic=Arithmetic.FLOAT)
BLIND = TrustOptions(mode=Trust.BLIND, pads=8)
DEALT = TrustOptions(mode=Trust.BLIND, pads=8, same_host_shares=True)
SHARES = TrustOptions(mode=Trust.SHARES, same_host_shares=True)
MODES = {"verify": VERIFY, "approximate": APPROXIMATE, "blind": BLIND, "dealt": DEALT, "shares": SHARES}


@pytest.fixture(scope="package")
def workers(broker: shmbroker.LocalBroker, tiny: Path) -> Iterator[tuple[str, str]]:
    """Two honest workers with the tiny model; their services."""
    with worker(tiny, "first"), worker(tiny, "other"):
        yield "first", "other"


@contextlib.contextmanager
def worker(model: Path, service: str, *options: str, command: str = "serve") -> Iterator[int]:
    """A worker process, ready; its pid."""
    arguments = [sys.executable, "-m", "gpu_worker", command, "--model", str(model), "--service", service, "--threads", "1", *options]
    with running(*arguments) as process:

        def ready() -> bool:
            assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
            return any(service in peer.services and peer.pid == process.pid for peer in ask(None).peers)

        wait_until(ready)
        yield process.pid


@pytest.fixture
def client(broker: shmbroker.LocalBroker) -> Iterator[shmbroker.Client]:
    with shmbroker.connect(arena="8M") as client:
        yield client


@pytest.fixture
def other_client(broker: shmbroker.LocalBroker) -> Iterator[shmbroker.Client]:
    with shmbroker.connect(arena="8M") as client:
        yield client


def whole_model(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model


@contextlib.contextmanager
def sealed(
    model: PreTrainedModel,
    channel: shmbroker.Channel | shmbroker.FailoverChannel,
    options: TrustOptions,
    second: shmbroker.Channel | shmbroker.FailoverChannel | None = None,
    *,
    split: str = "fused",
    check: bool = False,
) -> Iterator[Offloaded]:
    """The model with its linear layers elsewhere, and its session closed in the end."""
    two = options.mode is Trust.SHARES or options.same_host_shares
    moved = offload(model, channel, split, trust=options, second=second if two else None, check=check)
    try:
        yield moved
    finally:
        assert moved.sealed is not None
        moved.sealed.close()


@torch.inference_mode()
def logits(model: PreTrainedModel) -> torch.Tensor:
    result: torch.Tensor = model(IDS).logits
    return result.clone()


@torch.inference_mode()
def generate(model: PreTrainedModel, **options: object) -> torch.Tensor:
    result: torch.Tensor = model.generate(  # type: ignore[operator]
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=NEW_TOKENS, do_sample=False, **options
    )
    return result
