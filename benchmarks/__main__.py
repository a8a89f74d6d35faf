"""``python -m benchmarks [NAME ...] [--json FILE] [--plot DIR] [--quick]``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import alloc, copies, cuda, model, replay, rtt, steps, throughput, waiting
from benchmarks.measure import PEER_CPU, machine, pin

FULL: dict[str, Callable[[], dict[str, Any]]] = {
    "rtt": rtt.run,
    "replay": replay.run,
    "steps": steps.run,
    "copies": copies.run,
    "waiting": waiting.run,
    "throughput": throughput.run,
    "alloc": alloc.run,
    "model": model.run,
    "cuda": cuda.run,
}
QUICK: dict[str, Callable[[], dict[str, Any]]] = {
    "rtt": lambda: rtt.run(0.1, [64, 1 << 20]),
    "replay": lambda: replay.run(0.1, 16, msgpack=False),
    "steps": lambda: steps.run(100),
    "copies": lambda: copies.run(0.1),
    "waiting": lambda: waiting.run(0.1),
    "throughput": lambda: throughput.run(0.1),
    "alloc": lambda: alloc.run(0.1),
    "model": lambda: model.run(1, lengths=1),
    "cuda": lambda: cuda.run(0.1),
}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, type=click.Choice(list(FULL)))
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write all figures here too.")
@click.option("--plot", "plot_dir", type=click.Path(path_type=Path, file_okay=False), help="Draw the pictures of docs/performance.md here.")
@click.option("--quick", is_flag=True, help="Small and short: to see that it runs, not how fast.")
def main(names: tuple[str, ...], json_file: Path | None, plot_dir: Path | None, quick: bool) -> None:
    """Measure against everything else that can be had, in one run, alternating."""
    here = machine()
    click.echo(", ".join(f"{key} {value}" for key, value in here.items()))
    if here["load"] > 0.5:
        click.echo(f"other work is running (load {here['load']:.1f}): a spinning benchmark needs its cores to itself", err=True)
    pin(1 - PEER_CPU)
    torch.set_num_threads(1)  # on its one core; so do the peers
    figures: dict[str, Any] = {"machine": here}
    for name in names or FULL:
        click.echo(f"\n== {name}")
        figures[name] = (QUICK if quick else FULL)[name]()
    if json_file:
        json_file.write_text(json.dumps(figures, indent=2))
    if plot_dir:
        from benchmarks.plot import draw

        for picture in draw(figures, plot_dir):
            click.echo(f"drew {picture}")


if __name__ == "__main__":
    main()
