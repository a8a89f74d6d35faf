"""Where a model comes from: a checkpoint or a shape, and exactly one of them."""

from __future__ import annotations

from pathlib import Path

import pytest

import shmbroker
from shmbroker.models.checkpoint import Checkpoint
from shmbroker.models.random_model import RandomModel
from shmbroker.models.source import model_source


def test_a_model_is_a_checkpoint_and_a_shape_is_random(tmp_path: Path) -> None:
    (tmp_path / "one.gguf").write_bytes(b"GGUF")
    assert model_source(str(tmp_path), None, 3) == Checkpoint(tmp_path, "one.gguf")
    assert model_source(None, "llama-3.2-1b", 3) == RandomModel("llama-3.2-1b", 3)


@pytest.mark.parametrize(("model", "shape"), [(None, None), ("/model", "llama-3.2-1b")])
def test_none_or_both_is_refused_with_what_to_give(model: str | None, shape: str | None) -> None:
    with pytest.raises(shmbroker.BadInput, match=r"give --model DIR for a checkpoint, or --shape NAME .*: one of them"):
        model_source(model, shape, 0)
