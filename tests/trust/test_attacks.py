"""Attacks that break other masks, on the embedded model: they recover nearly everything there, and nothing from ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from shmbroker.models import embedded as embedded_model
from shmbroker.models.checkpoint import Checkpoint
from shmbroker.trust.check import make_secret
from shmbroker.trust.loops import seal
from shmbroker.trust.pads import fill_random
from shmbroker.trust.quantization import IntegerWeight, joined, quantize_weight
from tests.trust import attacks

TEXT = (
    "The prompt of a person is a secret: a name, an address, what hurts, and since when. Whoever computes for it should learn how long it is, and no more. "
    "Masks that look like noise are not noise when the same one comes twice, or when what lies below is one of fifty thousand known rows."
)
TOKENS = 52
ANSWERS = 66
LUCKY = 2
"""Tokens that a guess may hit: one of 49152, in some 60 rows."""


@dataclass(frozen=True)
class Known:
    """What everybody knows of the embedded model, and one secret prompt."""

    dictionary: torch.Tensor
    """What each token looks like to the first layer, ``[vocabulary, width]``."""
    head: torch.Tensor
    tokens: torch.Tensor
    inputs: torch.Tensor
    """Of the first layer, ``[tokens, width]``: the secret."""
    hidden: torch.Tensor
    """What the head reads, ``[answers, width]``."""
    first_weight: IntegerWeight
    head_weight: IntegerWeight


@pytest.fixture(scope="module")
def known() -> Known:
    checkpoint = Checkpoint.at(embedded_model.ensure())
    model, tokenizer = checkpoint.model(torch.float32), checkpoint.tokenizer()
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert ids.shape[1] >= TOKENS
    with torch.no_grad():
        decoder = model.get_decoder()  # type: ignore[no-untyped-call]
        dictionary = decoder.layers[0].input_layernorm(decoder.embed_tokens.weight)
        longer = model.generate(ids, max_new_tokens=max(1, ANSWERS - ids.shape[1]), do_sample=False)  # type: ignore[operator]
        hidden = decoder(longer).last_hidden_state[0, :ANSWERS]
        attention = decoder.layers[0].self_attn
        first = joined([quantize_weight(one.weight, 12) for one in (attention.q_proj, attention.k_proj, attention.v_proj)])
        head = model.get_output_embeddings().weight.detach()  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    tokens = ids[0, :TOKENS]
    return Known(dictionary.detach(), head, tokens, dictionary[tokens].detach(), hidden, first, quantize_weight(head, 12))


def ours(rows: torch.Tensor, weight: IntegerWeight, turns: int = 1) -> torch.Tensor:
    """What a worker sees of the same rows in so many calls at ``blind``, ``[turns, rows, width]`` int32, by the code that does it."""
    secret = make_secret(weight.integers[:8])  # of the check, which the worker sees nothing of
    seen = torch.empty((turns, *rows.shape), dtype=torch.int32)
    sums, scales = torch.empty(len(rows), 2, dtype=torch.int64), torch.empty(len(rows), dtype=torch.float64)
    for turn in seen:
        pads = torch.empty(rows.shape, dtype=torch.int32)
        fill_random(pads)
        assert seal(rows.contiguous(), weight.limit(), pads, turn, secret.inputs, sums, scales)
    return seen


def hits(found: torch.Tensor, expected: torch.Tensor) -> int:
    return int((found == expected).sum())


def test_a_sum_of_rank_one_hides_nothing(known: Known) -> None:
    a, b = torch.randn(TOKENS, 1), torch.randn(TOKENS, 1)
    masked = known.inputs + a @ (b.t() @ known.inputs)
    assert hits(attacks.from_rank_one(masked, known.dictionary), known.tokens) >= 0.9 * TOKENS
    assert hits(attacks.from_rank_one(ours(known.inputs, known.first_weight)[0].float(), known.dictionary), known.tokens) <= LUCKY


def test_stacking_a_mask_and_its_multiple_hides_nothing(known: Known) -> None:
    noise, factor = torch.randn_like(known.inputs) * 3, 1.7
    found = attacks.from_stacked(known.inputs + noise, factor * noise, known.inputs[0])
    assert float((found - known.inputs).abs().max()) < 1e-5
    assert hits(attacks.nearest(found, known.dictionary), known.tokens) == TOKENS
    first, second = ours(known.inputs, known.first_weight, 2).float()
    assert hits(attacks.nearest(attacks.from_stacked(first, second, known.inputs[0]), known.dictionary), known.tokens) <= LUCKY


def test_noise_of_size_one_averages_out(known: Known) -> None:
    answers = (known.hidden @ known.head.t()).argmax(dim=1)
    masked = known.hidden + torch.randn(64, *known.hidden.shape)
    assert hits(attacks.from_noise(masked, known.head), answers) >= 50
    assert hits(attacks.from_noise(ours(known.hidden, known.head_weight, 64), known.head), answers) <= LUCKY


def test_a_basis_of_eight_pads_is_found_in_nine_calls(known: Known) -> None:
    pads = torch.randn(8, known.inputs.shape[1]) * 1000
    rows = known.dictionary[torch.randint(0, len(known.dictionary), (9, TOKENS))]
    rows[-1] = known.inputs
    masked = rows + torch.randn(9, TOKENS, 8) @ pads
    assert hits(attacks.from_basis(masked, 8, known.dictionary), known.tokens) >= 0.9 * TOKENS
    assert hits(attacks.from_basis(ours(known.inputs, known.first_weight, 9).float(), 8, known.dictionary), known.tokens) <= LUCKY


@pytest.mark.parametrize("attack", ["the rows themselves", "the difference of two calls", "the mean of many"])
def test_simple_looks_at_what_a_worker_sees_give_nothing(known: Known, attack: str) -> None:
    seen = ours(known.inputs, known.first_weight, 32)
    look: dict[str, Callable[[], torch.Tensor]] = {
        "the rows themselves": lambda: seen[0],
        "the difference of two calls": lambda: seen[1] - seen[0],
        "the mean of many": lambda: seen.double().mean(dim=0),
    }
    assert hits(attacks.nearest(look[attack](), known.dictionary), known.tokens) <= LUCKY


def test_what_a_worker_sees_is_uniform_and_has_nothing_in_common_with_the_rows(known: Known) -> None:
    """Limits fixed before: chi square of bytes with 255 degrees of freedom below 375 (one in 10^6), correlation below 5 standard deviations."""
    seen = ours(known.inputs, known.first_weight, 8)
    for place in range(4):  # from the lowest byte of a word to the highest
        counts = torch.bincount(seen.contiguous().view(torch.uint8).view(-1, 4)[:, place].long(), minlength=256).double()
        expected = counts.sum() / 256
        assert float(((counts - expected) ** 2 / expected).sum()) < 375, f"byte {place}"
    both = torch.stack([seen.double().reshape(8, -1).mean(dim=0), known.inputs.double().reshape(-1)])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 5 / both.shape[1] ** 0.5
    again = torch.stack([seen[0].double().reshape(-1), seen[1].double().reshape(-1)])
    assert abs(float(torch.corrcoef(again)[0, 1])) < 5 / again.shape[1] ** 0.5
