"""Exact products against Python's integers, their bounds, and the soundness of the check; the compiled loops bit for bit as those in Python."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shmbroker import BadInput
from shmbroker.trust import loops, python_loops
from shmbroker.trust.bits import BITS
from shmbroker.trust.check import VECTORS, Secret, make_secret
from shmbroker.trust.quantization import LARGEST, IntegerWeight, joined, quantize_weight

Int32 = st.integers(-(2**31), 2**31 - 1)
Floats = st.floats(-1e4, 1e4, width=32)


@pytest.fixture(params=loops.KINDS)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way in which the loops can run here."""
    with using(request.param):
        yield request.param


@contextlib.contextmanager
def using(kind: str) -> Iterator[None]:
    before = loops.kind()
    if kind not in loops.kinds():
        pytest.skip(f"no {kind} loops here: not built, or not of this processor")
    loops.choose(kind)
    try:
        yield
    finally:
        loops.choose(before)


def in_the_ring(value: int) -> int:
    """The remainder modulo 2^32 around zero."""
    return (value + 2**31) % 2**32 - 2**31


def sealed(
    x: torch.Tensor, weight: IntegerWeight, secret: Secret, pads: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers, sums and scales."""
    out = torch.empty(x.shape, dtype=torch.int32)
    sums, scales = torch.empty(len(x), VECTORS, dtype=torch.int64), torch.empty(len(x), dtype=torch.float64)
    assert loops.seal(x.float().contiguous(), weight.limit(), pads, out, secret.inputs, sums, scales)
    return out, sums, scales


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(x), len(weight), dtype=torch.int32)
    loops.product(x, weight, out)
    return out


def opened(
    shared: torch.Tensor,
    weight: IntegerWeight,
    secret: Secret,
    sums: torch.Tensor,
    scales: torch.Tensor,
    *,
    products: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[int, torch.Tensor]:
    """The first wrong row, and the numbers."""
    out = torch.empty(shared.shape, dtype=torch.float32)
    row = torch.empty(shared.shape[1], dtype=torch.int32)
    wrong = loops.open_rows(shared, row, products, secret.outputs, sums, scales, weight.scales, bias, out)
    return wrong, out


# --- exact products ---------------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("which", loops.KINDS)
def test_products_are_those_of_integers_modulo_2_to_the_32(which: str, data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from(BITS))
    rows, columns, outputs = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 40)), data.draw(st.integers(0, 9))
    limit = 2 ** (bits - 1) - 1
    x = [[data.draw(Int32) for _ in range(columns)] for _ in range(rows)]
    w = [[data.draw(st.integers(-limit, limit)) for _ in range(columns)] for _ in range(outputs)]
    with using(which):
        found = product(torch.tensor(x, dtype=torch.int32).view(rows, columns), torch.tensor(w, dtype=torch.int16).view(outputs, columns))
    assert found.tolist() == [[in_the_ring(sum(a * b for a, b in zip(row, other, strict=True))) for other in w] for row in x]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 15, 16, 17, python_loops.COLUMNS_AT_ONCE - 1, python_loops.COLUMNS_AT_ONCE + 1, 9000])
def test_long_rows_of_the_largest_values_are_exact(bits: int, columns: int, kind: str) -> None:
    x = torch.full((67, columns), -(2**31), dtype=torch.int32)  # more rows than are multiplied at once
    x[1] = 2**31 - 1
    largest = 2 ** (bits - 1) - 1
    w = torch.full((5, columns), largest, dtype=torch.int16)
    w[3] = -largest
    expected = [[in_the_ring(value * factor * columns) for factor in (largest, -largest)] for value in (-(2**31), 2**31 - 1)]
    found = product(x, w)
    assert found[:2, [0, 3]].tolist() == expected
    assert torch.equal(found[2:], found[:1].expand(65, 5))


def test_rows_of_the_output_may_be_apart(kind: str) -> None:
    x, w = torch.arange(48, dtype=torch.int32).view(3, 16), torch.arange(96, dtype=torch.int16).view(6, 16)
    if kind == "python":
        return  # of torch's own making there
    whole = torch.zeros(3, 20, dtype=torch.int32)
    loops.product(x, w, whole[:, 7:13])
    assert torch.equal(whole[:, 7:13], product(x, w))
    assert not whole[:, :7].any()
    assert not whole[:, 13:].any()


@settings(deadline=None)
@given(data=st.data())
def test_no_output_wraps_whatever_the_numbers(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from(BITS))
    columns, outputs = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    weight = quantize_weight(torch.tensor([[data.draw(Floats) for _ in range(columns)] for _ in range(outputs)]), bits)
    rows, _, _ = sealed(torch.tensor([[data.draw(Floats) for _ in range(columns)]]), weight, make_secret(weight.integers))
    for w in weight.integers.tolist():
        assert abs(sum(a * b for a, b in zip(rows[0].tolist(), w, strict=True))) <= LARGEST


@pytest.mark.parametrize("bits", BITS)
def test_an_output_is_within_the_stated_error(bits: int, kind: str) -> None:
    torch.manual_seed(bits)
    w, x = torch.randn(40, 300, dtype=torch.float64), torch.randn(20, 300)
    x[3] *= 1e5
    x[4, 7] = 1e4  # an outlier costs bits, and no more
    x[5] = 0
    weight = quantize_weight(w, bits)
    secret = make_secret(weight.integers)
    rows, sums, scales = sealed(x, weight, secret)
    outputs = product(rows, weight.integers)
    wrong, found = opened(outputs, weight, secret, sums, scales)
    assert wrong == -1
    columns, sw, wide = w.shape[1], weight.scales.double(), x.double()
    bound = columns**0.5 * (wide.norm(dim=1)[:, None] * sw + w.norm(dim=1) / scales[:, None]) / 2 + columns * sw / (4 * scales[:, None])
    exact = wide @ w.t()
    assert bool(((found - exact).abs() <= bound * (1 + 1e-6) + exact.abs() * 2**-22).all())
    _, with_bias = opened(outputs, weight, secret, sums, scales, bias=torch.ones(40))
    torch.testing.assert_close(with_bias, found + 1)


def test_what_cannot_be_made_an_integer_is_refused(kind: str) -> None:
    with pytest.raises(BadInput, match="weights of 9 bits are not known; there are: 8, 12, 14"):
        quantize_weight(torch.ones(2, 2), 9)
    with pytest.raises(BadInput, match="weight that is not finite"):
        quantize_weight(torch.tensor([[1.0, torch.inf]]), 12)
    weight = quantize_weight(torch.ones(3, 12), 12)
    secret = make_secret(weight.integers)
    for odd in (torch.inf, -torch.inf, torch.nan):
        x, out = torch.ones(2, 12), torch.full((2, 12), 7, dtype=torch.int32)
        x[1, 11] = odd
        sums, scales = torch.empty(2, 2, dtype=torch.int64), torch.empty(2, dtype=torch.float64)
        assert not loops.seal(x, weight.limit(), None, out, secret.inputs, sums, scales)
        assert (out == 7).all(), "nothing is written"


def test_weights_side_by_side_are_one() -> None:
    torch.manual_seed(1)
    parts = [quantize_weight(torch.randn(rows, 9), 12) for rows in (4, 7)]
    whole = joined(parts)
    assert torch.equal(whole.integers, torch.cat([one.integers for one in parts]))
    assert whole.limit() == min(one.limit() for one in parts)


@pytest.mark.parametrize("rows", [1, 4097, 9000])
def test_large_weights_in_parts_are_the_same(rows: int) -> None:
    torch.manual_seed(2)
    w = torch.randn(rows, 5)
    weight = quantize_weight(w, 14)
    assert torch.equal(weight.integers[-1:], quantize_weight(w[-1:], 14).integers)
    secret = make_secret(weight.integers)
    expected = weight.integers.to(torch.int64).t() @ secret.outputs.to(torch.int64).t()
    assert torch.equal(secret.inputs, expected.t())


# --- the loops --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 3, 4, 7, 8, 9, 31, 64, 577])
@pytest.mark.parametrize("masked", [False, True])
def test_all_kinds_of_loops_give_the_same_bits(columns: int, masked: bool) -> None:
    torch.manual_seed(columns)
    x = torch.randn(6, columns) * torch.tensor([1e-30, 1.0, 1e20, 3.7, 0.0, 1e4])[:, None]
    weight = quantize_weight(torch.randn(13, columns), 12)
    secret = make_secret(weight.integers)
    bias = torch.randn(13)
    random = torch.randint(-(2**31), 2**31, (6, columns), dtype=torch.int32)
    seen = []
    for which in loops.kinds():
        with using(which):
            pads = random.clone() if masked else None
            rows, sums, scales = sealed(x, weight, secret, pads)
            products = product(random, weight.integers) if masked else None
            wrong, out = opened(product(rows, weight.integers), weight, secret, sums, scales, products=products, bias=bias)
            assert wrong == -1
            if masked:
                assert pads is not None
                assert products is not None
                assert not pads.any(), "wiped as it was used"
                assert not products.any()
            seen.append((rows, sums, scales, out))
    for other in seen[1:]:
        assert all(torch.equal(one, two) for one, two in zip(seen[0], other, strict=True))
    plain_rows = sealed(x, weight, secret)[0]
    if masked:
        assert torch.equal(seen[0][0] - random, plain_rows)


@pytest.mark.parametrize("columns", [1, 3, 4, 5, 63, 64, 65, 577])
@pytest.mark.parametrize("biased", [False, True])
def test_residues_of_floating_point_products(columns: int, biased: bool, kind: str) -> None:
    """Of two products of one input: right ones pass, the first wrong row is told, and what was copied is what was given."""
    torch.manual_seed(columns)
    x, weights = torch.randn(5, 24), [torch.randn(columns, 24), torch.randn(7, 24)]
    biases = [torch.randn(len(weight)) if biased else None for weight in weights]
    vectors = [torch.randn(len(weight), 8) for weight in weights]
    inputs = sum(weight.double().t() @ one.double() for weight, one in zip(weights, vectors, strict=True))
    assert isinstance(inputs, torch.Tensor)
    results = [torch.nn.functional.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    factor = 40 * 2.0**-24 * sum(float(weight.square().sum()) for weight in weights) ** 0.5

    def check() -> int:
        products = [
            loops.FloatProduct(result, torch.zeros_like(result), one, bias)
            for result, one, bias in zip(results, vectors, biases, strict=True)
        ]
        tolerances = torch.empty(5, dtype=torch.float64)
        wrong = loops.residues(x, inputs, products, factor, tolerances)
        assert all(torch.equal(product.own.nan_to_num(), result.nan_to_num()) for product, result in zip(products, results, strict=True))
        torch.testing.assert_close(tolerances, factor * x.double().norm(dim=1))
        return wrong

    assert check() == -1
    results[1][3, 6] += 1e-2
    assert check() == 3
    results[0][2, columns - 1] = torch.nan
    assert check() == 2


KEY, NONCE = bytes(range(32)), bytes.fromhex("000000090000004a00000000")
RFC_8439_2_3_2 = (
    "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4ed2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
)


@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 65, 511, 512, 513, 5000])
def test_the_key_stream_is_that_of_the_standard(nbytes: int, kind: str) -> None:
    """RFC 8439, section 2.3.2."""
    out = torch.empty(nbytes, dtype=torch.uint8)
    loops.keystream(KEY, NONCE, 1, out)
    assert bytes(out.tolist())[:64] == bytes.fromhex(RFC_8439_2_3_2)[:nbytes]
    expected = torch.empty(nbytes, dtype=torch.uint8)
    python_loops.keystream(KEY, NONCE, 1, expected)
    assert torch.equal(out, expected)


# --- the check --------------------------------------------------------------------------------------------------------------------------

Right = tuple[IntegerWeight, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def right() -> Right:
    """A weight, rows of numbers, and the true products of their integers."""
    torch.manual_seed(0)
    weight = quantize_weight(torch.randn(48, 64), 12)
    x = torch.randn(9, 64)
    return weight, x, product(sealed(x, weight, make_secret(weight.integers))[0], weight.integers)


def first_wrong(right: Right, outputs: torch.Tensor, secret: Secret | None = None) -> int:
    weight, x, _ = right
    secret = secret or make_secret(weight.integers)
    _, sums, scales = sealed(x, weight, secret)
    return opened(outputs, weight, secret, sums, scales)[0]


def changed(outputs: torch.Tensor, row: int, **deviations: int) -> torch.Tensor:
    other = outputs.clone()
    for column, deviation in deviations.items():
        place = int(column.removeprefix("c"))
        other[row, place] = in_the_ring(int(other[row, place]) + deviation)
    return other


def test_right_products_pass(right: Right, kind: str) -> None:
    for _ in range(20):
        assert first_wrong(right, right[2]) == -1


@pytest.mark.parametrize(
    "deviation", [{"c0": 1}, {"c0": -1}, {"c47": 2**31}, {"c3": 2**31, "c4": 2**31}, {"c3": 1, "c4": -1}, {"c9": 2**16}]
)
def test_a_deviation_is_seen_and_its_row_named(right: Right, deviation: dict[str, int], kind: str) -> None:
    for _ in range(20):
        assert first_wrong(right, changed(right[2], 5, **deviation)) == 5


def test_swapped_rows_and_another_layers_result_are_seen(right: Right, kind: str) -> None:
    weight, _, outputs = right
    assert first_wrong(right, outputs[[0, 1, 3, 2, *range(4, 9)]]) == 2
    assert first_wrong(right, outputs.roll(1, 0)) == 0, "a stale result"
    assert first_wrong(right, outputs.flip(1)) == 0
    assert first_wrong(right, product(torch.ones(9, 64, dtype=torch.int32), weight.integers)) == 0


def test_a_secret_of_few_bits_lets_through_what_the_law_says(right: Right) -> None:
    """A deviation in one place passes when both vectors are zero there: of 2 bits each, one time in 16."""
    wrong = changed(right[2], 2, c7=12345)
    passed = sum(first_wrong(right, wrong, make_secret(right[0].integers, bits=2)) == -1 for _ in range(2000))
    assert 80 <= passed <= 180


def test_with_8_bits_one_in_65536_passes(right: Right) -> None:
    """A deviation in a place passes where the secret is zero in both vectors: in 2 million places of 8 bits some 30 times, and there it does."""
    places = 2_000_000
    weight = IntegerWeight(torch.ones((places, 1), dtype=torch.int16), torch.ones(places), 12)
    secret = make_secret(weight.integers, bits=8)
    blind_spots = (secret.outputs == 0).all(dim=0).nonzero().flatten().tolist()
    assert 10 <= len(blind_spots) <= 60, "2,000,000 / 65,536 = 30.5"
    rows, sums, scales = sealed(torch.ones(1, 1), weight, secret)
    for place in [*blind_spots[:3], (blind_spots[0] + 1) % places]:
        outputs = rows.expand(1, places).contiguous()
        outputs[0, place] += 12345
        passes = opened(outputs, weight, secret, sums, scales)[0] == -1
        assert passes == (place in blind_spots)


def test_a_secret_is_uniform_and_its_own_and_not_shown(right: Right) -> None:
    weight = right[0]
    secrets = [make_secret(weight.integers) for _ in range(3)]
    assert all(not torch.equal(one.outputs, other.outputs) for one, other in itertools.combinations(secrets, 2))
    assert secrets[0].outputs.shape == (VECTORS, 48)
    assert int(secrets[0].outputs.min()) < -(2**28) < 2**28 < int(secrets[0].outputs.max())
    assert str(int(secrets[0].outputs[0, 0])) not in repr(secrets[0])


def test_no_false_alarm_in_a_hundred_thousand_rows(kind: str) -> None:
    """``python -m benchmarks trust --alarms`` does a million."""
    torch.manual_seed(3)
    weight = quantize_weight(torch.randn(7, 24), 12)
    secret = make_secret(weight.integers)
    x = torch.randn(100_000, 24) * torch.rand(100_000, 1) * 100
    rows, sums, scales = sealed(x, weight, secret)
    assert opened(product(rows, weight.integers), weight, secret, sums, scales)[0] == -1
