"""What Hugging Face's models are asked for, of a split one: the same as in one process, or refused; docs/families.md has the table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

import shmbroker
from benchmarks.families.behaviours import BEHAVIOURS
from benchmarks.families.compare import EQUAL, compare
from benchmarks.families.names import FAMILIES
from benchmarks.families.tiny import served, tiny_family, whole_model
from shmbroker import BadInput
from tee_worker import Split, offload
from tests.tee_worker.conftest import gpu_worker

NOT_ON_THE_WORKER = {"beam search", "beam sampling", "assisted generation", "prompt look-up", "attention weights", "a static cache"}
"""What is refused where keys and values are the worker's."""

SLOW = {"torch.compile"}
"""Tried on one family only."""


@pytest.fixture
def client(broker: shmbroker.LocalBroker) -> Iterator[shmbroker.Client]:
    with shmbroker.connect(arena="64M") as client:
        yield client


def check(client: shmbroker.Client, service: str, folder: Path, split: Split, names: set[str]) -> None:
    found = compare(client, service, folder, split, sorted(names))
    refused = names & NOT_ON_THE_WORKER if split.stateful else set()
    assert {name for name, told in found.items() if told.startswith("refused: ")} == refused
    assert {name: told for name, told in found.items() if told != EQUAL and name not in refused} == {}


@pytest.mark.parametrize("split", list(Split))
def test_a_split_llama_does_what_the_whole_one_does(client: shmbroker.Client, tiny: Path, tiny_worker: str, split: Split) -> None:
    check(client, tiny_worker, tiny, split, set(BEHAVIOURS))


@pytest.mark.parametrize(
    ("family", "split"),
    [
        ("gpt2", Split.OP),
        ("gpt2", Split.BLOCK),
        ("gemma3_text", Split.FUSED),
        ("gemma3_text", Split.LAYER),
        ("mixtral", Split.LINEAR),
        ("mixtral", Split.LAYER),
        ("phi3", Split.OP),
        ("olmo3", Split.BLOCK),
    ],
)
def test_other_families_do_too(broker: shmbroker.LocalBroker, client: shmbroker.Client, tmp_path: Path, family: str, split: Split) -> None:
    folder = tiny_family(tmp_path, family, **FAMILIES[family])
    with served(folder, family):
        check(client, family, folder, split, set(BEHAVIOURS) - SLOW)


@pytest.mark.parametrize("split", [Split.OP, Split.LAYER])
def test_a_pipeline_for_text_generation_runs_on_a_split_model(
    broker: shmbroker.LocalBroker, client: shmbroker.Client, talking: Path, split: Split
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(talking)
    model = whole_model(talking)

    def told() -> str:
        running = pipeline("text-generation", model=model, tokenizer=tokenizer)
        return str(running("Why is it", max_new_tokens=8, do_sample=False)[0]["generated_text"])

    expected = told()
    with gpu_worker(talking, "talking"):
        offload(model, client.channel("talking"), split)
        assert told() == expected


def test_mask_of_booleans_where_the_models_own_attention_would_add_it_is_refused(
    broker: shmbroker.LocalBroker, client: shmbroker.Client, tmp_path: Path
) -> None:
    folder = tiny_family(tmp_path, "gpt_oss")
    with served(folder, "eager"):
        name = "a mask of booleans, [1, 1, tokens, tokens]"
        assert "would add a mask of booleans as 0 and 1" in compare(client, "eager", folder, Split.OP, [name])[name]


def test_a_model_with_the_configuration_of_a_split_one_says_what_it_is(client: shmbroker.Client, tiny: Path, tiny_worker: str) -> None:
    model = whole_model(tiny)
    offload(model, client.channel(tiny_worker), Split.OP)
    other = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(BadInput, match="was not split: set_attn_implementation"):
        other(torch.tensor([[1, 2]]))


# --- adapters ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["q_proj", "down_proj"])
@pytest.mark.parametrize("split", [Split.LINEAR, Split.FUSED, Split.OP])
def test_an_adapter_of_peft_stays_here_and_counts(
    client: shmbroker.Client, tiny: Path, tiny_worker: str, split: Split, target: str
) -> None:
    from peft import get_peft_model_state_dict

    model = adapted(tiny, target)
    ids = torch.tensor([[5, 17, 3, 88]])
    with torch.no_grad():
        expected = model(ids).logits
        plain = whole_model(tiny)(ids).logits
    assert not torch.allclose(expected, plain, atol=1e-2)
    offload(model.get_base_model(), client.channel(tiny_worker), split)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits.clone(), expected, atol=1e-5, rtol=1e-4)
    kept = get_peft_model_state_dict(model)  # the adapter alone: it is all here
    assert kept
    assert all("lora_" in name for name in kept)


@pytest.mark.parametrize("split", [Split.BLOCK, Split.LAYER])
def test_an_adapter_of_peft_in_what_moves_whole_is_refused(client: shmbroker.Client, tiny: Path, tiny_worker: str, split: Split) -> None:
    with pytest.raises(BadInput, match="has an adapter, which would be left out on the GPU worker: use split 'op', 'fused' or 'linear'"):
        offload(adapted(tiny, "q_proj").get_base_model(), client.channel(tiny_worker), split)


def test_a_merged_adapter_is_seen_as_other_weights(client: shmbroker.Client, tiny: Path, tiny_worker: str) -> None:
    with pytest.raises(shmbroker.RemoteOpError, match=r"q_proj\.weight has other values here than at the client \(fine-tuned, merged"):
        offload(adapted(tiny, "q_proj").merge_and_unload(), client.channel(tiny_worker), Split.LINEAR)


def adapted(folder: Path, target: str):  # type: ignore[no-untyped-def]
    """The model with a LoRA adapter that changes its answers."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(whole_model(folder), LoraConfig(r=4, target_modules=[target], init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.7)
    return model.eval()
