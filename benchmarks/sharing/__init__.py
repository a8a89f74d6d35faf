"""``sharing``: decode of one client beside the prefill of another, on one worker."""

from __future__ import annotations

import contextlib
import select
import statistics
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import shmbroker
from benchmarks.peer import peer
from benchmarks.sharing.layer import HIDDEN, PRODUCTS, SERVICE, bind
from benchmarks.table import Table

TOKENS = 1024
ROUNDS = 3

OWN_SECONDS = 1.5e-3
"""What the decoding client computes itself before each of its calls: attention over some thousand tokens, on a core of its own."""


def run(tokens: int = TOKENS, passes: int = 4, rounds: int = ROUNDS, own_seconds: float = OWN_SECONDS) -> dict[str, Any]:
    """Measure each alone and both together, in turns, with products in pieces and in one. Times are of a pass over one layer, medians.

    ``of_what_is_left``: of the worker's time, when decode has had its calls'.
    """
    figures = {kind: _measured(kind, tokens, passes, rounds, own_seconds) for kind in ("pieces", "whole")}
    table = Table(
        f"one layer ({HIDDEN} wide, {len(PRODUCTS)} products), worker on one core, prefill of {tokens} tokens beside decode",
        ["", "decode alone ms", "beside ms", "times", "prefill alone ms", "beside ms", "speed", "of what decode leaves"],
    )
    for kind, one in figures.items():
        decode, prefill = one["decode_ms"], one["prefill_ms"]
        table.row(
            {"pieces": "in pieces", "whole": "in one"}[kind],
            f"{decode['alone']:.1f}", f"{decode['beside']:.1f}", f"{one['decode_times']:.2f}",
            f"{prefill['alone']:.0f}", f"{prefill['beside']:.0f}", f"{one['prefill_speed']:.2f}", f"{one['of_what_is_left']:.2f}",
        )  # fmt: skip
    table.show()
    return figures


def quick() -> dict[str, Any]:
    """One short round."""
    return run(tokens=192, passes=1, rounds=1, own_seconds=1e-4)


def _measured(kind: str, tokens: int, passes: int, rounds: int, own_seconds: float) -> dict[str, Any]:
    decode: dict[str, list[float]] = {"alone": [], "beside": []}
    prefill: dict[str, list[float]] = {"alone": [], "beside": []}
    with contextlib.ExitStack() as stack:
        stack.enter_context(shmbroker.local_broker())
        stack.enter_context(peer("sharing.worker", kind))
        other = stack.enter_context(peer("sharing.prefill", str(tokens)))
        step = stack.enter_context(_decode(own_seconds))
        for _ in range(rounds):
            prefill["alone"].append(_answer(_begin(other, passes)) / passes)
            until = time.perf_counter() + passes * prefill["alone"][-1] / 2
            decode["alone"].append(_timed(step))
            while time.perf_counter() < until:
                decode["alone"].append(_timed(step))
            _begin(other, passes)
            times = [_timed(step)]
            while not _has_answered(other):
                times.append(_timed(step))
            decode["beside"] += times[:-1] or times  # the last may have been alone
            prefill["beside"].append(_answer(other) / passes)
    medians = {
        "decode_ms": {when: statistics.median(times) * 1e3 for when, times in decode.items()},
        "prefill_ms": {when: statistics.median(times) * 1e3 for when, times in prefill.items()},
    }
    worker_ms = medians["decode_ms"]["alone"] - len(PRODUCTS) * own_seconds * 1e3
    speed = medians["prefill_ms"]["alone"] / medians["prefill_ms"]["beside"]
    return {
        **medians,
        "of_what_is_left": speed / max(0.01, 1 - worker_ms / medians["decode_ms"]["beside"]),
        "decode_times": medians["decode_ms"]["beside"] / medians["decode_ms"]["alone"],
        "prefill_speed": speed,
    }


@contextlib.contextmanager
def _decode(own_seconds: float) -> Iterator[Any]:
    """A decode step: each product of the layer for one token, and what the client computes itself before each."""
    with shmbroker.connect(arena="16M", name="decode") as client:
        calls = bind(client.channel(SERVICE), client, 1)

        def step() -> None:
            for call in calls:
                until = time.perf_counter() + own_seconds
                while time.perf_counter() < until:
                    pass
                call()

        for _ in range(3):
            step()
        yield step


def _timed(step: Any) -> float:
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def _begin(other: subprocess.Popen[bytes], passes: int) -> subprocess.Popen[bytes]:
    assert other.stdin is not None
    other.stdin.write(f"{passes}\n".encode())
    other.stdin.flush()
    return other


def _has_answered(other: subprocess.Popen[bytes]) -> bool:
    return bool(select.select([other.stdout], [], [], 0)[0])


def _answer(other: subprocess.Popen[bytes]) -> float:
    """Seconds that its passes took."""
    assert other.stdout is not None
    return float(other.stdout.readline())
