"""The shape rules of the ops by which a transformer is split: what fits is answered with its shape, what does not is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shmbroker import BadInput, TensorSpec
from shmbroker.models import ops

F32, I64 = torch.float32, torch.int64

sizes = st.integers(1, 6)
leading = st.lists(sizes, max_size=4).map(tuple)


@given(leading, sizes)
def test_embedding_adds_a_width_in_the_dtype_of_the_weights(shape: tuple[int, ...], width: int) -> None:
    found = ops.embed(TensorSpec(shape, I64), module="embedding", width=width, dtype="bfloat16")
    assert found == TensorSpec((*shape, width), torch.bfloat16)


@given(leading, sizes, sizes)
def test_a_linear_layer_changes_the_last_dimension_as_torch_does(shape: tuple[int, ...], inputs: int, outputs: int) -> None:
    x = torch.empty(*shape, inputs)
    found = ops.linear(TensorSpec(x.shape, F32), module="layer", in_features=inputs, out_features=outputs)
    assert found.shape == torch.nn.Linear(inputs, outputs)(x).shape


@given(leading, st.lists(sizes, min_size=1, max_size=3))
def test_layers_that_take_one_input_have_an_output_each(shape: tuple[int, ...], outputs: list[int]) -> None:
    x = TensorSpec((*shape, 4), F32)
    found = ops.batch_linear(x, modules=["q", "k", "v"][: len(outputs)], in_features=4, out_features=outputs)
    assert found == tuple(TensorSpec((*shape, width), F32) for width in outputs)


@pytest.mark.parametrize("shape", [(), (3,), (4, 3), (4, 5)])
def test_another_width_is_refused_by_the_name_of_the_layer(shape: tuple[int, ...]) -> None:
    x = TensorSpec(shape, F32)
    with pytest.raises(BadInput, match=r"model.fc takes \[..., 4\], not float32"):
        ops.linear(x, module="model.fc", in_features=4, out_features=2)
    with pytest.raises(BadInput, match=r"q, k takes \[..., 4\], not float32"):
        ops.batch_linear(x, modules=["q", "k"], in_features=4, out_features=[2, 2])


@given(leading, sizes, sizes, sizes)
def test_matrices_are_multiplied_as_torch_does(shape: tuple[int, ...], m: int, k: int, n: int) -> None:
    a, b = torch.empty(*shape, m, k), torch.empty(*shape, k, n)
    assert ops.matmul(TensorSpec(a.shape, F32), TensorSpec(b.shape, F32)) == TensorSpec((a @ b).shape, F32)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (TensorSpec((3,), F32), TensorSpec((3, 4), F32)),
        (TensorSpec((2, 3), F32), TensorSpec((4, 3), F32)),
        (TensorSpec((2, 2, 3), F32), TensorSpec((3, 4), F32)),
        (TensorSpec((2, 2, 3), F32), TensorSpec((1, 3, 4), F32)),
        (TensorSpec((2, 3), F32), TensorSpec((3, 4), torch.float16)),
        (TensorSpec((), F32), TensorSpec((), F32)),
    ],
)
def test_matrices_that_do_not_fit_are_refused(a: TensorSpec, b: TensorSpec) -> None:
    with pytest.raises(BadInput, match="matmul takes"):
        ops.matmul(a, b)


HIDDEN, SESSION = TensorSpec((2, 5, 8), F32), TensorSpec((ops.SESSION_WORDS,), I64)
POSITIONS, MASK = TensorSpec((1, 5), I64), TensorSpec((2, 1, 5, 9), F32)


@pytest.mark.parametrize("op", [ops.full_layer, ops.attention_block])
def test_a_layer_returns_what_it_is_given_with_one_mask_or_none(op: object) -> None:
    for mask in ((), (MASK,)):
        assert op(HIDDEN, POSITIONS, SESSION, *mask, layer=3) == HIDDEN  # type: ignore[operator]
    assert ops.mlp_block(HIDDEN, layer=3) == HIDDEN


@pytest.mark.parametrize(
    "inputs",
    [
        (TensorSpec((5, 8), F32), POSITIONS, SESSION),
        (HIDDEN, TensorSpec((1, 4), I64), SESSION),
        (HIDDEN, TensorSpec((), I64), SESSION),
        (HIDDEN, POSITIONS, TensorSpec((3,), I64)),
        (HIDDEN, POSITIONS, SESSION, MASK, MASK),
    ],
    ids=["hidden states", "positions", "no positions", "session", "two masks"],
)
def test_a_layer_that_is_given_something_else_says_what_it_takes(inputs: tuple[TensorSpec, ...]) -> None:
    with pytest.raises(BadInput, match=r"full_layer and attention_block take \[batch, tokens, width\]"):
        ops.full_layer(*inputs, layer=0)
