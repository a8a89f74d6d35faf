"""Pinning, probed against a driver that refuses in every way."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from gpu_worker.cuda.pinning import Pinning
from tests.gpu_worker.fake_cuda import NOT_SUPPORTED, FakeCuda

GIB = 1 << 30


def test_a_segment_is_registered_once_and_unregistered_once(tmp_path: Path) -> None:
    cuda = FakeCuda(tmp_path)
    pinning = Pinning(cuda)
    assert pinning.probe()
    assert cuda.registered == {}
    unpin = pinning.pin(1 << 40, 3 * GIB)
    assert cuda.registered == {1 << 40: 3 * GIB}
    unpin()
    unpin()
    assert cuda.registered == {}
    assert (pinning.pinned, pinning.pageable) == (1, 0)


@pytest.mark.parametrize(("gib", "pieces"), [(64, [64]), (65, [64, 1]), (200, [64, 64, 64, 8])])
def test_a_large_segment_is_registered_in_pieces(tmp_path: Path, gib: int, pieces: list[int]) -> None:
    cuda = FakeCuda(tmp_path)
    unpin = Pinning(cuda).pin(1 << 40, gib * GIB)
    assert [nbytes // GIB for nbytes in cuda.registered.values()] == pieces
    assert list(cuda.registered) == [(1 << 40) + index * 64 * GIB for index in range(len(pieces))]
    unpin()
    assert cuda.registered == {}


def test_nothing_is_never_registered(tmp_path: Path) -> None:
    cuda = FakeCuda(tmp_path)
    Pinning(cuda).pin(1 << 40, 0)()
    assert cuda.log == []


@pytest.mark.parametrize("code", [NOT_SUPPORTED, 2, 1])
def test_a_refusal_means_pageable_and_is_told_once(tmp_path: Path, code: int, caplog: pytest.LogCaptureFixture) -> None:
    pinning = Pinning(FakeCuda(tmp_path, {"cudaHostRegister": code}))
    with caplog.at_level(logging.WARNING):
        assert not pinning.probe()
        for _ in range(3):
            pinning.pin(1 << 40, GIB)()
    assert pinning.pageable == 3
    assert len(caplog.records) == 1
    assert f"cudaHostRegister: refused ({code})" in caplog.text


def test_a_refusal_midway_gives_back_what_was_registered(tmp_path: Path) -> None:
    cuda = FakeCuda(tmp_path, {"cudaHostRegister": 2}, refuse_after=2)
    pinning = Pinning(cuda)
    pinning.pin(1 << 40, 200 * GIB)()
    assert cuda.registered == {}
    assert [what for what, _, _ in cuda.log] == ["register", "register", "unregister", "unregister"]
    assert (pinning.pinned, pinning.pageable) == (0, 1)


def test_the_log_counts_the_slower_way_with_each_segment(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pinning = Pinning(FakeCuda(tmp_path, {"cudaHostRegister": 2}, refuse_after=1))
    with caplog.at_level(logging.INFO):
        unpins = [pinning.pin(index << 40, GIB) for index in (1, 2, 3)]
    counted = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert counted[0].endswith("is pinned; so far 1 pinned, 0 pageable")
    assert counted[-1].endswith("is pageable; so far 1 pinned, 2 pageable")
    for unpin in unpins:
        unpin()


def test_without_a_driver_to_ask_all_is_pageable(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pinning = Pinning(None, "cuda-bindings cannot be used")
    assert not pinning.probe()
    pinning.pin(1 << 40, GIB)()
    assert pinning.pageable == 1
    assert "cuda-bindings cannot be used" in caplog.text
