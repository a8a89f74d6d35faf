"""Models for tests: tiny ones with random weights, made here, and the embedded one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import shmbroker
from shmbroker.models import embedded as embedded_model
from tests.processes import running, wait_until

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
"""Every size another, so that no two can be mixed up unnoticed."""


def tiny_llama(**changes: object) -> LlamaConfig:
    """A llama of these sizes."""
    return LlamaConfig(**{**SIZES, **changes})


def save_random(config: LlamaConfig, folder: Path, seed: int = 0) -> Path:
    """A checkpoint of random weights, with biases that are not zero."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="package")
def broker() -> Iterator[shmbroker.LocalBroker]:
    with shmbroker.local_broker() as broker:
        yield broker


@pytest.fixture(scope="package")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tiny_llama(attention_bias=True), tmp_path_factory.mktemp("tiny"))


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
