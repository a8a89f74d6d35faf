"""Tests on a real GPU: skipped, with the reason, where torch sees none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import shmbroker
from shmbroker.models import embedded as embedded_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "tests/gpu_hardware/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason=f"torch {torch.__version__} sees no CUDA device here"))


@pytest.fixture(scope="package")
def broker() -> Iterator[shmbroker.LocalBroker]:
    with shmbroker.local_broker() as broker:
        yield broker


@pytest.fixture
def client(broker: shmbroker.LocalBroker) -> Iterator[shmbroker.Client]:
    with shmbroker.connect(arena="64M", timeout=120.0) as client:
        yield client


@pytest.fixture(scope="session")
def embedded() -> Path:
    return embedded_model.ensure()
