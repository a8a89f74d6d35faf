"""Calls computed together: each is given its own rows, and what pays is learnt from what was measured."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shmbroker.arena.spec import TensorSpec
from shmbroker.worker.gathering import MOST_ROW_BYTES, MOST_ROWS, TRY_AGAIN, Costs, Gatherer, form_of
from shmbroker.worker.ops import OpDefinition
from shmbroker.worker.prepared_call import PreparedCall


def scaled(x: torch.Tensor, y: torch.Tensor, *, out: Sequence[torch.Tensor]) -> None:
    """Two inputs of unlike width, one without any, and two outputs."""
    torch.mul(x, y.unsqueeze(-1), out=out[0])
    torch.add(x[..., :2], 1, out=out[1])


def spec(x: TensorSpec, y: TensorSpec) -> tuple[TensorSpec, TensorSpec]:
    return x, TensorSpec((*x.shape[:-1], 2), x.dtype)


SCALED = OpDefinition("scaled", scaled, spec, row_wise=True)


def call(rows: tuple[int, ...], definition: OpDefinition = SCALED, width: int = 3, repeatable: bool = True) -> PreparedCall:
    x, y = torch.randn(*rows, width), torch.randn(*rows)
    outputs = torch.full((*rows, width), float("nan")), torch.full((*rows, 2), float("nan"))
    return PreparedCall(definition.bind({}, {}), (x, y), outputs, {}, single=False, repeatable=repeatable)


@given(st.lists(st.sampled_from([(1,), (1, 1), (2, 2), (3,), (1, 8), (8, 1)]), min_size=1, max_size=9))
def test_each_call_is_given_its_own_rows(shapes: list[tuple[int, ...]]) -> None:
    """B3: whatever the calls before and beside it."""
    gatherer = Gatherer(call((1, 1)), Costs())
    for chosen in (shapes, shapes[::-1], shapes[:1]):
        calls = [call(shape) for shape in chosen]
        forms = [form_of(one) for one in calls]
        assert len({form.key for form in forms if form is not None}) == 1
        gatherer.run([(one, form.rows) for one, form in zip(calls, forms, strict=True) if form is not None])
        for one in calls:
            x, y = one.inputs
            assert torch.equal(one.outputs[0], x * y.unsqueeze(-1))
            assert torch.equal(one.outputs[1], x[..., :2] + 1)
            one.watch()
            assert not one.changed()


def test_calls_of_another_kind_have_another_form() -> None:
    forms = [form_of(one) for one in (call((1,)), call((1,), width=4), call((1,), OpDefinition("other", scaled, spec, row_wise=True)))]
    assert None not in forms
    assert len({form.key for form in forms if form is not None}) == 3


def test_what_is_run_by_itself_has_none() -> None:
    assert form_of(call((MOST_ROWS + 1,))) is None
    assert form_of(call((0,))) is None
    assert form_of(call((1,), repeatable=False)) is None
    assert form_of(call((1,), OpDefinition("scaled", scaled, spec))) is None
    assert form_of(call((1,), OpDefinition("scaled", scaled, spec, copies_inputs=True, row_wise=True))) is None
    assert form_of(call((2, 2))) is not None
    turned = call((2, 2))
    turned.inputs = (turned.inputs[0].transpose(0, 1), turned.inputs[1])
    assert form_of(turned) is None


def test_what_was_measured_tells_what_pays() -> None:
    costs = Costs()
    assert not costs.pays([1, 1])  # alone it is not known yet
    for _ in range(3):
        costs.measured(1, 100.0)
    assert costs.pays([1, 1])  # to be found out
    for nanoseconds in (900.0, 150.0, 150.0):
        costs.measured(2, nanoseconds)  # the first one has touched its memory
    assert costs.pays([1, 1])
    assert not costs.pays([1])
    for _ in range(30):
        costs.measured(2, 300.0)
    assert not costs.pays([1, 1])
    assert [costs.is_worth_trying([1, 1]) for _ in range(2 * TRY_AGAIN)].count(True) == 2
    for _ in range(60):
        costs.measured(2, 120.0)
    assert costs.pays([1, 1])


def test_an_op_that_fails_is_told_to_whoever_runs_it() -> None:
    def failing(x: torch.Tensor, y: torch.Tensor, *, out: Sequence[torch.Tensor]) -> None:
        raise ValueError("no such luck")

    one = call((1,), OpDefinition("failing", failing, spec, row_wise=True))
    with pytest.raises(ValueError, match="no such luck"):
        Gatherer(one, Costs()).run([(one, 1), (one, 1)])


def test_no_memory_for_the_rows_of_all_is_an_error_and_no_other_number(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [call((1, 1)) for _ in range(3)]
    gatherer = Gatherer(calls[0], Costs())
    gatherer.run([(calls[0], 1)])

    def full(*shape: object, **options: object) -> torch.Tensor:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", full)
        with pytest.raises(RuntimeError, match="no memory"):
            gatherer.run([(one, 1) for one in calls])
    gatherer.run([(one, 1) for one in calls])
    for one in calls:
        assert torch.equal(one.outputs[0], one.inputs[0] * one.inputs[1].unsqueeze(-1))


def test_rows_of_many_bytes_are_run_by_themselves() -> None:
    assert form_of(call((1, 1), width=MOST_ROW_BYTES // 4)) is None
