"""``verify`` with arithmetic ``float``: what it finds, what it lets pass, and that the head does not depend on that."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any

import pytest
import torch

from shmbroker import BadInput, WrongResult
from shmbroker.client import Bindable
from tee_worker.trust.float_check import WINDOW, FloatLayer, tolerance_of
from tee_worker.trust.modes import Arithmetic, Trust, TrustOptions
from tee_worker.trust.session import TrustSession

ROWS, COLUMNS, OUTPUTS = 3, 96, 64

Lie = Callable[[torch.Tensor], None]


class Op:
    """Computes right here; ``lie`` changes the result."""

    name = "linear"

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight
        self.lie: Lie = lambda y: None

    def __call__(self, *inputs: torch.Tensor, **options: Any) -> Any:
        y = inputs[0] @ self._weight.t()
        self.lie(y)
        return y

    def submit(self, *inputs: torch.Tensor, **options: Any) -> concurrent.futures.Future[Any]:
        raise NotImplementedError

    def capture(self, *inputs: torch.Tensor, **arguments: Any) -> Any:
        raise NotImplementedError


class Here:
    """Binds that one op."""

    def __init__(self, op: Op) -> None:
        self.op = op
        self.memory: Any = None

    def bind(self, op: str, **static: Any) -> Op:
        return self.op

    def report(self) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        pass


def layer_of(weight: torch.Tensor, *, head: bool = False) -> tuple[FloatLayer, Op, TrustSession]:
    op = Op(weight)
    channel: Bindable = Here(op)
    session = TrustSession(TrustOptions(mode=Trust.VERIFY, arithmetic=Arithmetic.FLOAT), lambda: "here", lambda: None, "")
    return FloatLayer(channel, session, ["layer"], [weight], [None], [{}], head=head), op, session


@pytest.fixture
def weight() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(OUTPUTS, COLUMNS)


def test_right_results_pass_as_they_are(weight: torch.Tensor) -> None:
    layer, _, session = layer_of(weight)
    for _ in range(500):
        x = torch.randn(2, ROWS, COLUMNS) * 10
        assert torch.equal(layer(x), x @ weight.t())
    assert session.report().rejected == 0


def test_a_deviation_of_32_tolerances_never_passes(weight: torch.Tensor) -> None:
    for turn in range(300):
        layer, op, _ = layer_of(weight)
        x = torch.randn(ROWS, COLUMNS)
        size = WINDOW * tolerance_of([weight]) * float(x[1].norm())

        def lie(y: torch.Tensor, turn: int = turn, size: float = size) -> None:
            y[1, turn % OUTPUTS] += size

        op.lie = lie
        with pytest.raises(WrongResult, match="row 1 of call 1, layer"):
            layer(x)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_rejected(weight: torch.Tensor, odd: float) -> None:
    layer, op, _ = layer_of(weight)

    def lie(y: torch.Tensor) -> None:
        y[2, 5] = odd

    op.lie = lie
    with pytest.raises(WrongResult, match="row 2 of call 1"):
        layer(torch.randn(ROWS, COLUMNS))


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_are_told_and_no_worker_is_blamed(weight: torch.Tensor, odd: float) -> None:
    layer, op, session = layer_of(weight)
    x = torch.randn(ROWS, COLUMNS)
    x[1, 3] = odd

    def lie(y: torch.Tensor) -> None:
        y.zero_()

    op.lie = lie
    with pytest.raises(BadInput, match="activations that are not finite"):
        layer(x)
    assert session.report().rejected == 0


def test_a_small_deviation_passes_and_at_the_head_changes_no_token(weight: torch.Tensor) -> None:
    """It is approximate: so who chooses a token does not rely on it."""
    weight[1] = weight[0] * (1 + 1e-6)  # two tokens that are nearly as likely
    x = weight[:1].clone()
    size = 0.2 * tolerance_of([weight]) * float(x.norm())

    def lie(y: torch.Tensor) -> None:
        y[0, 0] += size

    honest = int((x.double() @ weight.double().t())[0].argmax())
    assert honest == 1
    plain, op, _ = layer_of(weight)
    op.lie = lie
    assert int(plain(x)[0].argmax()) == 0, "a worker can do that"
    head, op, _ = layer_of(weight, head=True)
    op.lie = lie
    assert int(head(x)[0].argmax()) == honest
