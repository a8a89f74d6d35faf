"""The ``gpu-worker`` command."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from shmbroker import console
from shmbroker.errors import BadInput
from shmbroker.settings import DEFAULTS
from shmbroker.version import __version__


@click.group(cls=console.Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--log-level", type=click.Choice(console.LEVELS), default=DEFAULTS.log_level, show_default=True)
def cli(log_level: str) -> None:
    """Hold a model's weights and compute for TEE workers."""
    console.set_up_logging(log_level)


def _weights(context: click.Context, option: click.Parameter, told: tuple[str, ...]) -> dict[str, float]:
    weights = {}
    for text in told:
        name, _, weight = text.rpartition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            weights[name] = 0.0
        if not name or not 0 < weights[name] < math.inf:
            raise click.BadParameter(f"{text!r}: give a client's name and a number above 0, e.g. chat=2")
    return weights


def _serve_options(command: Callable[..., None]) -> Callable[..., None]:
    """Of a worker, whatever it does."""
    for option in reversed(
        [
            click.option("--model", "model", metavar="DIR", help="Folder of a Hugging Face checkpoint (safetensors), or a GGUF file."),
            click.option("--shape", metavar="NAME", help="Random weights of a known shape instead, e.g. llama-3.2-1b: for measuring."),
            click.option("--seed", type=int, default=0, show_default=True, help="Of --shape's random weights."),
            click.option("--device", default=DEFAULTS.device, show_default=True, help="cpu, cuda or cuda:N."),
            click.option("--dtype", default=DEFAULTS.dtype, show_default=True, help="float32, bfloat16 or float16."),
            click.option("--service", default=DEFAULTS.service, show_default=True, help="What TEE workers ask for."),
            click.option("--instance", metavar="NAME", help="Which broker. Default: $SHMBROKER_INSTANCE, else 'default'."),
            click.option("--name", help="For status and messages."),
            click.option("--threads", type=click.IntRange(1), help="CPU threads to compute with. Default: torch's own choice."),
            click.option(
                "--spin",
                type=float,
                default=DEFAULTS.spin,
                show_default=True,
                help="Microseconds to look for the next call before sleeping.",
            ),
            click.option("--max-channels", type=click.IntRange(1), metavar="N", help="Refuse more. Default: no limit."),
            click.option(
                "--max-waiting-rows",
                type=click.IntRange(1),
                metavar="N",
                help="While more wait, refuse further calls of clients that have some waiting. Default: no limit.",
            ),
            click.option(
                "--weight",
                "client_weights",
                multiple=True,
                callback=_weights,
                metavar="NAME=W",
                help="Clients of this name have W times the time that others have, while both wait. May be given again.",
            ),
            click.option(
                "--batch",
                is_flag=False,
                flag_value="user",
                type=click.Choice(["user", "all"]),
                help="Compute decode steps of several clients together where that takes less time: of one user's, as it is without a word, or of all.",
            ),
            click.option("--trace", metavar="FILE", help="Write a trace of every call, for ui.perfetto.dev (docs/traces.md)."),
            click.option("--until-exit", type=int, default=0, metavar="PID", help="End when this process does."),
        ]
    ):
        command = option(command)
    return command


@cli.command()
@_serve_options
def serve(spin: float, **options: Any) -> None:
    """Load the weights, join the broker and serve until SIGTERM."""
    console.share_cpus()
    from gpu_worker.serve import serve as run

    run(spin=spin * 1e-6, **options)


@cli.command()
@_serve_options
@click.option("--read", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write what it can tell of prompts.")
@click.option("--lie", type=click.Choice(["change", "swap", "stale", "other", "rewrite"]), help="What it does to one result.")
@click.option("--lie-at", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Which one, by its number.")
def misbehave(spin: float, read: Path | None, lie: str | None, lie_at: int, **options: Any) -> None:
    """Serve as a worker does that is not to be trusted: to try out what --trust of tee-worker is for."""
    if options["device"] != "cpu":
        raise BadInput(f"a worker that misbehaves computes on the CPU: leave --device {options['device']} out, and unset the setting")
    console.share_cpus()
    from gpu_worker.misbehaving import Lie, MisbehavingDevice
    from gpu_worker.serve import serve as run

    run(spin=spin * 1e-6, misbehaving=MisbehavingDevice(read, None if lie is None else Lie(lie), lie_at), **options)


def main() -> None:
    """Entry point of the console script."""
    console.run(cli)


if __name__ == "__main__":
    main()
