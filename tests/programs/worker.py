"""A worker for tests: ops that compute nothing much, run as a process of its own."""

from __future__ import annotations

import hashlib
import os
import sys
import time

import torch

import shmbroker
from shmbroker import TensorSpec
from shmbroker.worker import draining

if "DRAIN_SECONDS" in os.environ:
    draining.DRAIN_SECONDS = float(os.environ["DRAIN_SECONDS"])

KEPT = {"kept_bytes": int(os.environ["KEPT_BYTES"])} if "KEPT_BYTES" in os.environ else {}

worker = shmbroker.Worker(sys.argv[1] if len(sys.argv) > 1 else "test", name="test-worker", trace=os.environ.get("TRACE"), **KEPT)


@worker.op
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@worker.op
def split_in_two(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[: len(x) // 2], x[len(x) // 2 :]


@worker.op(out_spec=lambda x, factor: TensorSpec(x.shape, x.dtype))
def scale(x: torch.Tensor, *, out: torch.Tensor, factor: float) -> None:
    torch.mul(x, factor, out=out)


@worker.op(out_spec=lambda x: TensorSpec(x.shape, x.dtype))
def add(x: torch.Tensor, *, out: torch.Tensor, term: float = 0.0) -> None:
    torch.add(x, term, out=out)


@worker.op(out_spec=lambda x: TensorSpec(x.shape, x.dtype))
def contiguous(x: torch.Tensor, *, out: torch.Tensor) -> None:
    out.copy_(x)


@worker.op(out_spec=lambda x: TensorSpec((1,), torch.int64))
def address(x: torch.Tensor, *, out: torch.Tensor) -> None:
    """Where the worker sees the input, from the start of its mapping's arena: the same for the same block."""
    out.fill_(x.data_ptr())


@worker.op(out_spec=lambda x: TensorSpec((), torch.float64))
def total(x: torch.Tensor, *, out: torch.Tensor) -> None:
    out.copy_(x.double().sum())


@worker.op(out_spec=lambda x, seconds: TensorSpec(x.shape, x.dtype))
def sleep(x: torch.Tensor, *, out: torch.Tensor, seconds: float) -> None:
    time.sleep(seconds)
    out.copy_(x)


@worker.op(out_spec=lambda x, seconds: TensorSpec(x.shape, x.dtype))
def compute(x: torch.Tensor, *, out: torch.Tensor, seconds: float) -> None:
    """Without a line of Python in between: one call that lets the interpreter lock go."""
    hashlib.pbkdf2_hmac("sha256", b"", b"salt", min(int(seconds * 1e6), (1 << 31) - 1))


@worker.op(out_spec=lambda x: TensorSpec(x.shape, x.dtype))
def die(x: torch.Tensor, *, out: torch.Tensor) -> None:
    os.kill(os.getpid(), 9)


@worker.op(out_spec=lambda x: TensorSpec(x.shape, x.dtype))
def fail(x: torch.Tensor, *, out: torch.Tensor) -> None:
    raise ValueError("no such luck")


@worker.op(out_spec=lambda x: TensorSpec((2,), torch.int64))
def turn_in_place(x: torch.Tensor, *, out: torch.Tensor) -> None:
    x.t_()
    out.copy_(torch.tensor(x.shape))


@worker.op(out_spec=lambda x: TensorSpec(x.shape, x.dtype))
def leave(x: torch.Tensor, *, out: torch.Tensor) -> None:
    raise SystemExit(3)


@worker.op
def leave_untried(x: torch.Tensor) -> torch.Tensor:
    raise SystemExit(3)


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@worker.op(out_spec=lambda x: TensorSpec(x.shape, x.dtype))
def unspeakable(x: torch.Tensor, *, out: torch.Tensor) -> None:
    raise Unspeakable


@worker.op(out_spec=lambda x, kind: TensorSpec(x.shape, x.dtype))
def raise_ours(x: torch.Tensor, *, out: torch.Tensor, kind: str) -> None:
    """Errors that mean something else when shmbroker raises them."""
    raise getattr(shmbroker, kind)("by the op")


@worker.op
def raise_ours_untried(x: torch.Tensor, *, kind: str) -> torch.Tensor:
    raise getattr(shmbroker, kind)("by the op")


def particular(x: TensorSpec) -> TensorSpec:
    raise shmbroker.BadInput("not these shapes")


@worker.op(out_spec=particular)
def choosy(x: torch.Tensor, *, out: torch.Tensor) -> None:
    pass


@worker.op
def grows_by_value(x: torch.Tensor) -> torch.Tensor:
    """Its shape depends on values: it cannot be tried out."""
    return x.repeat(int(x[0].item()))


TRIES = [0]


@worker.op
def tried_slowly(x: torch.Tensor, *, seconds: float, form: str = "") -> torch.Tensor:
    """How often it was tried out; each time takes so many seconds."""
    if x.is_meta:
        TRIES[0] += 1
        time.sleep(seconds)
    return x + TRIES[0]


def at_depth(depth: int) -> None:
    if depth:
        at_depth(depth - 1)
    raise ValueError(f"at the bottom {chr(0)}")


@worker.op(out_spec=lambda x: TensorSpec(x.shape, x.dtype))
def fail_deeply(x: torch.Tensor, *, out: torch.Tensor) -> None:
    at_depth(50)


RUNS = [0]


@worker.op
def count_runs(x: torch.Tensor, *, step: int = 1) -> torch.Tensor:
    if not x.is_meta:
        RUNS[0] += step
    return x + RUNS[0]


@worker.op
def nothing(x: torch.Tensor) -> None:
    return None


@worker.bound_op("table", out_spec=lambda x, rows: TensorSpec((rows, *x.shape), x.dtype))
def table(rows: int):  # type: ignore[no-untyped-def]
    if rows > 1000:
        raise ValueError(f"{rows} rows are too many")

    def run(x: torch.Tensor, *, out: torch.Tensor) -> None:
        out.copy_(x.expand(rows, *x.shape))

    return run


worker.serve(ready=lambda: print("ready", flush=True))
