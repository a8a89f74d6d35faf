"""A tiny model split over two real processes against the same model in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import shmbroker
from shmbroker.models.checkpoint import Checkpoint
from tee_worker import Split, offload
from tee_worker.planning.own_part import own_part
from tee_worker.planning.structure import structure_of
from tee_worker.planning.traffic import generation_traffic
from tests.tee_worker.conftest import gpu_worker
from tests.tiny_models import save_random, tiny_llama

PROMPT = torch.tensor([[5, 17, 3, 88, 41, 2, 60]])
NEW_TOKENS = 12


def generate(model: PreTrainedModel, ids: torch.Tensor = PROMPT, **options: object) -> torch.Tensor:
    with torch.inference_mode():
        mask = options.pop("attention_mask", torch.ones_like(ids))
        output: torch.Tensor = model.generate(  # type: ignore[operator]
            ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, **options
        )
    return output


def logits(model: PreTrainedModel, ids: torch.Tensor = PROMPT) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(ids).logits
    return result.clone()


@pytest.fixture
def client(broker: shmbroker.LocalBroker) -> shmbroker.Client:
    with shmbroker.connect(arena="32M") as client:
        yield client


@pytest.mark.parametrize("lane", ["shm", "zmq"])
@pytest.mark.parametrize("split", list(Split))
def test_a_split_model_generates_the_tokens_of_the_whole_one(
    client: shmbroker.Client, tiny: Path, tiny_worker: str, split: Split, lane: str
) -> None:
    whole = AutoModelForCausalLM.from_pretrained(tiny)
    parts = AutoModelForCausalLM.from_pretrained(tiny)
    channel = client.channel(tiny_worker, lane=lane)
    structure = offload(parts, channel, split, check=False).structure  # whose calls would be counted
    assert torch.equal(generate(parts), generate(whole))
    torch.testing.assert_close(logits(parts), logits(whole), atol=1e-5, rtol=1e-4)
    report = channel.report()
    expected = generation_traffic(structure, split, prompt_tokens=PROMPT.shape[1], new_tokens=NEW_TOKENS)
    passes = NEW_TOKENS + 1  # and one for the logits
    layers = 3
    assert report.total.calls == passes * (
        layers * {Split.LINEAR: 7, Split.FUSED: 4, Split.OP: 6, Split.BLOCK: 2, Split.LAYER: 1}[split] + 2
    )
    assert expected.calls == report.total.calls * NEW_TOKENS // passes
    assert (report.socket_bytes == 0) == (lane == "shm")


@pytest.mark.parametrize("split", list(Split))
def test_calls_and_bytes_equal_the_analytic_model_exactly(client: shmbroker.Client, tiny: Path, tiny_worker: str, split: Split) -> None:
    parts = AutoModelForCausalLM.from_pretrained(tiny)
    channel = client.channel(tiny_worker)
    structure = offload(parts, channel, split, check=False).structure  # whose calls would be counted
    generate(parts)
    report = channel.report()
    expected = generation_traffic(structure, split, prompt_tokens=PROMPT.shape[1], new_tokens=NEW_TOKENS)
    assert (report.total.calls, report.total.sent_bytes, report.total.received_bytes) == (
        expected.calls,
        expected.sent_bytes,
        expected.received_bytes,
    )
    assert {line.op: line.calls for line in report.ops} == expected.calls_by_op


def test_a_model_that_was_loaded_without_the_heavy_weights_gives_the_same(client: shmbroker.Client, tiny: Path, tiny_worker: str) -> None:
    parts = own_part(Checkpoint.at(tiny), torch.float32)
    assert {name.rpartition(".")[2] for name, _ in parts.named_parameters()} == {"weight"}
    assert all("norm" in name for name, _ in parts.named_parameters())
    offload(parts, client.channel(tiny_worker), "op")
    assert torch.equal(generate(parts), generate(AutoModelForCausalLM.from_pretrained(tiny)))


def test_a_batch_with_padding_and_sampling_caches_stay_hugging_faces(client: shmbroker.Client, tiny: Path, tiny_worker: str) -> None:
    ids = torch.tensor([[0, 0, 5, 17, 3], [9, 8, 7, 6, 5]])
    mask = (ids != 0).long()
    whole = AutoModelForCausalLM.from_pretrained(tiny)
    for split in (Split.LINEAR, Split.FUSED, Split.OP):  # at split layer the caches are the worker's: see test_layers.py
        parts = AutoModelForCausalLM.from_pretrained(tiny)
        offload(parts, client.channel(tiny_worker), split)
        assert torch.equal(generate(parts, ids, attention_mask=mask), generate(whole, ids, attention_mask=mask)), split
        assert torch.equal(generate(parts, num_beams=3), generate(whole, num_beams=3)), split


def test_tied_embeddings_are_one_weight_on_the_worker(broker: shmbroker.LocalBroker, client: shmbroker.Client, tmp_path: Path) -> None:
    folder = save_random(tiny_llama(tie_word_embeddings=True), tmp_path)
    with gpu_worker(folder, "tied"):
        parts = own_part(Checkpoint.at(folder), torch.float32)
        offload(parts, client.channel("tied"), "fused")
        assert torch.equal(generate(parts), generate(AutoModelForCausalLM.from_pretrained(folder)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_carried_as_it_is(
    broker: shmbroker.LocalBroker, client: shmbroker.Client, tiny: Path, dtype: torch.dtype
) -> None:
    name = str(dtype).removeprefix("torch.")
    with gpu_worker(tiny, name, "--dtype", name):
        whole = AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype)
        for split in Split:
            parts = AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype)
            channel = client.channel(name)
            offload(parts, channel, split)
            torch.testing.assert_close(logits(parts).float(), logits(whole).float(), atol=0.02, rtol=0.05)
            assert channel.report().total.calls


def test_a_worker_with_another_model_or_dtype_is_told_at_once(
    client: shmbroker.Client, tiny: Path, tiny_worker: str, tmp_path: Path
) -> None:
    channel = client.channel(tiny_worker)
    wider = AutoModelForCausalLM.from_config(tiny_llama(intermediate_size=81))
    with pytest.raises(shmbroker.RemoteOpError, match="is 48 x 80 here, 48 x 81 at the client: start both workers with the same --model"):
        offload(wider, channel, check=False)  # which would see first that the weights are others
    with pytest.raises(shmbroker.RemoteOpError, match="is float32 of width 48 here, bfloat16 of width 48 at the client"):
        offload(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16), channel)
    deeper = AutoModelForCausalLM.from_config(tiny_llama(num_hidden_layers=4))
    with pytest.raises(shmbroker.RemoteOpError, match=r"has no linear layer 'model\.layers\.3\.self_attn\.q_proj'"):
        offload(deeper, channel, "linear", check=False)
    with pytest.raises(shmbroker.BadInput, match="split 'half' is not known; there are: linear, fused, op"):
        offload(wider, channel, "half")


def test_the_structure_is_found_by_running_the_model_not_by_its_names() -> None:
    model = AutoModelForCausalLM.from_config(tiny_llama())
    before = model.config._attn_implementation
    structure = structure_of(model)
    assert model.config._attn_implementation == before
    assert structure.embedding == "model.embed_tokens"
    first = [projection.names for projection in structure.projections[:4]]
    layer = "model.layers.0"
    assert first == [
        tuple(f"{layer}.self_attn.{name}_proj" for name in "qkv"),
        (f"{layer}.self_attn.o_proj",),
        (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"),
        (f"{layer}.mlp.down_proj",),
    ]
    assert len(structure.projections) == 12
    attention = structure.attentions[2]
    assert (attention.name, attention.heads, attention.key_value_heads, attention.head_dim) == ("model.layers.2.self_attn", 6, 2, 16)
    assert structure.head.out_features == (97,)


def test_the_prototypes_prefill_is_98_calls_3328_mib_out_and_3656_5_mib_back() -> None:
    config = tiny_llama(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    )
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in list(model.named_parameters()):
        if "norm" in name:
            module = model.get_submodule(name.rpartition(".")[0])
            module.weight = torch.nn.Parameter(torch.ones(parameter.shape))
    traffic = generation_traffic(structure_of(model), Split.OP, prompt_tokens=1024, new_tokens=1)
    mib = 1 << 20
    assert traffic.calls == 98
    ids_and_last_hidden_state = 8192 + 8192
    assert traffic.sent_bytes - ids_and_last_hidden_state == 3328 * mib
    last_logits = 128256 * 4
    assert traffic.received_bytes - last_logits == 3656 * mib
    assert last_logits / mib == pytest.approx(0.49, abs=0.01), "the half MiB of 3656.5"


def test_an_offloaded_model_is_frozen_and_training_it_is_refused(client: shmbroker.Client, tiny: Path, tiny_worker: str) -> None:
    whole = AutoModelForCausalLM.from_pretrained(tiny)
    parts = AutoModelForCausalLM.from_pretrained(tiny)
    offload(parts, client.channel(tiny_worker), Split.FUSED)
    assert not any(one.requires_grad for one in parts.parameters())
    torch.testing.assert_close(parts(PROMPT).logits, whole(PROMPT).logits.detach(), atol=1e-5, rtol=1e-4)
    next(parts.get_decoder().layers[0].input_layernorm.parameters()).requires_grad_()
    with pytest.raises(shmbroker.BadInput, match=r"requires grad, .* torch\.no_grad\(\)"):
        parts(PROMPT)
    with torch.no_grad():
        torch.testing.assert_close(parts(PROMPT).logits, whole(PROMPT).logits, atol=1e-5, rtol=1e-4)
