"""Models of random weights: the same wherever they are made, whole or in part."""

from __future__ import annotations

import pytest
import torch

import shmbroker
from shmbroker.models import random_model
from shmbroker.models.parts import gpu_part, tee_part
from shmbroker.models.random_model import SHAPES, RandomModel
from tests.tiny_models import SIZES


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shapes that are made in no time."""
    tiny = {"model_type": "llama", **SIZES, "attention_bias": True}
    monkeypatch.setattr(random_model, "SHAPES", {**SHAPES, "tiny": tiny, "tiny, tied": {**tiny, "tie_word_embeddings": True}})


def parameters(shape: str = "tiny", seed: int = 0, keep: object = None) -> dict[str, torch.Tensor]:
    model = RandomModel(shape, seed).model(torch.float32, keep)  # type: ignore[arg-type]
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("shape", ["tiny", "tiny, tied"])
def test_each_side_makes_its_own_part_of_one_model(shape: str) -> None:
    whole, gpu, tee = (parameters(shape, keep=keep) for keep in (None, gpu_part, tee_part))
    assert set(gpu) | set(tee) == set(whole)
    assert not set(gpu) & set(tee)
    for part in (gpu, tee):
        assert all(torch.equal(parameter, whole[name]) for name, parameter in part.items())


def test_the_seed_decides_and_nothing_else() -> None:
    torch.manual_seed(1)
    first, other = parameters(seed=3), parameters(seed=4)
    torch.manual_seed(2)
    again = parameters(seed=3)
    assert all(torch.equal(parameter, again[name]) for name, parameter in first.items())
    matrices = [name for name, parameter in first.items() if parameter.ndim > 1]
    assert matrices
    assert not any(torch.equal(first[name], other[name]) for name in matrices)


def test_no_two_matrices_and_no_two_rows_are_alike() -> None:
    found = parameters()
    rows = [tuple(row.tolist()) for parameter in found.values() if parameter.ndim > 1 for row in parameter]
    assert len(rows) == len(set(rows))


def test_norms_begin_as_ones_and_biases_as_zeros_and_matrices_as_training_begins() -> None:
    for name, parameter in parameters().items():
        if parameter.ndim > 1:
            assert float(parameter.std()) == pytest.approx(0.02, rel=0.2)
            assert abs(float(parameter.mean())) < 0.005
        else:
            assert set(parameter.tolist()) == {0.0 if name.endswith("bias") else 1.0}, name


def test_a_model_of_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = RandomModel("tiny, tied").model(torch.bfloat16)
    assert not model.training
    with torch.inference_mode():
        logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 3, SIZES["vocab_size"])
    assert logits.isfinite().all()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_that_is_offered_is_a_configuration_with_its_sizes(shape: str) -> None:
    config = RandomModel(shape).config()
    assert {key: getattr(config, key) for key in SHAPES[shape] if key != "model_type"} == {
        key: value for key, value in SHAPES[shape].items() if key != "model_type"
    }


def test_a_shape_that_is_not_known_is_refused_with_those_that_are() -> None:
    with pytest.raises(shmbroker.BadInput, match=r"shape 'llama-9' is not known; there are: llama-3.2-1b, llama-3.2-3b"):
        RandomModel("llama-9")


def test_it_is_named_by_shape_and_seed() -> None:
    assert RandomModel("llama-3.2-1b", 7).name == "llama-3.2-1b, random weights of seed 7"
