"""The ``tee-worker`` command."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from typing import Any

import click

from shmbroker import console
from shmbroker.settings import default_for
from shmbroker.version import __version__
from tee_worker.cli_options import (
    compute_options,
    defaulted,
    json_option,
    model_option,
    prompt_options,
    run_options,
    serve_options,
    source_options,
    text_options,
)
from tee_worker.run_options import GenerateOptions, PrefillOptions, RunOptions, ServeOptions
from tee_worker.scale_out.command import ray


@click.group(cls=console.Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--log-level", type=click.Choice(console.LEVELS), default=default_for("tee-worker", "log_level"), show_default=True)
def cli(log_level: str) -> None:
    """Run a Hugging Face model whose heavy modules are computed by a GPU worker."""
    console.set_up_logging(log_level)


# --- commands ---------------------------------------------------------------------------------------------------------------------------


@cli.command()
@prompt_options
@run_options(GenerateOptions)
@text_options
def generate(as_json: bool, quiet: bool, until_exit: int, **options: Any) -> None:
    """Generate text, on standard output as it comes; what goes on, and the report, on standard error."""
    _begin(until_exit)
    from tee_worker import generate as generation

    outcome = generation.generate(GenerateOptions(**options), _text_printer(as_json, quiet), _note_printer(quiet))
    _finish(outcome, as_json, quiet, outcome.report.render(), generation.summary(outcome))


@cli.command()
@prompt_options
@compute_options(GenerateOptions)
@text_options
def reference(as_json: bool, quiet: bool, until_exit: int, **options: Any) -> None:
    """Generate with the same model in this process alone, to compare with; printed as 'generate' does."""
    _begin(until_exit)
    from tee_worker import generate as generation

    outcome = generation.reference(GenerateOptions(**options), _text_printer(as_json, quiet), _note_printer(quiet))
    _finish(outcome, as_json, quiet, generation.reference_summary(outcome))


def _text_printer(as_json: bool, quiet: bool) -> Callable[[str], None] | None:
    """For the text as it comes: on standard output, which is the outcome's where that is printed."""
    if as_json and quiet:
        return None
    return lambda text: click.echo(text, nl=False, err=as_json)


def _note_printer(quiet: bool) -> Callable[[str], None]:
    """For what goes on meanwhile."""
    return (lambda note: None) if quiet else (lambda note: click.echo(note, err=True))


def _finish(outcome: Any, as_json: bool, quiet: bool, *told: Any) -> None:
    """End the text, and print the outcome: for programs, or what is ``told`` of it."""
    import msgspec

    if not (as_json and quiet):
        click.echo(err=as_json)
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(outcome)))
    elif not quiet:
        terminal = console.terminal(stderr=True)
        terminal.print()
        for part in told:
            terminal.print(part, highlight=False, soft_wrap=isinstance(part, str))


@cli.command()
@source_options
@defaulted(RunOptions, "--dtype", help="float32, bfloat16 or float16.")
@click.option("--new-tokens", type=click.IntRange(1), default=1, show_default=True, help="Tokens to generate; 1 is the prefill alone.")
@defaulted(RunOptions, "--pipeline", type=click.IntRange(1), metavar="N", help="Parts of a pass on their way at once.")
@click.option("--split", "detailed", metavar="SPLIT", help="Tell module by module where it runs at this split.")
@json_option
def plan(
    model: str | None, shape: str | None, tokens: int, dtype: str, as_json: bool, new_tokens: int, pipeline: int, detailed: str | None
) -> None:
    """Tell calls, bytes each way, the largest block and the arena of every split, without running anything."""
    import msgspec

    from shmbroker.models import model_dtype, model_source
    from tee_worker.planning import plan as planning
    from tee_worker.planning.splits import Splits

    _quiet_transformers()
    wanted = None if detailed is None else Splits.named(detailed)
    source = model_source(model, shape, 0)
    made = planning.plan(source, model_dtype(dtype), prompt_tokens=tokens, new_tokens=new_tokens, split=wanted, pipeline=pipeline)
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(made)))
        return
    terminal = console.terminal()
    terminal.print(made.render(), highlight=False, width=min(terminal.width, planning.COLUMNS))


@cli.command()
@source_options
@defaulted(PrefillOptions, "--seed", type=int, help="Of the random weights, and of the prompt.")
@click.option("--compare", is_flag=True, help="Also in this process alone, with the largest difference of the logits.")
@run_options(PrefillOptions)
@json_option
def prefill(as_json: bool, until_exit: int, **options: Any) -> None:
    """Measure one prefill, and tell it beside the prototype's figures.

    Where no broker is named and none runs, it is as if --local were given.
    """
    _begin(until_exit)
    import msgspec

    from tee_worker import prefill as measuring

    outcome = measuring.prefill(PrefillOptions(**options), _note_printer(quiet=False))
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(outcome)))
        return
    terminal = console.terminal()
    terminal.print(outcome.render(), highlight=False)


@cli.command()
@model_option
@defaulted(RunOptions, "--dtype", help="As the run's.")
def digest(model: str, dtype: str) -> None:
    """Print the digest of a model: of its configuration and of every number in it, SHA-256.

    Run it where you trust the files; above --trust plain the other commands compare what they have loaded with it (--model-digest).
    """
    _quiet_transformers()
    from shmbroker.models import Checkpoint, model_digest, model_dtype

    click.echo(model_digest(Checkpoint.at(model).model(model_dtype(dtype))))


@cli.command("demo-trust")
@click.option("--model", metavar="DIR", help="Folder of a Hugging Face checkpoint, or a GGUF file. Default: the embedded model.")
@click.option("--prompt", help="The secret.  [default: a name and an address]")
@click.option("--max-new-tokens", type=click.IntRange(1), default=8, show_default=True)
@json_option
def demo_trust(model: str | None, prompt: str | None, max_new_tokens: int, as_json: bool) -> None:
    """Show what --trust is for: what a worker reads at each mode, and whether its lie is noticed. About two minutes."""
    _begin(0)
    import msgspec

    from shmbroker.models import embedded
    from tee_worker.trust.demonstration import PROMPT, demonstrate

    outcome = demonstrate(model or str(embedded.ensure()), prompt or PROMPT, max_new_tokens, lambda line: click.echo(line, err=as_json))
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(outcome)))


@cli.command("check")
@model_option
@click.option("--answers", metavar="FILE", help="Where to write them. Default: beside the model, where the other commands look.")
def check_command(model: str, answers: str | None) -> None:
    """Record what the modules of a checkpoint give for fixed inputs, layer by layer.

    The other commands then compare the GPU worker's answers with these before the first token. Needs the whole checkpoint, of which it loads one layer
    at a time; the run itself does not.
    """
    _quiet_transformers()
    from pathlib import Path

    from shmbroker.models import Checkpoint
    from shmbroker.models.answers import answers_file, record, write_answers

    checkpoint = Checkpoint.at(model)
    file = Path(answers) if answers else answers_file(checkpoint)
    with click.progressbar(length=0, label="recording", file=sys.stderr) as bar:

        def on_part(part: int, parts: int) -> None:
            bar.length = parts
            bar.update(1)

        found = record(checkpoint, on_part)
    write_answers(file, found)
    click.echo(f"{len(found.answers)} known answers of {found.model} in {file}")


@cli.command()
@model_option
@serve_options(ServeOptions)
@run_options(ServeOptions)
def serve(until_exit: int, **options: Any) -> None:
    """Answer OpenAI-compatible HTTP requests until SIGTERM."""
    _begin(until_exit)
    from shmbroker.systemd import notify
    from tee_worker.serving import serve as serving

    serving.serve(ServeOptions(**options), notify.ready, notify.watchdog, _note_printer(quiet=False))


cli.add_command(ray)


def _begin(until_exit: int) -> None:
    """What is done before torch is loaded. After it, SIGTERM leaves every with-block on the way: the segment is given back, own peers are ended."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    console.share_cpus()
    console.end_with(until_exit)
    _quiet_transformers()


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
