"""A split model gives the numbers of the whole one, or refuses before the first token: what a layer is given, weights, masks, caches, stand-ins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import shmbroker
from benchmarks.families.tiny import served, whole_model
from gpu_worker.device import CpuDevice
from shmbroker import BadInput
from shmbroker.models.checkpoint import Checkpoint
from tee_worker import Split, offload
from tee_worker.planning.own_part import own_part
from tests.tee_worker.conftest import IDS, logits

SPLITS = list(Split)

SplitModel = Callable[[PreTrainedModel, Split], PreTrainedModel]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)


@torch.no_grad()
def generated(model: PreTrainedModel, tokens: int = 6, **options: Any) -> torch.Tensor:
    """The logits of a greedy generation, a row for each new token."""
    output = model.generate(  # type: ignore[operator]
        IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return torch.stack(output.logits)


# --- what a layer is given ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [Split.OP, Split.BLOCK, Split.LAYER])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("olmo3", {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
        ("gpt_neox", {"head_dim": 12}),
    ],
    ids=["hands use_cache=False to its attention", "calls its cache layer_past"],
)
def test_the_cache_is_found_by_what_it_is(
    client: shmbroker.Client, folder_of: Callable[..., Path], family: str, changes: dict[str, Any], split: Split
) -> None:
    folder = folder_of(family, **changes)
    with served(folder, "family"):
        model = whole_model(folder)
        expected = generated(model)
        offload(model, client.channel("family"), split)
        close(generated(model), expected)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("split", [Split.OP, Split.BLOCK, Split.LAYER])
def test_a_cache_that_is_given_is_used_whatever_use_cache_says(
    client: shmbroker.Client, folder_of: Callable[..., Path], split: Split, tokens: int
) -> None:
    folder = folder_of("llama")

    @torch.no_grad()
    def goes_on(model: PreTrainedModel) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        model(IDS[:, :6], past_key_values=cache)
        result: torch.Tensor = model(IDS[:, 6 : 6 + tokens], past_key_values=cache, use_cache=False).logits
        return result.clone()

    with served(folder, "llama"):
        model = whole_model(folder)
        expected = goes_on(model)
        offload(model, client.channel("llama"), split)
        close(goes_on(model), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("split", [Split.OP, Split.BLOCK, Split.LAYER])
def test_positions_that_are_counted_up_in_place_are_seen(
    client: shmbroker.Client, folder_of: Callable[..., Path], split: Split, mode: Callable[[], Any]
) -> None:
    folder = folder_of("llama")

    def told(model: PreTrainedModel) -> list[int]:
        cache = DynamicCache(config=model.config)
        with mode():
            token = model(input_ids=IDS, past_key_values=cache).logits[:, -1:].argmax(-1)
            positions, tokens = torch.tensor([[IDS.shape[1]]]), []
            for _ in range(6):
                token = model(input_ids=token, position_ids=positions, past_key_values=cache).logits[:, -1:].argmax(-1)
                tokens.append(int(token))
                positions += 1
        return tokens

    with served(folder, "llama"):
        model = whole_model(folder)
        expected = told(model)
        offload(model, client.channel("llama"), split)
        assert told(model) == expected


@pytest.mark.parametrize("split", [Split.BLOCK, Split.LAYER])
@pytest.mark.parametrize("option", ["output_attentions", "output_router_logits"])
def test_an_argument_of_a_layer_that_cannot_travel_is_refused_by_its_name(
    client: shmbroker.Client, folder_of: Callable[..., Path], split: Split, option: str
) -> None:
    folder = folder_of("llama")
    with served(folder, "llama"):
        model = whole_model(folder)
        offload(model, client.channel("llama"), split)
        told = "output_attentions: the weights of the attention in" if option == "output_attentions" else rf"is given {option} \(True\)"
        with pytest.raises(BadInput, match=f"{told}.* use split 'op', 'fused' or 'linear'"):
            logits(model, **{option: True})


@pytest.mark.parametrize("split", [Split.OP, Split.BLOCK, Split.LAYER])
def test_a_tokenizer_that_is_handed_down_is_none_of_a_layers_arguments(
    client: shmbroker.Client, folder_of: Callable[..., Path], split: Split
) -> None:
    folder = folder_of("llama")
    with served(folder, "llama"):
        model = whole_model(folder)
        expected = logits(model, tokenizer=object())
        offload(model, client.channel("llama"), split)
        close(logits(model, tokenizer=object()), expected)


@pytest.mark.parametrize(("family", "named"), [("bloom", "alibi"), ("mpt", "position_bias")], ids=["bloom", "mpt"])
def test_what_a_familys_layers_are_given_beyond_is_refused_before_anything_moves(
    client: shmbroker.Client, folder_of: Callable[..., Path], family: str, named: str
) -> None:
    folder = folder_of(family)
    model = whole_model(folder)
    with served(folder, family), pytest.raises(BadInput, match=f"is given {named} .a tensor"):
        offload(model, client.channel(family), Split.LAYER)
    assert logits(model).isfinite().all(), "nothing was changed"


@pytest.mark.parametrize("split", SPLITS)
def test_hidden_states_are_those_of_one_process(client: shmbroker.Client, folder_of: Callable[..., Path], split: Split) -> None:
    folder = folder_of("llama")
    with served(folder, "llama"), torch.no_grad():
        model = whole_model(folder)
        expected = model(IDS, output_hidden_states=True).hidden_states
        offload(model, client.channel("llama"), split)
        found = model(IDS, output_hidden_states=True).hidden_states
        assert len(found) == len(expected) == 4
        for ours, theirs in zip(found, expected, strict=True):
            close(ours, theirs)


# --- masks --------------------------------------------------------------------------------------------------------------------------------


def booleans() -> torch.Tensor:
    mask = torch.ones(11, 11).tril().bool()[None, None].clone()
    mask[..., 5:, :2] = False
    return mask


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    "mask",
    [booleans(), torch.zeros(1, 1, 11, 11).masked_fill(~booleans(), torch.finfo(torch.float32).min), torch.tensor([[0, 0, *[1] * 9]])],
    ids=["booleans", "numbers", "padding"],
)
def test_every_form_of_mask_gives_the_numbers_of_one_process(
    client: shmbroker.Client, folder_of: Callable[..., Path], split: Split, mask: torch.Tensor
) -> None:
    folder = folder_of("llama")
    with served(folder, "llama"):
        model = whole_model(folder)
        expected = logits(model, attention_mask=mask)
        offload(model, client.channel("llama"), split)
        seen = slice(2, None) if mask.ndim == 2 else slice(None)  # what padding itself becomes is nobody's concern
        close(logits(model, attention_mask=mask)[:, seen], expected[:, seen])


def test_weights_of_attention_are_given_at_split_op(client: shmbroker.Client, folder_of: Callable[..., Path]) -> None:
    folder = folder_of("llama")
    with served(folder, "llama"), torch.no_grad():
        expected = whole_model(folder, attn_implementation="eager")(IDS, output_attentions=True).attentions
        model = whole_model(folder)
        offload(model, client.channel("llama"), Split.OP)
        found = model(IDS, output_attentions=True).attentions
        assert len(found) == len(expected) == 3
        for ours, theirs in zip(found, expected, strict=True):
            close(ours, theirs)


# --- weights ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("where", ["model.layers.0.mlp.up_proj", "model.layers.2.self_attn.k_proj", "lm_head", "model.embed_tokens"])
def test_other_weights_than_the_workers_are_refused_by_the_modules_name(
    client: shmbroker.Client, folder_of: Callable[..., Path], split: Split, where: str
) -> None:
    folder = folder_of("llama")
    model = whole_model(folder)
    model.get_submodule(where).weight.data[3, 5] += 1.0
    named = where.split(".")[-1]
    with (
        served(folder, "llama"),
        pytest.raises(shmbroker.RemoteOpError, match=rf"{named}\.weight has other values here than at the client"),
    ):
        offload(model, client.channel("llama"), split)


def test_a_client_that_wants_no_check_binds_other_weights(client: shmbroker.Client, folder_of: Callable[..., Path]) -> None:
    folder = folder_of("llama")
    model = whole_model(folder)
    model.get_submodule("model.layers.0.mlp.up_proj").weight.data.mul_(1.5)
    with served(folder, "llama"):
        offload(model, client.channel("llama"), Split.FUSED, check=False)
        close(logits(model), logits(whole_model(folder)))


def quantized(folder: Path, target: Path) -> Path:
    """A checkpoint in BitNet's online mode: its linear layers quantize what they are given."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_a_linear_layer_that_computes_otherwise_stays_here(
    client: shmbroker.Client, folder_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    folder = quantized(folder_of("llama", hidden_size=64, intermediate_size=128), tmp_path / "bitnet")
    with served(folder, "bitnet"):
        model = whole_model(folder, dtype=torch.float32)
        with pytest.raises(BadInput, match="no plain linear layers that could be computed elsewhere: use split 'layer' or 'block'"):
            offload(model, client.channel("bitnet"), Split.FUSED)


@pytest.mark.parametrize("split", [Split.LINEAR, Split.FUSED, Split.OP])
def test_buffers_that_no_checkpoint_holds_are_filled_where_only_a_part_is_loaded(
    client: shmbroker.Client, folder_of: Callable[..., Path], split: Split
) -> None:
    folder = folder_of(
        "falcon_h1",
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_d_state=16,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_chunk_size=16,
    )
    with served(folder, "falcon"):
        parts = own_part(Checkpoint.at(folder), torch.float32, split)
        buffers = dict(whole_model(folder).named_buffers())
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in parts.named_buffers())
        offload(parts, client.channel("falcon"), split)
        close(generated(parts), generated(whole_model(folder)))


# --- running it once ----------------------------------------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_run_once_is_refused_with_the_module_that_fails(
    client: shmbroker.Client, folder_of: Callable[..., Path]
) -> None:
    folder = folder_of("llama")
    model = whole_model(folder)

    def fail(*args: object) -> None:
        raise KeyError("no such thing")

    model.model.layers[1].mlp.act_fn.forward = fail
    with served(folder, "llama"), pytest.raises(BadInput, match=r"cannot be run .*model\.layers\.1\.mlp.*KeyError: 'no such thing'"):
        offload(model, client.channel("llama"), Split.FUSED, check=False)


def test_the_self_check_names_the_first_layer_that_differs(
    client: shmbroker.Client, folder_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker whose product is another than its weights tell: not seen by any digest."""
    folder = folder_of("llama")

    def a_little_wrong(device: CpuDevice, x: torch.Tensor, layers: Any, outs: Any) -> None:
        for (weight, _), out in zip(layers, outs, strict=True):
            torch.mm(x, weight, out=out).mul_(1.05)

    monkeypatch.setattr(CpuDevice, "linear", a_little_wrong)
    model = whole_model(folder)
    with (
        served(folder, "llama"),
        pytest.raises(BadInput, match=r"self-check: model\.layers\.0 of the split LlamaForCausalLM gives other numbers"),
    ):
        offload(model, client.channel("llama"), Split.FUSED)
