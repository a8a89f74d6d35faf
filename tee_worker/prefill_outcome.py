"""What came of a prefill, in the prototype's own words beside the prototype's figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from shmbroker.client import Report
from shmbroker.settings import MIB
from tee_worker.analytic import Analytic
from tee_worker.trust.session import TrustReport

if TYPE_CHECKING:
    from rich.console import RenderableType

PROTOTYPE = {"calls": "98", "RPC time": "32.5 s", "per call": "332 ms", "sent": "3328 MiB", "received": "3657 MiB", "whole prefill": "44 s"}
"""Llama-3.2-1B, 1024 tokens, float32, msgpack over ZeroMQ; what it spent on serializing alone is not known."""


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
    trust: TrustReport
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
        if self.trust.mode != "plain":
            lines.append(self.trust.render())
        return Group(table, "", *lines)


def megabytes(nbytes: int) -> str:
    """MiB with one decimal where there is one: ``3328``, ``3656.5``."""
    return f"{round(nbytes / MIB, 1):g}"
