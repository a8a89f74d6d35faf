"""The prototype's measurement: one prefill with a split model, told in the prototype's own words beside the prototype's figures."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import msgspec
import torch

from shmbroker.call.report import Report
from shmbroker.client.client import connect
from shmbroker.client.local_broker import local_broker, stop_process
from shmbroker.control.status import ask
from shmbroker.errors import BadInput, BrokerUnreachable
from shmbroker.memory.layout import PAGE, round_up
from shmbroker.models.checkpoint import model_dtype
from shmbroker.models.source import model_source
from shmbroker.settings.sizes import MIB
from tee_worker.offloading.offload import offload
from tee_worker.planning.own_part import own_part
from tee_worker.planning.splits import Split, Splits
from tee_worker.planning.structure import structure_of
from tee_worker.planning.traffic import generation_traffic
from tee_worker.split_run import ARENA_FLOOR, ARENA_LARGEST_TENSORS, Analytic, compare, private_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType
    from transformers import PreTrainedModel

PROTOTYPE = {"calls": "98", "RPC time": "32.5 s", "per call": "332 ms", "sent": "3328 MiB", "received": "3657 MiB", "whole prefill": "44 s"}
"""Llama-3.2-1B, 1024 tokens, float32, msgpack over ZeroMQ; what it spent on serializing alone is not known."""

WORKER_START_SECONDS = 300.0
"""How long a worker may take to make or read its weights."""


class Options(msgspec.Struct, frozen=True):
    """What is measured."""

    model: str | None = None
    shape: str | None = None
    seed: int = 0
    tokens: int = 1024
    split: str = Split.OP.value
    pipeline: int = 1
    dtype: str = "float32"
    compare: bool = False
    instance: str | None = None
    service: str = "gpu"
    lane: str = "auto"
    threads: int | None = None
    trace: str | None = None
    timeout: float = 120.0


class Outcome(msgspec.Struct, frozen=True):
    """What came of it. Times in seconds."""

    model: str
    split: str
    dtype: str
    tokens: int
    seconds: float
    report: Report
    analytic: Analytic
    private_bytes: int
    whole_seconds: float | None = None
    """The same prefill by Hugging Face in this process alone."""
    largest_difference: float | None = None
    """Of the last token's logits, between the two."""
    logits_range: float | None = None

    def render(self) -> RenderableType:
        """As a table for a terminal."""
        from rich.console import Group
        from rich.table import Table

        total = self.report.total
        ours = {
            "calls": str(total.calls),
            "RPC time": f"{total.rpc_ms / 1e3:.3f} s",
            "  of it computing": f"{total.compute_ms / 1e3:.3f} s",
            "  of it transport": f"{(total.rpc_ms - total.compute_ms) / 1e3:.4f} s",
            "per call": f"{total.rpc_ms / max(total.calls, 1):.3f} ms",
            "serialize": f"{(total.build_ms + total.copy_ms):.2f} ms (placing {total.build_ms:.2f}, copying in {total.copy_ms:.2f})",
            "deserialize": f"{total.read_ms:.2f} ms",
            "sent": f"{megabytes(total.sent_bytes)} MiB",
            "received": f"{megabytes(total.received_bytes)} MiB",
            "over a socket": f"{self.report.socket_bytes} bytes",
            "whole prefill": f"{self.seconds:.2f} s",
        }
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("")
        table.add_column(f"{self.model}, {self.tokens} tokens, {self.split}, {self.dtype}", justify="right")
        table.add_column("prototype (Llama-3.2-1B, 1024, op, float32)", justify="right")
        for label, value in ours.items():
            table.add_row(label, value, PROTOTYPE.get(label, ""))
        equal = "equal" if self.analytic.equal else "NOT EQUAL"
        lines = [
            f"{total.calls} calls, {megabytes(total.sent_bytes)} MiB sent, {megabytes(total.received_bytes)} MiB received; {equal} to the plan"
        ]
        if self.whole_seconds is not None:
            lines.append(
                f"the same in one process: {self.whole_seconds:.2f} s; largest difference of the logits {self.largest_difference:.3g}, which "
                f"range over {self.logits_range:.3g}"
            )
        return Group(table, "", *lines)


def megabytes(nbytes: int) -> str:
    """MiB with one decimal where there is one: ``3328``, ``3656.5``."""
    return f"{round(nbytes / MIB, 1):g}"


def prefill(options: Options, on_note: Callable[[str], None] = lambda note: None) -> Outcome:
    """Run one prefill. Where no broker answers, one is started for it, and a worker. Raises :class:`ShmBrokerError`."""
    split = Splits.named(options.split)
    dtype = model_dtype(options.dtype)
    source = model_source(options.model, options.shape, options.seed)
    if options.tokens < 1:
        raise BadInput(f"--tokens {options.tokens} must be 1 or more")
    if options.threads:
        torch.set_num_threads(options.threads)
    model = own_part(source, dtype, split)
    structure = structure_of(model, split)
    planned = generation_traffic(structure, split, prompt_tokens=options.tokens, new_tokens=1, pipeline=options.pipeline)
    assert planned.largest_tensor is not None
    arena = round_up(ARENA_FLOOR + (ARENA_LARGEST_TENSORS + 2) * options.pipeline * planned.largest_tensor.nbytes, PAGE)
    ids = torch.randint(0, model.config.vocab_size, (1, options.tokens), generator=torch.Generator().manual_seed(options.seed))
    with (
        _peers(options, on_note),
        connect(options.instance, arena=arena, name="tee-worker", timeout=options.timeout, trace=options.trace) as client,
    ):
        channel = client.channel(options.service, lane=options.lane, wait=WORKER_START_SECONDS)
        offload(model, channel, split, pipeline=options.pipeline, structure=structure)
        _run(model, ids[:, :1])  # whatever is done once is done now
        channel.forget_statistics()
        begun = time.perf_counter()
        logits = _run(model, ids)
        seconds = time.perf_counter() - begun
        report = channel.report()
        private = private_bytes()
    whole_seconds = difference = reach = None
    if options.compare:
        on_note("the same in this process alone ...")
        whole = source.model(dtype)
        begun = time.perf_counter()
        expected = _run(whole, ids)
        whole_seconds = time.perf_counter() - begun
        difference = float((expected.float() - logits.float()).abs().max())
        reach = float(expected.float().max() - expected.float().min())
    return Outcome(
        model=source.name,
        split=str(split),
        dtype=options.dtype,
        tokens=options.tokens,
        seconds=seconds,
        report=report,
        analytic=compare(planned, report),
        private_bytes=private,
        whole_seconds=whole_seconds,
        largest_difference=difference,
        logits_range=reach,
    )


def _run(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, use_cache=True, logits_to_keep=1).logits
    return logits.clone()


@contextlib.contextmanager
def _peers(options: Options, on_note: Callable[[str], None]) -> Iterator[None]:
    """A broker and a worker of our own, unless a broker runs."""
    try:
        ask(options.instance)
    except BrokerUnreachable:
        if options.instance is not None:
            raise
    else:
        yield
        return
    on_note("no broker runs: starting one, and a GPU worker on this machine's CPU, for this measurement ...")
    with local_broker():
        command = [
            sys.executable,
            "-m",
            "gpu_worker",
            "--log-level",
            "warning",
            "serve",
            "--service",
            options.service,
            "--dtype",
            options.dtype,
        ]
        command += ["--model", options.model] if options.model else ["--shape", str(options.shape), "--seed", str(options.seed)]
        command += ["--threads", str(options.threads)] if options.threads else []
        worker = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            yield
        finally:
            stop_process(worker)
