"""What stands in a split model for what is elsewhere: it can be looked at, and refuses in one line what it cannot do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import shmbroker
from benchmarks.families.tiny import served, whole_model
from shmbroker import BadInput
from tee_worker import Split, offload
from tests.tee_worker.conftest import logits


@pytest.fixture(params=[Split.FUSED, Split.LAYER], ids=lambda split: split.value)
def split_model(request: pytest.FixtureRequest, client: shmbroker.Client, folder_of: Callable[..., Path]) -> Iterator[PreTrainedModel]:
    folder = folder_of("llama")
    with served(folder, "llama"):
        model = whole_model(folder)
        offload(model, client.channel("llama"), request.param)
        yield model


def test_weights_that_are_elsewhere_can_be_looked_at_and_not_computed_with(split_model: PreTrainedModel) -> None:
    for module, shape in ((split_model.get_input_embeddings(), (97, 48)), (split_model.get_output_embeddings(), (97, 48))):
        weight = module.weight
        assert tuple(weight.shape) == shape
        assert weight.dtype is torch.float32
        assert weight.device == torch.device("cpu")
        assert weight.numel() == 97 * 48
        assert "on the GPU worker" in repr(weight)
        for use in (
            lambda w: w + 1,
            lambda w: torch.ones(2, 48) @ w.T,
            lambda w: w.to(torch.bfloat16),
            lambda w: w.clone(),
            copy.deepcopy,
            pickle.dumps,
        ):
            with pytest.raises(BadInput, match="is on the GPU worker"):
                use(weight)
    assert split_model.dtype is torch.float32
    assert split_model.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("use", "told"),
    [
        (lambda model, folder: model.save_pretrained(folder), "save_pretrained would write a checkpoint without the weights"),
        (lambda model, folder: model.resize_token_embeddings(128), "resize_token_embeddings would change an embedding"),
        (lambda model, folder: model.load_adapter(folder), "load_adapter would change modules"),
        (lambda model, folder: copy.deepcopy(model), "two models on one channel"),
        (lambda model, folder: pickle.dumps(model), "pickle the model before"),
        (lambda model, folder: model.to(torch.bfloat16), "stays as it was moved, in float32"),
        (lambda model, folder: model.half(), "stays as it was moved, in float32"),
        (lambda model, folder: torch.save(model.state_dict(), folder / "model.pt"), "state_dict would lack the weights"),
        (lambda model, folder: model.load_state_dict({}, strict=False), "load_state_dict would load what is left here alone"),
        (lambda model, folder: offload(model, None, Split.FUSED), "is split already: load another one"),  # type: ignore[arg-type]
    ],
    ids=[
        "save_pretrained",
        "resize_token_embeddings",
        "load_adapter",
        "deepcopy",
        "pickle",
        "to",
        "half",
        "state_dict",
        "load_state_dict",
        "offload",
    ],
)
def test_what_cannot_be_done_with_a_split_model_is_refused_in_one_line_and_changes_nothing(
    split_model: PreTrainedModel, tmp_path: Path, use: Callable[[PreTrainedModel, Path], Any], told: str
) -> None:
    expected = logits(split_model)
    with pytest.raises(BadInput, match=told) as caught:
        use(split_model, tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(logits(split_model), expected)


def test_what_changes_nothing_is_no_fault(split_model: PreTrainedModel) -> None:
    expected = logits(split_model)
    assert split_model.to("cpu") is split_model
    assert split_model.float() is split_model
    assert split_model.train(True).eval() is split_model
    assert torch.equal(logits(split_model), expected)


@pytest.mark.parametrize("split", [Split.BLOCK, Split.LAYER])
def test_dropout_that_would_be_left_out_is_refused(client: shmbroker.Client, folder_of: Callable[..., Path], split: Split) -> None:
    folder = folder_of("llama", attention_dropout=0.5)
    with served(folder, "dropout"):
        training = AutoModelForCausalLM.from_pretrained(folder).train()
        with pytest.raises(BadInput, match=r"has dropout, which would be left out .* call eval\(\)"):
            offload(training, client.channel("dropout"), split)
        model = whole_model(folder)
        offload(model, client.channel("dropout"), split)
        with pytest.raises(BadInput, match="has dropout"):
            model.train()
