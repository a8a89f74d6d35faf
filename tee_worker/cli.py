"""The ``tee-worker`` command."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

from shmbroker import __version__, console

Command = TypeVar("Command", bound=Callable[..., Any])


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--log-level", type=click.Choice(console.LEVELS), default="warning", show_default=True)
def cli(log_level: str) -> None:
    """Run a Hugging Face model whose heavy modules are computed by a GPU worker."""
    console.set_up_logging(log_level)


def _model_options(command: Command) -> Command:
    for option in reversed(
        [
            click.option("--model", required=True, metavar="DIR", help="Folder of a Hugging Face checkpoint, or a GGUF file."),
            click.option("--prompt", required=True, help="What to go on from."),
            click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template."),
            click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True),
            click.option("--dtype", default="float32", show_default=True, help="As the GPU worker's: float32, bfloat16 or float16."),
            click.option("--threads", type=click.IntRange(1), help="CPU threads to compute with. Default: torch's own choice."),
            click.option("--until-exit", type=int, default=0, metavar="PID", help="End when this process does."),
            click.option("--json", "as_json", is_flag=True, help="For programs."),
        ]
    ):
        command = option(command)
    return command


@cli.command()
@_model_options
@click.option("--split", default="fused", show_default=True, help="What is one call: linear, fused or op (docs/threat-model.md).")
@click.option("--instance", metavar="NAME", help="Which broker. Default: $SHMBROKER_INSTANCE, else 'default'.")
@click.option("--service", default="gpu", show_default=True, help="As the GPU worker's.")
@click.option("--lane", default="auto", show_default=True, help="What carries the frames: auto, shm or zmq.")
@click.option("--doorbell", default="auto", show_default=True, help="What wakes a waiting process, on lane shm: auto, sem or poll.")
@click.option("--arena", metavar="SIZE", help="Shared memory for tensors, e.g. 512M. Default: what the run needs.")
@click.option(
    "--failover",
    type=float,
    default=30.0,
    show_default=True,
    help="Seconds to wait for a GPU worker that takes over from one that died; 0: fail.",
)
@click.option("--timeout", type=float, default=60.0, show_default=True, help="Seconds that one call may take.")
@click.option("--spin", type=float, default=50.0, show_default=True, help="Microseconds to look for an answer before sleeping.")
def generate(spin: float, as_json: bool, until_exit: int, **options: Any) -> None:
    """Generate text; stream it as it comes, then print the report."""
    console.share_cpus()
    console.end_with(until_exit)
    import msgspec

    from tee_worker import generate as generation

    _quiet_transformers()
    outcome = generation.generate(
        generation.Options(**options, spin=spin * 1e-6),
        None if as_json else lambda text: click.echo(text, nl=False),
        lambda note: click.echo(note, err=True),
    )
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(outcome)))
        return
    terminal = console.terminal()
    terminal.print("\n")
    terminal.print(outcome.report.render())
    terminal.print(generation.summary(outcome), soft_wrap=True, highlight=False)


@cli.command()
@_model_options
def reference(as_json: bool, until_exit: int, **options: Any) -> None:
    """Generate with the same model in this process alone, to compare with."""
    console.share_cpus()
    console.end_with(until_exit)
    from tee_worker import generate as generation

    _quiet_transformers()
    chosen = generation.Options(**options)
    tokens = generation.reference(chosen)
    click.echo(json.dumps({"tokens": tokens}) if as_json else " ".join(map(str, tokens)))


def _quiet_transformers() -> None:
    """Its advice on flags and its progress bars are not for the user of this command."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def main() -> None:
    """Entry point of the console script."""
    console.run(cli)


if __name__ == "__main__":
    main()
