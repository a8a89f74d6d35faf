"""Prefill and decode at each mode, in turns, as parts of plain's speed."""

from __future__ import annotations

import contextlib
from typing import Any

from benchmarks.split_model.processes import two_processes
from benchmarks.split_model.work import Times, Work, medians, prefill
from benchmarks.table import Table
from benchmarks.trust.ways import PLAIN, await_pads, split_model, ways


def speed(work: Work, rounds: int, threads: int) -> dict[str, Any]:
    """Print the table; the figures. Both processes compute with so many ``threads``."""
    pads = work.prompt_tokens + work.decode_tokens
    times: dict[str, list[Times]] = {}
    with two_processes(work.model, threads, "1G") as client, contextlib.ExitStack() as stack:
        models = {name: stack.enter_context(split_model(client, work.model, options)) for name, options in ways(pads).items()}
        for turn in range(rounds + 1):
            for name, (model, moved) in models.items():
                await_pads(moved)
                decode = work.decode(model)
                await_pads(moved)
                once = Times(prefill(model, work.prefill_tokens), decode)
                await_pads(moved)  # they are made while nobody is measured
                if turn:  # the first is for warming up
                    times.setdefault(name, []).append(once)
    found = {name: medians(measured) for name, measured in times.items()}
    table = Table(
        f"{work.model.name}, float32, fused, prefill of {work.prefill_tokens} tokens, {threads} threads in each process",
        ["trust", "prefill s", "of plain", "decode tokens/s", "of plain"],
    )
    for name, row in found.items():
        table.row(
            name, f"{row.prefill:.3f}", f"{found[PLAIN].prefill / row.prefill:.2f}", f"{work.decode_tokens / row.decode:.1f}",
            f"{found[PLAIN].decode / row.decode:.2f}",
        )  # fmt: skip
    table.show()
    return {name: row._asdict() for name, row in found.items()}
