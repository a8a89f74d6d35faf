"""Two checkouts, measured in turns: ``python -m benchmarks.compare OTHER_CHECKOUT [--names steps,rtt] [--rounds N] [--quick] [--json FILE]``.

Each round runs ``python -m benchmarks NAME`` once in this checkout and once in the other, with this interpreter; who is first changes from round to
round. Both must have their compiled parts built (``python setup.py build_ext --inplace``), or neither. Of two checkouts whose benchmarks measure
something else under one name, nothing is learnt. The floors of ``rtt`` have nothing of either checkout in them: as far as their ratios are from 1, so
far may the others be by chance.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.__main__ import NAMES
from benchmarks.figures import times
from benchmarks.peer import ROOT
from benchmarks.table import Table

Rows = dict[str, float]
"""Times of one run by the name of the row."""

DEFAULT_ROUNDS = 5
BEST = ("steps",)
"""Benchmarks of which the best of all rounds counts: nothing but disturbance makes a step slower. Of others it is the median of the rounds."""

SUBTRACTED = (
    "steps_ns/worker: run an op that does nothing, count",
    "steps_ns/worker: write and publish the completion; client: read it",
    "steps_ns/client: finish the call, count",
    "further_ns/with a second input",
    "further_ns/with a second output",
)
"""Rows of ``steps`` that are the difference of two figures: a disturbance of the smaller one makes them less, so their median counts too."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One row of both."""

    here: float
    there: float
    ratio: float
    """Of this checkout's figure to the other's: below 1 is faster here."""
    rounds: tuple[float, ...]
    """Ratios of the single rounds, least first."""


def summary_of(name: str, row: str) -> Callable[[Sequence[float]], float]:
    """What counts of a row's figures in all rounds."""
    return min if name in BEST and row not in SUBTRACTED else statistics.median


def compare(name: str, here: Sequence[Rows], there: Sequence[Rows]) -> dict[str, Comparison]:
    """The rows that both have, in the order of this checkout's. One item of each sequence for each round."""
    result = {}
    for row in here[0]:
        if row in there[0]:
            summary = summary_of(name, row)
            ours, others = [rows[row] for rows in here], [rows[row] for rows in there]
            if all(others):
                rounds = sorted(one / other for one, other in zip(ours, others, strict=True))
                result[row] = Comparison(summary(ours), summary(others), summary(ours) / summary(others), tuple(rounds))
    return result


def measure(checkout: Path, name: str, quick: bool) -> Rows:
    """One run of one benchmark of a checkout."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "benchmarks", name, "--json", str(file), *(["--quick"] if quick else [])]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise click.ClickException(f"{name} failed in {checkout}:\n{done.stdout}{done.stderr}")
        return times(json.loads(file.read_text())[name])


def compiled(checkout: Path) -> bool:
    """Whether its compiled parts are built."""
    return any((checkout / "shmbroker").rglob("*.so"))


def names_of(_context: click.Context, _parameter: click.Parameter, text: str) -> list[str]:
    """Names with commas between them."""
    names = text.split(",")
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise click.BadParameter(f"there is no {', '.join(unknown)}; there are: {', '.join(NAMES)}")
    return names


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("other", type=click.Path(path_type=Path, exists=True, file_okay=False, resolve_path=True))
@click.option("--names", default="steps,rtt", show_default=True, callback=names_of, help="Which benchmarks.")
@click.option(
    "--rounds", type=click.IntRange(1), default=DEFAULT_ROUNDS, show_default=True, help="Runs of each benchmark in each checkout."
)
@click.option("--quick", is_flag=True, help="The benchmarks' short form.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write all figures of all rounds here too.")
def main(other: Path, names: list[str], rounds: int, quick: bool, json_file: Path | None) -> None:
    """Compare this checkout with OTHER: ratios below 1 are faster here."""
    if not (other / "benchmarks" / "__main__.py").is_file():
        raise click.ClickException(f"{other} is no checkout: it has no benchmarks")
    if compiled(ROOT) != compiled(other):
        raise click.ClickException(f"only {ROOT if compiled(ROOT) else other} has its compiled parts built: build those of both")
    figures: dict[str, dict[str, list[Rows]]] = {}
    for name in names:
        here: list[Rows] = []
        there: list[Rows] = []
        for number in range(rounds):
            click.echo(f"{name}: round {number + 1} of {rounds}", err=True)
            for checkout, into in ((ROOT, here), (other, there))[:: -1 if number % 2 else 1]:
                into.append(measure(checkout, name, quick))
        figures[name] = {"here": here, "there": there}
        show(name, rounds, here, there)
    if json_file:
        json_file.write_text(json.dumps(figures, indent=2))


def show(name: str, rounds: int, here: Sequence[Rows], there: Sequence[Rows]) -> None:
    """Print the ratios, and the rows that only one has."""
    table = Table(
        f"{name}, {'best' if name in BEST else 'median'} of {rounds} rounds", ["", "here", "there", "here / there", "of the rounds"]
    )
    for row, one in compare(name, here, there).items():
        middle = f"{statistics.median(one.rounds):.3f} ({one.rounds[0]:.3f} .. {one.rounds[-1]:.3f})"
        table.row(row, f"{one.here:.2f}", f"{one.there:.2f}", f"{one.ratio:.3f}", middle)
    table.show()
    for side, own, others in (("here", here[0], there[0]), ("there", there[0], here[0])):
        for row in own:
            if row not in others:
                click.echo(f"only {side}: {row}")


if __name__ == "__main__":
    main()
