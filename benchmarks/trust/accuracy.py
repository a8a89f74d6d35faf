"""How near the exact modes' numbers are to those of the float32 model, for each width of weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.split_model.processes import two_processes
from benchmarks.split_model.work import prompt
from benchmarks.table import Table
from benchmarks.trust.ways import APPROXIMATE, BLIND, PLAIN, VERIFY, split_model, ways
from shmbroker.models.checkpoint import Checkpoint
from shmbroker.trust.bits import BITS
from tee_worker.trust.modes import Trust, TrustOptions

QUESTIONS = (
    "The capital of France is", "Once upon a time there was a", "def fibonacci(n):\n", "The three laws of thermodynamics are",
    "Dear Sir or Madam, I am writing to", "Water boils at a temperature of", "In 1969, the first man", "To bake bread you need",
)  # fmt: skip


def accuracy(title: str, folder: Path, *, prompts: int, tokens: int, same: int) -> dict[str, Any]:
    """Print the table; the figures. So many tokens after each prompt are forced on every mode; ``same``: greedy ones that must not differ."""
    source = Checkpoint.at(folder)
    whole = source.model(torch.float32)
    given = _prompts(source, prompts)
    forced = [_greedy(whole, ids, tokens) for ids in given]
    chosen = [_chosen(whole, ids, answer) for ids, answer in zip(given, forced, strict=True)]
    rows: dict[str, tuple[int, float]] = {"one process, float32": _forced(whole, given, forced, chosen)}
    rows["one process, bfloat16"] = _forced(source.model(torch.bfloat16), given, forced, chosen)
    greedy: dict[str, torch.Tensor] = {}
    with two_processes(folder, 1, "256M") as client:
        for bits in BITS:
            with split_model(client, folder, TrustOptions(mode=Trust.VERIFY, bits=bits)) as (model, _):
                rows[f"exact, {bits} bits"] = _forced(model, given, forced, chosen)
        for name, options in ways(pads=32).items():
            with split_model(client, folder, options) as (model, _):
                greedy[name] = _greedy(model, given[0], same)
    total = prompts * tokens
    table = Table(f"{title}: {total} forced tokens", ["", "as float32", "perplexity"])
    for name, (right, perplexity) in rows.items():
        table.row(name, f"{right} of {total}", f"{perplexity:.4f}")
    table.show()
    equal = {
        f"{same} greedy tokens, {PLAIN} and {APPROXIMATE}": torch.equal(greedy[PLAIN], greedy[APPROXIMATE]),
        f"{same} greedy tokens, {VERIFY} and {BLIND}": torch.equal(greedy[VERIFY], greedy[BLIND]),
    }
    for what, is_equal in equal.items():
        print(f"{what}: {'equal' if is_equal else 'NOT EQUAL'}")
    print()
    return {
        "title": title,
        "tokens": total,
        "rows": {name: {"as_float32": right, "perplexity": p} for name, (right, p) in rows.items()},
        "equal": equal,
    }


def _prompts(source: Checkpoint, count: int) -> list[torch.Tensor]:
    if not (source.folder / "tokenizer.json").is_file():
        size = source.config().vocab_size
        return [prompt(8 + index) % size for index in range(count)]
    tokenizer = source.tokenizer()
    return [tokenizer(text, return_tensors="pt")["input_ids"] for text in QUESTIONS[:count]]


@torch.inference_mode()
def _greedy(model: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Prompt and answer."""
    output: torch.Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    return output


@torch.inference_mode()
def _chosen(model: Any, ids: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """The tokens that a model chooses, given all before."""
    logits: torch.Tensor = model(answer[:, :-1]).logits
    return logits[0, ids.shape[1] - 1 :].float().argmax(dim=1)


@torch.inference_mode()
def _forced(model: Any, given: Sequence[torch.Tensor], forced: Sequence[torch.Tensor], chosen: Sequence[torch.Tensor]) -> tuple[int, float]:
    """How often a model chooses what the float32 model has ``chosen``, and its perplexity over the forced tokens."""
    right, total, surprise = 0, 0, 0.0
    for ids, whole, wanted in zip(given, forced, chosen, strict=True):
        first = ids.shape[1]
        logits = model(whole[:, :-1]).logits[0, first - 1 :].float()
        expected = whole[0, first:]
        right += int((logits.argmax(dim=1) == wanted).sum())
        surprise += float(torch.nn.functional.cross_entropy(logits, expected, reduction="sum"))
        total += len(expected)
    return right, float(torch.tensor(surprise / total).exp())
