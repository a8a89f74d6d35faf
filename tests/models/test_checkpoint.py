"""Checkpoints: where one lies, what of it is loaded, and how one that does not fit together is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import shmbroker
from shmbroker.models.checkpoint import Checkpoint, Keep, model_dtype
from shmbroker.models.parts import gpu_part, tee_part
from tests.tiny_models import save_random, tiny_llama

KEEPS: dict[str, Keep | None] = {"all of it": None, "the GPU worker's part": gpu_part, "the TEE worker's part": tee_part}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tiny_llama(attention_bias=True), tmp_path_factory.mktemp("tiny"))


def parameters(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Those that it has, by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


# --- where it lies ----------------------------------------------------------------------------------------------------------------------


def test_a_folder_with_config_and_weights_is_a_checkpoint(tiny: Path) -> None:
    checkpoint = Checkpoint.at(str(tiny))
    assert (checkpoint.folder, checkpoint.gguf_file, checkpoint.name) == (tiny, None, str(tiny))
    assert checkpoint.config().vocab_size == 97


def test_a_gguf_file_is_one_and_so_is_a_folder_with_one_alone(tmp_path: Path) -> None:
    file = tmp_path / "one.gguf"
    file.write_bytes(b"GGUF")
    for place in (file, tmp_path):
        checkpoint = Checkpoint.at(place)
        assert (checkpoint.folder, checkpoint.gguf_file, checkpoint.name) == (tmp_path, "one.gguf", str(file))


def _two_files(folder: Path) -> None:
    for name in ("two.gguf", "one.gguf"):
        (folder / name).write_bytes(b"GGUF")


PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda folder: folder.rmdir(), "neither a folder nor a .gguf file"),
    "an empty folder": (lambda folder: None, "has no config.json$"),
    "no weights": (
        lambda folder: (folder / "config.json").write_text("{}"),
        r"has a config.json but no \*.safetensors: the weights are missing",
    ),
    "several GGUF files": (_two_files, "has no config.json and several GGUF files: name one of one.gguf, two.gguf"),
}


@pytest.mark.parametrize("what", PLACES)
def test_a_place_without_a_checkpoint_says_what_is_missing(tmp_path: Path, what: str) -> None:
    make, told = PLACES[what]
    place = tmp_path / "model"
    place.mkdir()
    make(place)
    with pytest.raises(shmbroker.BadInput, match=told):
        Checkpoint.at(place)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(shmbroker.BadInput, match=r"neither a folder nor a \.gguf file"):
        Checkpoint.at(tmp_path / "model.bin")


# --- what is loaded ---------------------------------------------------------------------------------------------------------------------


def test_what_each_side_loads_is_its_own_part_and_both_together_are_the_model(tiny: Path) -> None:
    checkpoint = Checkpoint.at(tiny)
    whole, gpu, tee = (parameters(checkpoint.model(torch.float32, keep)) for keep in KEEPS.values())
    assert set(gpu) | set(tee) == set(whole)
    assert not set(gpu) & set(tee)
    for part in (gpu, tee):
        assert all(torch.equal(parameter, whole[name]) for name, parameter in part.items())
    assert "model.embed_tokens.weight" in gpu
    assert all("norm" in name for name in tee)


@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS.keys())
def test_buffers_that_no_checkpoint_holds_are_there_whatever_is_loaded(tiny: Path, keep: Keep | None) -> None:
    checkpoint = Checkpoint.at(tiny)
    expected = dict(checkpoint.model(torch.float32).named_buffers())
    found = dict(checkpoint.model(torch.float32, keep).named_buffers())
    assert expected
    assert set(found) == set(expected)
    assert all(torch.equal(buffer, expected[name]) for name, buffer in found.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_come_in_the_dtype_that_is_asked_for(tiny: Path, dtype: torch.dtype) -> None:
    assert {parameter.dtype for parameter in parameters(Checkpoint.at(tiny).model(dtype)).values()} == {dtype}


def test_a_tied_embedding_is_one_weight_where_it_is_loaded_and_none_where_it_is_not(tmp_path: Path) -> None:
    checkpoint = Checkpoint.at(save_random(tiny_llama(tie_word_embeddings=True), tmp_path))
    gpu, tee = checkpoint.model(torch.float32, gpu_part), checkpoint.model(torch.float32, tee_part)
    assert gpu.get_input_embeddings().weight is gpu.get_output_embeddings().weight
    assert tee.get_input_embeddings().weight is tee.get_output_embeddings().weight is None


def test_a_models_dtype_is_told_by_its_name() -> None:
    assert [model_dtype(name) for name in ("float32", "bfloat16", "float16")] == [torch.float32, torch.bfloat16, torch.float16]
    with pytest.raises(shmbroker.BadInput, match="a model cannot be in int8; there are: float32, bfloat16, float16"):
        model_dtype("int8")
    with pytest.raises(shmbroker.BadInput):
        model_dtype("no such dtype")


# --- what does not fit together ---------------------------------------------------------------------------------------------------------


def broken(folder: Path, tmp_path: Path, **changes: object) -> Path:
    """A copy of a checkpoint with another configuration."""
    shutil.copytree(folder, tmp_path / "broken")
    config = json.loads((tmp_path / "broken" / "config.json").read_text())
    (tmp_path / "broken" / "config.json").write_text(json.dumps({**config, **changes}))
    return tmp_path / "broken"


@pytest.mark.parametrize("keep", [None, gpu_part], ids=["all of it", "the GPU worker's part"])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 4},
        {"intermediate_size": 96},
        {"model_type": "gpt2"},
        {"model_type": "bert"},
        {"model_type": "none such"},
        {"hidden_size": "x"},
    ],
    ids=["deeper", "wider", "gpt2", "bert", "unknown", "no number"],
)
def test_weights_that_do_not_fit_their_config_are_refused_in_one_line_and_never_made_up(
    tiny: Path, tmp_path: Path, changes: dict[str, object], keep: Keep | None
) -> None:
    with pytest.raises(shmbroker.BadInput) as caught:
        Checkpoint.at(broken(tiny, tmp_path, **changes)).model(torch.float32, keep)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_truncated_weights_file_is_refused_in_one_line(tiny: Path, tmp_path: Path, size: int) -> None:
    folder = broken(tiny, tmp_path)
    os.truncate(folder / "model.safetensors", size)
    with pytest.raises(shmbroker.BadInput, match="cannot be read") as caught:
        Checkpoint.at(folder).model(torch.float32, gpu_part)
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_that_generates_no_text_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(shmbroker.BadInput, match="ViTConfig is not the configuration of a causal language model"):
        Checkpoint.at(broken(tiny, tmp_path, model_type="vit")).model(torch.float32)


def test_a_folder_without_a_tokenizer_says_so_in_one_line(tiny: Path) -> None:
    with pytest.raises(shmbroker.BadInput, match="cannot be read") as caught:
        Checkpoint.at(tiny).tokenizer()
    assert len(str(caught.value).splitlines()) == 1
