"""Split models of several clients on one GPU worker that computes their calls together: each writes what it writes alone."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import shmbroker
from tee_worker import offload
from tests.tee_worker.conftest import gpu_worker

PROMPTS = [torch.tensor([[7, 11 + number, 23, 5, 40 + number]]) for number in range(4)]
TOKENS = 24


def text(model: PreTrainedModel, prompt: torch.Tensor) -> list[int]:
    found: list[int] = model.generate(prompt, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)[0].tolist()
    return found


@pytest.mark.parametrize(("split", "trust"), [("linear", "plain"), ("fused", "plain"), ("fused", "blind")])
def test_texts_at_once_are_those_alone(broker: shmbroker.LocalBroker, talking: Path, split: str, trust: str) -> None:
    """B3."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(gpu_worker(talking, "batches", "--batch", "--threads", "1"))
        models = []
        for number in range(len(PROMPTS)):
            client = stack.enter_context(shmbroker.connect(arena="32M", name=f"client {number}"))
            model = AutoModelForCausalLM.from_pretrained(talking, dtype=torch.float32).eval()
            offload(model, client.channel("batches"), split, trust=trust)
            models.append(model)
        alone = [text(model, prompt) for model, prompt in zip(models, PROMPTS, strict=True)]
        begin = threading.Barrier(len(PROMPTS))

        def again(model: PreTrainedModel, prompt: torch.Tensor) -> list[int]:
            begin.wait()
            return text(model, prompt)

        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            for _ in range(2):
                assert list(pool.map(again, models, PROMPTS)) == alone
