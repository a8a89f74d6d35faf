"""``python -m benchmarks [NAME ...] [--json FILE] [--plot DIR] [--quick]``."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, Protocol, cast

import click

from benchmarks.machine import PEER_CPU, machine, pin

NAMES = (
    "rtt",
    "replay",
    "steps",
    "copies",
    "waiting",
    "sharing",
    "batching",
    "throughput",
    "alloc",
    "model",
    "trust",
    "serve",
    "ray",
    "cuda",
)
"""A module of this package each, with the two functions of :class:`Benchmark`."""


COUNTED = ("serve", "batching")
"""Those that can be told how many clients there are to be."""


class Benchmark(Protocol):
    """What measures, prints its tables and returns its figures, as they go into JSON."""

    def run(self, **options: Any) -> dict[str, Any]:
        """In full."""

    def quick(self) -> dict[str, Any]:
        """Small and short: to see that it runs. A few seconds."""


def benchmark(name: str) -> Benchmark:
    """The module, imported only now: most need less than all of them together."""
    return cast("Benchmark", importlib.import_module(f"benchmarks.{name}"))


def _counts(context: click.Context, option: click.Parameter, told: str | None) -> tuple[int, ...] | None:
    if told is None:
        return None
    try:
        counts = tuple(int(one) for one in told.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise click.BadParameter(f"{told!r}: give numbers above 0, e.g. 1,4,8")
    return counts


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, type=click.Choice(NAMES))
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write all figures here too.")
@click.option("--plot", "plot_dir", type=click.Path(path_type=Path, file_okay=False), help="Draw the pictures of docs/performance.md here.")
@click.option("--concurrency", callback=_counts, metavar="N,N...", help="Of serve and batching: how many clients. Default: each one's own.")
@click.option("--quick", is_flag=True, help="Small and short: to see that it runs, not how fast.")
def main(names: tuple[str, ...], json_file: Path | None, plot_dir: Path | None, concurrency: tuple[int, ...] | None, quick: bool) -> None:
    """Measure against everything else that can be had, in one run, alternating."""
    import torch

    here = machine()
    click.echo(", ".join(f"{key} {value}" for key, value in here.items()))
    if here["load"] > 0.5:
        click.echo(f"other work is running (load {here['load']:.1f}): a spinning benchmark needs its cores to itself", err=True)
    pin(1 - PEER_CPU)
    torch.set_num_threads(1)  # on its one core; so do the peers
    figures: dict[str, Any] = {"machine": here}
    for name in names or NAMES:
        click.echo(f"\n== {name}")
        chosen = benchmark(name)
        options: dict[str, Any] = {"concurrency": concurrency} if concurrency and name in COUNTED else {}
        figures[name] = chosen.quick() if quick else chosen.run(**options)
    if json_file:
        json_file.write_text(json.dumps(figures, indent=2))
    if plot_dir:
        from benchmarks.plot import draw

        for picture in draw(figures, plot_dir):
            click.echo(f"drew {picture}")


if __name__ == "__main__":
    main()
