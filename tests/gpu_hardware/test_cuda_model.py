"""A model on ``cuda:0``: the tokens of Hugging Face on the same GPU, at every split."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import shmbroker
from shmbroker.models.checkpoint import Checkpoint
from tee_worker import Split, offload
from tee_worker.planning.own_part import own_part
from tests.tee_worker.conftest import gpu_worker
from tests.tee_worker.test_offload import PROMPT, generate

LOGITS_TOLERANCE = 0.05
"""Of the largest logit, in bfloat16: products of other shapes are summed in another order."""


@pytest.mark.parametrize("split", list(Split), ids=lambda split: split.value)
def test_tokens_in_float32_are_those_of_one_process(client: shmbroker.Client, embedded: Path, split: Split) -> None:
    whole = AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32).to("cuda:0")
    with gpu_worker(embedded, "cuda-model", "--device", "cuda:0", "--dtype", "float32"):
        parts = own_part(Checkpoint.at(embedded), torch.float32, split)
        offload(parts, client.channel("cuda-model"), split)
        assert torch.equal(generate(parts, PROMPT), generate(whole, PROMPT.cuda()).cpu())


@pytest.mark.parametrize("split", [Split.FUSED, Split.LAYER], ids=lambda split: split.value)
def test_logits_in_bfloat16_are_near(client: shmbroker.Client, embedded: Path, split: Split) -> None:
    whole = AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.bfloat16).to("cuda:0")
    with gpu_worker(embedded, "cuda-model", "--device", "cuda:0", "--dtype", "bfloat16"), torch.inference_mode():
        parts = own_part(Checkpoint.at(embedded), torch.bfloat16, split)
        offload(parts, client.channel("cuda-model"), split)
        ours, theirs = parts(PROMPT).logits[0, -1].float(), whole(PROMPT.cuda()).logits[0, -1].float().cpu()
    assert (ours - theirs).abs().max() <= LOGITS_TOLERANCE * theirs.abs().max()
