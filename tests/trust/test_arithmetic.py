"""Exact products against Python's integers, their bounds, and the soundness of the check."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shmbroker import BadInput
from shmbroker.trust.check import VECTORS, make_secret, wrong_rows
from shmbroker.trust.product import columns_at_once, product
from shmbroker.trust.quantization import BITS, LARGEST, dequantize, quantize_rows, quantize_weight

Int32 = st.integers(-(2**31), 2**31 - 1)


def in_the_ring(value: int) -> int:
    """The remainder modulo 2^32 around zero."""
    return (value + 2**31) % 2**32 - 2**31


@given(st.data())
def test_products_are_those_of_integers_modulo_2_to_the_32(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from(BITS))
    rows, columns, outputs = (data.draw(st.integers(0, 5)) for _ in range(3))
    limit = 2 ** (bits - 1) - 1
    x = [[data.draw(Int32) for _ in range(columns)] for _ in range(rows)]
    w = [[data.draw(st.integers(-limit, limit)) for _ in range(columns)] for _ in range(outputs)]
    found = product(
        torch.tensor(x, dtype=torch.int32).view(rows, columns), torch.tensor(w, dtype=torch.float64).view(outputs, columns).t(), bits
    )
    assert found.dtype is torch.int32
    assert found.tolist() == [[in_the_ring(sum(a * b for a, b in zip(row, other, strict=True))) for other in w] for row in x]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("more", [-1, 0, 1, 700])
def test_long_rows_of_the_largest_values_are_exact(bits: int, more: int) -> None:
    columns = columns_at_once(bits) + more
    x = torch.full((2, columns), -(2**31), dtype=torch.int32)
    x[1] = 2**31 - 1
    w = torch.full((columns, 1), float(2 ** (bits - 1) - 1), dtype=torch.float64)
    expected = [[in_the_ring(value * (2 ** (bits - 1) - 1) * columns)] for value in (-(2**31), 2**31 - 1)]
    assert product(x, w, bits).tolist() == expected


Floats = st.floats(-1e4, 1e4, width=32)


@settings(deadline=None)
@given(st.data())
def test_no_output_wraps_whatever_the_numbers(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from(BITS))
    columns, outputs = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    weight = quantize_weight(torch.tensor([[data.draw(Floats) for _ in range(columns)] for _ in range(outputs)]), bits)
    rows, _ = quantize_rows(torch.tensor([[data.draw(Floats) for _ in range(columns)]]), weight.row_norm)
    for w in weight.integers.tolist():
        assert abs(sum(a * b for a, b in zip(rows[0].tolist(), w, strict=True))) <= LARGEST


@pytest.mark.parametrize("bits", BITS)
def test_an_output_is_within_the_stated_error(bits: int) -> None:
    torch.manual_seed(bits)
    w, x = torch.randn(40, 300, dtype=torch.float64), torch.randn(20, 300, dtype=torch.float64)
    x[3] *= 1e5
    x[4, 7] = 1e4  # an outlier costs bits, and no more
    x[5] = 0
    weight = quantize_weight(w, bits)
    rows, scales = quantize_rows(x, weight.row_norm)
    outputs = product(rows, weight.integers.to(torch.float64).t(), bits)
    found = dequantize(outputs, scales, weight, None, torch.float64)
    columns, sw = w.shape[1], weight.scales
    bound = columns**0.5 * (x.norm(dim=1)[:, None] * sw + w.norm(dim=1) / scales[:, None]) / 2 + columns * sw / (4 * scales[:, None])
    assert bool(((found - x @ w.t()).abs() <= bound * (1 + 1e-9)).all())
    with_bias = dequantize(outputs, scales, weight, torch.ones(40), torch.float32)
    torch.testing.assert_close(with_bias, (found + 1).to(torch.float32))


def test_what_cannot_be_made_an_integer_is_refused() -> None:
    with pytest.raises(BadInput, match="weights of 9 bits are not known; there are: 8, 12, 14"):
        quantize_weight(torch.ones(2, 2), 9)
    with pytest.raises(BadInput, match="weight that is not finite"):
        quantize_weight(torch.tensor([[1.0, torch.inf]]), 12)
    for odd in (torch.inf, torch.nan):
        with pytest.raises(BadInput, match="activations that are not finite"):
            quantize_rows(torch.tensor([[1.0, odd]]), 100.0)


# --- the check --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def right() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, integer weight ``[out, in]`` and their true products."""
    torch.manual_seed(0)
    weight = quantize_weight(torch.randn(48, 64), 12)
    rows, _ = quantize_rows(torch.randn(9, 64), weight.row_norm)
    return rows, weight.integers, product(rows, weight.integers.to(torch.float64).t(), 12)


def changed(outputs: torch.Tensor, row: int, **deviations: int) -> torch.Tensor:
    other = outputs.clone()
    for column, deviation in deviations.items():
        place = int(column.removeprefix("c"))
        other[row, place] = in_the_ring(int(other[row, place]) + deviation)
    return other


def test_right_products_pass(right: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    rows, weight, outputs = right
    for _ in range(20):
        assert not wrong_rows(rows, outputs, make_secret(weight)).any()


@pytest.mark.parametrize(
    "deviation", [{"c0": 1}, {"c0": -1}, {"c47": 2**31}, {"c3": 2**31, "c4": 2**31}, {"c3": 1, "c4": -1}, {"c9": 2**16}]
)
def test_a_deviation_is_seen_and_its_row_named(right: tuple[torch.Tensor, torch.Tensor, torch.Tensor], deviation: dict[str, int]) -> None:
    rows, weight, outputs = right
    found = wrong_rows(rows, changed(outputs, 5, **deviation), make_secret(weight))
    assert found.nonzero().flatten().tolist() == [5]


def test_swapped_rows_and_another_layers_result_are_seen(right: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    rows, weight, outputs = right
    secret = make_secret(weight)
    swapped = outputs[[1, 0, *range(2, 9)]]
    assert wrong_rows(rows, swapped, secret).nonzero().flatten().tolist() == [0, 1]
    other = product(rows, weight.flip(0).to(torch.float64).t(), 12)
    assert wrong_rows(rows, other, secret).all()
    assert wrong_rows(rows, outputs.roll(1, 0), secret).all(), "a stale result"


def test_a_secret_of_few_bits_lets_through_what_the_law_says(right: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """A deviation in one place passes when both vectors are zero there: of 2 bits each, one time in 16."""
    rows, weight, outputs = right
    wrong = changed(outputs, 2, c7=12345)
    passed = sum(not wrong_rows(rows, wrong, make_secret(weight, bits=2))[2] for _ in range(2000))
    assert 80 <= passed <= 180


def test_a_secret_is_uniform_and_its_own_and_not_shown(right: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    _, weight, _ = right
    secrets = [make_secret(weight) for _ in range(3)]
    assert all(not torch.equal(one.outputs, other.outputs) for one, other in itertools.combinations(secrets, 2))
    assert secrets[0].outputs.shape == (48, VECTORS)
    assert int(secrets[0].outputs.min()) < -(2**28) < 2**28 < int(secrets[0].outputs.max())
    assert str(int(secrets[0].outputs[0, 0])) not in repr(secrets[0])
