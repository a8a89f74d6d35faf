"""``replay``: the transport of the prototype's prefill, beside bare copies and the same calls as msgpack bytes over ZeroMQ."""

from __future__ import annotations

import contextlib
import statistics
import time
from typing import Any

import torch

import shmbroker
from benchmarks.contenders import missing
from benchmarks.peer import peer
from benchmarks.prefill.calls import Shape, calls, nbytes
from benchmarks.prefill.readings import Readings
from benchmarks.table import Table
from shmbroker.settings.sizes import MIB


def run(seconds: float = 2.0, scale: int = 1, *, msgpack: bool = True) -> dict[str, Any]:
    """Measure; ``scale`` divides the tokens. Times in milliseconds for all 98 calls."""
    shapes = calls(scale)
    sent, received = sum(nbytes(s.inputs) for s in shapes), sum(nbytes(s.outputs) for s in shapes)
    largest = max(nbytes((one,)) for shape in shapes for one in (*shape.inputs, *shape.outputs))
    print(f"{len(shapes)} calls, {sent / MIB:.1f} MiB out, {received / MIB:.1f} MiB back")
    result: dict[str, Any] = {"calls": len(shapes), "sent_bytes": sent, "received_bytes": received}
    with contextlib.ExitStack() as stack:
        stack.enter_context(shmbroker.local_broker())
        stack.enter_context(peer("prefill.worker", str(largest // 4)))
        client = stack.enter_context(shmbroker.connect(arena=12 * largest + (64 << 20)))
        readings = Readings(client, client.channel("replay"), shapes)
        readings.prepare_bare_copies()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # both sides copy with one thread, so that they can be compared
        readings.hand_over()
        hand_over = _times(readings.hand_over, seconds, 20)
        readings.capture()
        captured = _times(readings.hand_over_captured, seconds, 20)
        readings.release()
        pairs = [(_time(readings.one_copy), _time(readings.bare_copies)) for _ in range(7 if scale == 1 else 3)]
        result["touched_compared"], result["touched_equal"] = readings.touched()
        torch.set_num_threads(threads)
        del readings
    result["hand_over_ms"] = statistics.median(hand_over)
    result["hand_over_best_ms"] = min(hand_over)
    result["hand_over_captured_ms"] = statistics.median(captured)
    result["one_copy_ms"], result["bare_copies_ms"] = (statistics.median(column) for column in zip(*pairs, strict=True))
    if msgpack and missing("msgpack") is None:
        result["msgpack_ms"] = _msgpack(shapes)
    _show(result)
    return result


def quick() -> dict[str, Any]:
    """A sixteenth of the tokens, a moment of each, and not as msgpack."""
    return run(0.1, 16, msgpack=False)


def _msgpack(shapes: list[Shape]) -> float:
    """The same calls the prototype's way, once: it takes most of a minute."""
    from benchmarks.contenders.msgpack_socket import exchanges

    kinds = {shape.name: [torch.ones(size) for size in shape.inputs] for shape in shapes}
    with exchanges() as exchange:

        def go() -> None:
            for shape in shapes:
                for data in exchange(kinds[shape.name], [nbytes((output,)) for output in shape.outputs]):
                    torch.frombuffer(bytearray(data), dtype=torch.float32)

        return _time(go)


def _time(action: Any) -> float:
    begun = time.perf_counter()
    action()
    return (time.perf_counter() - begun) * 1e3


def _times(action: Any, seconds: float, at_least: int) -> list[float]:
    times: list[float] = []
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds or len(times) < at_least:
        times.append(_time(action))
    return times


def _show(result: dict[str, Any]) -> None:
    table = Table("transport of the whole prefill", ["", "ms", "compared with"])
    table.row("hand-over", f"{result['hand_over_ms']:.3f}", f"best {result['hand_over_best_ms']:.3f}")
    table.row("  captured and replayed", f"{result['hand_over_captured_ms']:.3f}", "")
    ratio = result["one_copy_ms"] / result["bare_copies_ms"]
    table.row("one copy each way", f"{result['one_copy_ms']:.1f}", f"{ratio:.2f} x the bare copies")
    table.row("  the bare copies", f"{result['bare_copies_ms']:.1f}", "")
    if "msgpack_ms" in result:
        times, captured = (result["msgpack_ms"] / result[key] for key in ("hand_over_ms", "hand_over_captured_ms"))
        table.row("msgpack over ZeroMQ", f"{result['msgpack_ms']:.0f}", f"{times:,.0f} x hand-over, {captured:,.0f} x captured")
    table.show()
    print(f"touched: {result['touched_equal']} of {result['touched_compared']} checksums equal")
