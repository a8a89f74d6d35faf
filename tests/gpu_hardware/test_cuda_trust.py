"""The trust modes with a worker on ``cuda:0``: products of integers by the tensor cores are exact, and so are whole models, bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import shmbroker
from gpu_worker.cuda.limbs import LimbProduct
from shmbroker.trust.bits import BITS
from tests.tee_worker.conftest import tiny
from tests.trust.conftest import MODES, generate, logits, sealed, whole_model, worker
from tests.trust.test_limbs import exact, weight_of

__all__ = ["tiny"]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "columns", "outputs"), [(1, 1, 1), (5, 51, 37), (17, 64, 8), (40, 700, 33), (300, 4096, 1030)])
def test_a_product_of_limbs_is_exact(bits: int, rows: int, columns: int, outputs: int) -> None:
    torch.manual_seed(bits)
    weight = weight_of(outputs, columns, bits)
    x = torch.randint(-(2**31), 2**31, (rows, columns), dtype=torch.int32)
    x[0, 0] = -(2**31)
    out = torch.empty(rows, outputs, dtype=torch.int32, device="cuda:0")
    LimbProduct(weight, torch.device("cuda:0"))(x.cuda(), out)
    assert torch.equal(out.cpu(), exact(x, weight))


@pytest.fixture(scope="module")
def workers(broker: shmbroker.LocalBroker, tiny: Path) -> Iterator[dict[str, tuple[str, str]]]:
    """Two workers of each device with the tiny model; their services."""
    with contextlib.ExitStack() as running:
        services = {}
        for device in ("cpu", "cuda:0"):
            services[device] = f"first-{device[:3]}", f"second-{device[:3]}"
            for service in services[device]:
                running.enter_context(worker(tiny, service, "--device", device))
        yield services


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "approximate"])
def test_an_exact_mode_gives_the_bits_that_a_worker_on_the_processor_gives(
    client: shmbroker.Client, tiny: Path, workers: dict[str, tuple[str, str]], mode: str
) -> None:
    found = []
    with shmbroker.connect(arena="8M") as other:
        for first, second in workers.values():
            model = whole_model(tiny)
            with sealed(model, client.channel(first), MODES[mode], other.channel(second)) as moved:
                found.append(logits(model))
                assert moved.sealed is not None
                report = moved.sealed.session.report()
            assert report.checked > 0
            assert report.rejected == 0
    assert torch.equal(*found)


def test_the_approximate_check_takes_what_a_gpu_gives(client: shmbroker.Client, tiny: Path, workers: dict[str, tuple[str, str]]) -> None:
    model = whole_model(tiny)
    with sealed(model, client.channel(workers["cuda:0"][0]), MODES["approximate"], check=True) as moved:
        assert torch.equal(generate(model), generate(whole_model(tiny)))
        assert moved.sealed is not None
        report = moved.sealed.session.report()
    assert report.checked > 0
    assert report.rejected == 0
