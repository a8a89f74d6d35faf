"""The report: what a channel's calls cost, per op and in all; for people as tables, for programs as JSON."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

from shmbroker.call.statistics import OpStatistics
from shmbroker.settings.sizes import MIB, mib

if TYPE_CHECKING:
    from rich.console import RenderableType


class OpReport(msgspec.Struct, frozen=True):
    """Calls of one op, or of all. Times in milliseconds, sizes in bytes."""

    op: str
    calls: int
    errors: int
    rpc_ms: float
    """In all, from the call until its outputs were in the caller's hands."""
    rpc_median_ms: float
    rpc_p99_ms: float
    compute_ms: float
    """Of it, the op on the worker."""
    transport_ms: float
    """Of it, the rest without copying: placing, describing, signalling, waking."""
    copy_ms: float
    """Of it, copying inputs that did not lie in the arena."""
    build_ms: float
    """Of the transport, placing outputs and building frames."""
    read_ms: float
    """Of the transport, reading completions."""
    sent_bytes: int
    """Inputs, handed over through shared memory."""
    received_bytes: int
    """Outputs, the same way."""
    copied_bytes: int
    """Of the inputs, copied by the client into the arena."""


class Report(msgspec.Struct, frozen=True):
    """What a channel's calls cost."""

    lane: str
    doorbell: str
    control: str
    """Transport of the control channel: ipc or tcp."""
    socket_bytes: int
    """Bytes of frames that went over a socket: none on the shm lane. Tensors never do."""
    total: OpReport
    ops: tuple[OpReport, ...]
    failovers: int = 0
    """How often another worker took over."""
    device: str = "cpu"
    """What the worker computes on, and which way its copies go: ``cpu``, or e.g. ``cuda:0 NAME, pageable``."""

    @classmethod
    def of(
        cls,
        statistics: Sequence[OpStatistics],
        lane: str,
        doorbell: str,
        control: str,
        socket_bytes: int,
        failovers: int = 0,
        device: str = "cpu",
    ) -> Report:
        """From the counters of all ops bound on a channel; ops of one name are added up."""
        by_name: dict[str, list[OpStatistics]] = {}
        for one in statistics:
            by_name.setdefault(one.name, []).append(one)
        lines = tuple(_line(name, group) for name, group in by_name.items() if any(one.calls or one.errors for one in group))
        return cls(lane, doorbell, control, socket_bytes, _line("all", statistics), lines, failovers, device)

    def __repr__(self) -> str:
        total = self.total
        return (
            f"<Report: {total.calls} calls of {len(self.ops)} ops, {total.errors} failed, {total.rpc_ms:.1f} ms in all, median {total.rpc_median_ms:.3f} ms; "
            f"lane {self.lane}, doorbell {self.doorbell}; print() shows the table>"
        )

    def _repr_html_(self) -> str:
        """As a table in a notebook."""
        lines = (*self.ops, self.total)
        head = "".join(f"<th>{html.escape(line.op)}</th>" for line in lines)
        rows = "".join(
            f"<tr><th style='text-align: left'>{label.strip()}</th>{''.join(f'<td>{html.escape(cell(line))}</td>' for line in lines)}</tr>"
            for label, cell in _ROWS
        )
        return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table><p>{html.escape(self._foot())}</p>"

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, color_system=None)
        with console.capture() as captured:
            console.print(self.render())
        return captured.get().rstrip()

    def render(self) -> RenderableType:
        """As a table for a terminal."""
        from rich.console import Group
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("")
        lines = (*self.ops, self.total)
        for line in lines:
            table.add_column(line.op, justify="right", style="bold" if line is self.total else "")
        for label, cell in _ROWS:
            table.add_row(label, *[cell(line) for line in lines])
        return Group(table, self._foot())

    def _foot(self) -> str:
        """What no table tells."""
        foot = (
            f"lane {self.lane}, doorbell {self.doorbell}, control {self.control}; "
            f"{mib(self.total.sent_bytes)} out and {mib(self.total.received_bytes)} back through shared memory, "
            f"{self.socket_bytes} bytes of frames over a socket, where tensors never go"
        )
        if self.device != "cpu":
            foot += f"; computed on {self.device}: {self.total.calls} calls"
        if self.total.errors:
            foot += f"; {self.total.errors} calls failed"
        if self.failovers:
            foot += f"; another worker took over {self.failovers} time{'s' if self.failovers > 1 else ''}"
        return foot


_ROWS: tuple[tuple[str, Callable[[OpReport], str]], ...] = (
    ("calls", lambda line: str(line.calls)),
    ("RPC ms", lambda line: f"{line.rpc_ms:.1f}"),
    (" median/call", lambda line: f"{line.rpc_median_ms:.3f}"),
    (" p99/call", lambda line: f"{line.rpc_p99_ms:.3f}"),
    (" compute", lambda line: f"{line.compute_ms:.1f}"),
    (" copy in", lambda line: f"{line.copy_ms:.1f}"),
    (" transport", lambda line: f"{line.transport_ms:.1f}"),
    ("  build", lambda line: f"{line.build_ms:.1f}"),
    ("  read", lambda line: f"{line.read_ms:.1f}"),
    ("sent MiB", lambda line: f"{line.sent_bytes / MIB:.1f}"),
    (" copied in", lambda line: f"{line.copied_bytes / MIB:.1f}"),
    ("received MiB", lambda line: f"{line.received_bytes / MIB:.1f}"),
)


def percentile(ordered: Sequence[int], fraction: float) -> float:
    """Of values in ascending order, the smallest that at least ``fraction`` of them do not exceed; 0 of none."""
    if not ordered:
        return 0.0
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)]


def _line(name: str, group: Iterable[OpStatistics]) -> OpReport:
    group = list(group)
    samples = sorted(sample for one in group for sample in one.samples.copy())

    def total_ms(field: str) -> float:
        return float(sum(getattr(one, field) for one in group)) / 1e6

    def total(field: str) -> int:
        return int(sum(getattr(one, field) for one in group))

    rpc, compute, copy = total_ms("rpc_ns"), total_ms("compute_ns"), total_ms("copy_ns")
    return OpReport(
        op=name,
        calls=total("calls"),
        errors=total("errors"),
        rpc_ms=rpc,
        rpc_median_ms=percentile(samples, 0.5) / 1e6,
        rpc_p99_ms=percentile(samples, 0.99) / 1e6,
        compute_ms=compute,
        transport_ms=max(0.0, rpc - compute - copy),
        copy_ms=copy,
        build_ms=total_ms("build_ns"),
        read_ms=total_ms("read_ns"),
        sent_bytes=total("sent_bytes"),
        received_bytes=total("received_bytes"),
        copied_bytes=total("copied_bytes"),
    )
