"""The doctor on CUDA IPC, over the stand-in for the driver: it is tried as a device arena does it, and nothing stays allocated."""

from __future__ import annotations

from pathlib import Path

import pytest

import shmbroker.arena
from shmbroker.commands.doctor import cuda
from shmbroker.commands.doctor.check import State
from tests.gpu_worker.fake_cuda import NOT_SUPPORTED, FakeCuda


@pytest.mark.parametrize(("refused", "state"), [("", State.OK), ("cudaMalloc", State.WARN), ("cudaIpcGetMemHandle", State.WARN)])
def test_an_allocation_is_exported_for_real_and_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str, state: State) -> None:
    driver = FakeCuda(tmp_path, {refused: NOT_SUPPORTED})
    monkeypatch.setattr(shmbroker.arena, "CudaRuntime", lambda index: driver)
    check = cuda.ipc()
    assert (check.state, check.figures) == (state, {"ipc": state is State.OK})
    assert (f"{refused}: refused ({NOT_SUPPORTED})" in check.text) == bool(refused)
    assert not driver.mapped
    assert not list(tmp_path.iterdir())
