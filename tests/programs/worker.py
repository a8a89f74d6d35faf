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

LIMITS = {"kept_bytes": int(os.environ["KEPT_BYTES"])} if "KEPT_BYTES" in os.environ else {}
for limit in ("max_channels", "max_waiting_rows"):
    if limit.upper() in os.environ:
        LIMITS[limit] = int(os.environ[limit.upper()])

worker = shmbroker.Worker(
    sys.argv[1] if len(sys.argv) > 1 else "test",
    name=os.environ.get("WORKER_NAME", "test-worker"),
    trace=os.environ.get("TRACE"),
    batch=os.environ.get("BATCH"),  # type: ignore[arg-type]
    **LIMITS,
)


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


@worker.op(out_spec=lambda x: TensorSpec(x.shape, x.dtype))
def sleep_for_the_first(x: torch.Tensor, *, out: torch.Tensor) -> None:
    """For as many seconds as the first element says."""
    time.sleep(float(x.flatten()[0]))
    out.copy_(x)


@worker.op(out_spec=lambda x: TensorSpec(x.shape, x.dtype))
def fail_for_negative(x: torch.Tensor, *, out: torch.Tensor) -> None:
    if x.flatten()[0] < 0:
        raise ValueError("negative")
    out.copy_(x)


@worker.op(out_spec=lambda file: ())
def wait_while_there_is(*, out: tuple[()], file: str) -> None:
    """With no tensor, in or out."""
    while os.path.exists(file):
        time.sleep(0.01)


@worker.op(out_spec=lambda x: (TensorSpec(x.shape, x.dtype), TensorSpec((2, *x.shape), x.dtype)))
def twins(x: torch.Tensor, *, out: tuple[torch.Tensor, torch.Tensor]) -> None:
    """What came, once, and twice."""
    out[0].copy_(x)
    out[1].copy_(x.expand(2, *x.shape))


@worker.op(out_spec=lambda x, seconds: TensorSpec(x.shape, x.dtype))
def compute(x: torch.Tensor, *, out: torch.Tensor, seconds: float) -> None:
    """Without a line of Python in between: one call that lets the interpreter lock go."""
    hashlib.pbkdf2_hmac("sha256", b"", b"salt", min(int(seconds * 1e6), (1 << 31) - 1))


@worker.op(out_spec=lambda x, gate: TensorSpec(x.shape, x.dtype), row_wise=True)
def double_rows(x: torch.Tensor, *, out: torch.Tensor, gate: str) -> None:
    """Slow until the file ``gate`` is there: 20 ms for each piece. Rows of an infinite value cannot be doubled."""
    if not os.path.exists(gate):
        time.sleep(0.02)
    if bool(torch.isinf(x).any()):
        raise ValueError(f"a row of {x.shape[-2]} is infinite")
    if bool(torch.isnan(x).any()):
        raise SystemExit(3)
    torch.mul(x, 2, out=out)


@worker.op(out_spec=lambda x: TensorSpec((1,), torch.int64))
def mapped_segments(x: torch.Tensor, *, out: torch.Tensor) -> None:
    with open("/proc/self/maps") as maps:
        out.fill_(len({line.split()[-1] for line in maps if ".segment." in line}))


@worker.op(out_spec=lambda x: TensorSpec(x.shape, x.dtype))
def die(x: torch.Tensor, *, out: torch.Tensor) -> None:
    os.kill(os.getpid(), 9)


@worker.op(out_spec=lambda x: TensorSpec(x.shape, x.dtype))
def fail(x: torch.Tensor, *, out: torch.Tensor) -> None:
    raise ValueError("no such luck")


def same(x: TensorSpec) -> TensorSpec:
    return x


LIMITS_INPUTS: list[object] = []


@worker.op(out_spec=same)
def write(x: torch.Tensor) -> torch.Tensor:
    return x.relu_()


@worker.op(out_spec=same)
def write_into_a_view(x: torch.Tensor) -> torch.Tensor:
    x[1:].zero_()
    return x


@worker.op(out_spec=same)
def write_by_numpy(x: torch.Tensor) -> torch.Tensor:
    torch.from_numpy(x.numpy()).zero_()
    return x


@worker.op(out_spec=same)
def write_later(x: torch.Tensor, *, now: bool = False) -> torch.Tensor:
    """Only when it is told to, so that what it does on its first call tells nothing."""
    return x.zero_() if now else x


@worker.op(out_spec=same, in_place=True)
def relu_(x: torch.Tensor) -> torch.Tensor:
    return x.relu_()


@worker.op(out_spec=lambda x, y: TensorSpec((1,), torch.float32), in_place=True)
def swap(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    both = x.clone()
    x.copy_(y)
    y.copy_(both)
    return torch.ones(1)


@worker.op(out_spec=same, in_place=True)
def zero_and_fail(x: torch.Tensor) -> torch.Tensor:
    x.zero_()
    raise ValueError("half way")


@worker.op(out_spec=same, copies_inputs=True)
def relu_of_its_copy(x: torch.Tensor) -> torch.Tensor:
    return x.relu_()


@worker.op(out_spec=same)
def remember(x: torch.Tensor, *, how: str = "itself") -> torch.Tensor:
    keep = {
        "itself": lambda: x,
        "view": lambda: x[1:],
        "detached": lambda: x.detach(),
        "numpy": lambda: x.numpy(),
        "storage": lambda: x.untyped_storage(),
        "capsule": lambda: torch.utils.dlpack.to_dlpack(x),
        "memoryview": lambda: memoryview(x.numpy()),
        "in a tuple": lambda: (x, x),
        "closure": lambda: lambda: x,
        "nothing": lambda: None,
    }
    LIMITS_INPUTS.append(keep[how]())
    return x


@worker.op(out_spec=same, copies_inputs=True)
def remember_copy(x: torch.Tensor) -> torch.Tensor:
    LIMITS_INPUTS.append(x)
    return x


@worker.op(out_spec=lambda x: TensorSpec((3,), torch.float32))
def recall(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor([one[0].item() for one in LIMITS_INPUTS[-3:]])  # type: ignore[index]


@worker.op(out_spec=lambda x: TensorSpec((2,), torch.bool))
def records_gradients(x: torch.Tensor, *, out: torch.Tensor) -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    out[0] = (x * weight).requires_grad
    with torch.enable_grad():
        (x * weight).sum().backward()
    out[1] = weight.grad is not None


@worker.op(out_spec=same)
def in_a_cycle(x: torch.Tensor) -> torch.Tensor:
    """Leaves its input in a reference cycle, as an exception that is caught and named does."""
    try:
        raise ValueError
    except ValueError as error:
        kept = error
    assert kept is not None
    return x * 2


@worker.op(out_spec=same)
def give_back(x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """An op may return its input as well."""
    out.copy_(x)
    return x


@worker.op(out_spec=lambda x: TensorSpec((2,), torch.int64), in_place=True)
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
