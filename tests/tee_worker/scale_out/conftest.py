"""What the tests of a fleet share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cycling_model import CONTEXT, save_cycling
from tests.fleet import Fleet, running_fleet

WHY = "the extra is not installed: pip install 'shmbroker[ray]'"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("ray") is None:
        for item in items:
            if item.get_closest_marker("ray"):
                item.add_marker(pytest.mark.skip(reason=WHY))


@pytest.fixture(scope="module")
def cycling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_cycling(tmp_path_factory.mktemp("model") / "cycling")


@pytest.fixture(scope="module")
def fleet(cycling: Path) -> Iterator[Fleet]:
    """Two replicas on two nodes."""
    with running_fleet(cycling, "--local-nodes", "2", "--replicas", "2", "--max-context", str(CONTEXT)) as fleet:
        yield fleet
