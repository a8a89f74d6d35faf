"""The pictures of ``docs/performance.md``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def draw(figures: dict[str, Any], folder: Path) -> Iterator[Path]:
    """Draw what ``figures`` holds: round trips by size, and the prefill."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "shmbroker"  # the same figures give the same file
    folder.mkdir(parents=True, exist_ok=True)
    if "rtt" in figures:
        yield _round_trips(figures["rtt"]["sizes"], folder / "rtt.svg")
    if "replay" in figures:
        yield _prefill(figures["replay"], folder / "replay.svg")


def _round_trips(sizes: dict[str, Any], path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)  # as many as there are lines
    xs = sorted(map(int, sizes))
    for name in sizes[str(xs[0])]:
        points = [(x, sizes[str(x)][name]["median_us"]) for x in xs if name in sizes[str(x)]]
        ours = name.startswith(("shmbroker", "replayed"))
        style = {"linewidth": 2.5 if ours else 1.2, "linestyle": ":" if name.startswith("floor") else "-", "marker": "." if ours else None}
        axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.set(xscale="log", yscale="log", xlabel="tensor size, bytes (the same each way)", ylabel="median round trip, microseconds")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def _prefill(result: dict[str, Any], path: Path) -> Path:
    import matplotlib.pyplot as plt

    rows = [
        ("hand-over", "hand_over_ms"),
        ("hand-over, captured", "hand_over_captured_ms"),
        ("one copy each way", "one_copy_ms"),
        ("bare copies", "bare_copies_ms"),
        ("msgpack", "msgpack_ms"),
    ]
    there = [(name, result[key]) for name, key in rows if key in result]
    figure, axes = plt.subplots(figsize=(8, 2.5))
    bars = axes.barh([name for name, _ in there], [value for _, value in there])
    axes.bar_label(bars, [f"{value:,.2f} ms" for _, value in there], padding=3, fontsize=8)
    axes.set(xscale="log", xlabel="transport of the prototype's prefill (98 calls), milliseconds")
    axes.margins(x=0.2)
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
