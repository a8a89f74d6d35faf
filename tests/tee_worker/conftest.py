"""What the tests of this room share: a tiny model, a GPU worker that has it, and the embedded model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import shmbroker
from benchmarks.families.tiny import tiny_family
from shmbroker.models import embedded as embedded_model
from tests.processes import running, wait_until
from tests.tiny_models import save_characters, save_random, tiny_llama

IDS = torch.tensor([[5, 17, 3, 88, 41, 2, 60, 9, 33, 71, 12]])


@pytest.fixture(scope="package")
def broker() -> Iterator[shmbroker.LocalBroker]:
    with shmbroker.local_broker() as broker:
        yield broker


@pytest.fixture(scope="package")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tiny_llama(attention_bias=True), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="package")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer of one token a character, and a chat template."""
    folder = save_random(tiny_llama(attention_bias=True, max_position_embeddings=192), tmp_path_factory.mktemp("model") / "talking")
    save_characters(folder)
    return folder


@pytest.fixture(scope="package")
def tiny_worker(broker: shmbroker.LocalBroker, tiny: Path) -> Iterator[str]:
    """A GPU worker with the tiny model; its service's name."""
    with gpu_worker(tiny, "tiny"):
        yield "tiny"


@pytest.fixture
def client(broker: shmbroker.LocalBroker) -> Iterator[shmbroker.Client]:
    with shmbroker.connect(arena="64M") as client:
        yield client


@pytest.fixture
def whole(tiny: Path) -> PreTrainedModel:
    """The tiny model in this process alone."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny)
    return model


def gpu_worker(model: Path, service: str, *options: str):  # type: ignore[no-untyped-def]
    """A GPU worker process, ready, for the length of a block."""
    import contextlib

    @contextlib.contextmanager
    def block() -> Iterator[int]:
        command = [sys.executable, "-m", "gpu_worker", "serve", "--model", str(model), "--service", service, *options]
        with running(*command) as process:

            def ready() -> bool:
                assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
                from shmbroker.control.status import ask

                return any(service in peer.services for peer in ask(None).peers)

            wait_until(ready)
            yield process.pid

    return block()


@pytest.fixture(scope="session")
def embedded() -> Path:
    return embedded_model.ensure()


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def folder(family: str, **changes: Any) -> Path:
        key = f"{family}-{len(made)}" if changes else family
        if key not in made:
            made[key] = tiny_family(tmp_path_factory.mktemp("family") / key, family, **changes)
        return made[key]

    return folder


@torch.no_grad()
def logits(model: PreTrainedModel, **options: Any) -> torch.Tensor:
    result: torch.Tensor = model(IDS, **options).logits
    return result.clone()
