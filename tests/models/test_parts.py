"""Which modules of a decoder are the GPU worker's, found by what they are and never by their class's name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shmbroker.models.parts import LayerHalves, decoder_layers, features, gpu_part, halves_of, is_linear, tee_part, weight_and_bias
from tests.tiny_models import SIZES

GPT2 = {"vocab_size": 97, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    sizes = SIZES if request.param == "llama" else GPT2
    made: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **sizes))
    return made


def test_each_module_is_one_sides_and_the_heavy_ones_are_the_gpu_workers(model: PreTrainedModel) -> None:
    for name, module in model.named_modules():
        assert gpu_part(model, module) != tee_part(model, module), name
    heavy = sum(
        parameter.numel() for module in model.modules() if gpu_part(model, module) for parameter in module.parameters(recurse=False)
    )
    assert heavy > 0.9 * sum(parameter.numel() for parameter in model.parameters())
    assert gpu_part(model, model.get_input_embeddings())
    assert tee_part(model, nn.LayerNorm(4))


@pytest.mark.parametrize(("layer", "transposed"), [(nn.Linear(3, 5), False), (nn.Linear(3, 5, bias=False), False), (Conv1D(5, 3), True)])
def test_a_linear_layer_of_either_kind_tells_its_features_and_which_way_round_its_weight_lies(layer: nn.Module, transposed: bool) -> None:
    assert is_linear(layer)
    assert features(layer) == (3, 5)
    weight, bias, found = weight_and_bias(layer)
    assert found is transposed
    assert weight.shape == ((3, 5) if transposed else (5, 3))
    x = torch.randn(2, 3)
    expected = x @ (weight if transposed else weight.T)
    torch.testing.assert_close(layer(x), expected if bias is None else expected + bias)


@pytest.mark.parametrize("module", [nn.Embedding(3, 4), nn.LayerNorm(4), nn.Conv1d(3, 4, 1), nn.Sequential(nn.Linear(2, 2))])
def test_what_is_no_linear_layer_is_not_taken_for_one(module: nn.Module) -> None:
    assert not is_linear(module)


def test_decoder_layers_are_found_in_order_with_their_names(model: PreTrainedModel) -> None:
    found = decoder_layers(model)
    assert len(found) == 3
    assert [model.get_submodule(name) for name, _ in found] == [layer for _, layer in found]
    assert [name.rpartition(".")[2] for name, _ in found] == ["0", "1", "2"]


def test_a_model_without_one_list_of_as_many_modules_as_it_says_has_no_decoder_layers(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    count = config.num_hidden_layers
    try:
        config.num_hidden_layers = 4
        assert decoder_layers(model) == []
    finally:
        config.num_hidden_layers = count


def test_a_layers_halves_are_told_by_what_they_take(model: PreTrainedModel) -> None:
    expected = LayerHalves("attn", "mlp") if model.config.model_type == "gpt2" else LayerHalves("self_attn", "mlp")
    assert {halves_of(layer) for _, layer in decoder_layers(model)} == {expected}


def test_a_layer_that_is_made_otherwise_has_no_halves() -> None:
    assert halves_of(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))) is None
