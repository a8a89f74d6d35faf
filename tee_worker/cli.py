"""The ``tee-worker`` command."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from typing import Any

import click

from shmbroker import console
from shmbroker.settings import DOORBELL_WORDS, LANE_WORDS, OWN_DEFAULTS, TRUST_WORDS, default_for, listed
from shmbroker.trust.bits import BITS
from shmbroker.version import __version__
from tee_worker.run_options import LONGEST_CONTEXT, MOST_AT_ONCE, GenerateOptions, PrefillOptions, RunOptions, ServeOptions, default_of

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]


@click.group(cls=console.Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--log-level", type=click.Choice(console.LEVELS), default=default_for("tee-worker", "log_level"), show_default=True)
def cli(log_level: str) -> None:
    """Run a Hugging Face model whose heavy modules are computed by a GPU worker."""
    console.set_up_logging(log_level)


# --- options ----------------------------------------------------------------------------------------------------------------------------


def _defaulted(kind: type[RunOptions], flag: str, **attributes: Any) -> Decorator:
    """An option with the default of the field of ``kind`` that is named as the flag is; told in the help, unless it is None."""
    default = default_of(kind, flag.partition("/")[0].removeprefix("--").replace("-", "_"))
    return click.option(flag, default=default, show_default=default is not None, **attributes)


def _all(*options: Decorator) -> Decorator:
    """One decorator of several; the help lists them in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _compute_options(kind: type[RunOptions]) -> Decorator:
    """How this process computes, and how long it lives."""
    return _all(
        _defaulted(kind, "--dtype", help="As the GPU worker's: float32, bfloat16 or float16."),
        _defaulted(kind, "--threads", type=click.IntRange(1), help="CPU threads to compute with. Default: torch's own choice."),
        click.option("--until-exit", type=int, default=0, metavar="PID", help="End when this process does."),
    )


def trust_options(kind: type[RunOptions]) -> Decorator:
    """What the GPU worker is trusted with (docs/trust.md)."""
    return _all(
        _defaulted(
            kind,
            "--trust",
            type=click.Choice(TRUST_WORDS),
            help="What the GPU worker is trusted with: everything, to see but not to compute right, or nothing (docs/trust.md).",
        ),
        _defaulted(
            kind,
            "--arithmetic",
            type=click.Choice(["exact", "float"]),
            help="At trust verify: on integers, or approximately, on plain's own numbers.",
        ),
        _defaulted(
            kind,
            "--bits",
            type=click.Choice([str(bits) for bits in BITS]),
            callback=lambda context, option, value: int(value),
            help="Of a weight, as an integer.",
        ),
        _defaulted(kind, "--pads", type=click.IntRange(0), metavar="N", help="At trust blind: tokens to have pads ready for."),
        click.option("--pads-from", metavar="SERVICE", help="At trust blind: a second worker that makes them. Default: this process."),
        click.option("--second", metavar="SERVICE", help="At trust shares: the second worker."),
        click.option(
            "--same-host-shares",
            is_flag=True,
            help="Take two workers on this host for two. It hides nothing from whoever controls the host.",
        ),
        click.option("--model-digest", metavar="DIGEST", help="Of the model, as 'tee-worker digest' printed it; needed above trust plain."),
        _defaulted(
            kind,
            "--hide-lengths",
            type=click.IntRange(1),
            metavar="N",
            help="At trust blind and shares: round the rows of each call up to N.",
        ),
    )


def run_options(kind: type[RunOptions]) -> Decorator:
    """What every command takes that runs a split model; defaults are those of ``kind``."""
    return _all(
        _defaulted(
            kind,
            "--split",
            help="What is one call: linear, fused, op, block or layer; or by layer, e.g. fused:0-3,layer:4-29 (docs/threat-model.md).",
        ),
        _defaulted(
            kind,
            "--pipeline",
            type=click.IntRange(1),
            metavar="N",
            help="Parts of a pass on their way at once: chunks of a long prompt, micro-batches of several sequences.",
        ),
        click.option("--local", is_flag=True, help="Start a broker and a GPU worker for this run alone."),
        _defaulted(kind, "--instance", metavar="NAME", help="Which broker. Default: $SHMBROKER_INSTANCE, else 'default'."),
        _defaulted(kind, "--service", help="As the GPU worker's."),
        _defaulted(kind, "--lane", help=f"What carries the frames: {listed(LANE_WORDS)}."),
        _defaulted(kind, "--doorbell", help=f"What wakes a waiting process, on lane shm: {listed(DOORBELL_WORDS)}."),
        _defaulted(
            kind,
            "--arena",
            metavar="SIZE",
            help=f"Shared memory for tensors, e.g. 512M. Default: {OWN_DEFAULTS[kind.command]['arena']}.",
        ),
        _defaulted(
            kind,
            "--failover",
            type=float,
            help="Seconds to wait for a GPU worker that takes over from one that died; 0: fail.",
        ),
        _defaulted(kind, "--timeout", type=float, help="Seconds that one call may take."),
        _defaulted(kind, "--spin", type=float, help="Microseconds to look for an answer before sleeping."),
        _defaulted(
            kind, "--check/--no-check", help="Compare what the GPU worker gives with known answers, where 'tee-worker check' left some."
        ),
        click.option("--answers", metavar="FILE", help="Known answers. Default: beside the model, if they are there."),
        trust_options(kind),
        _defaulted(kind, "--trace", metavar="FILE", help="Write a trace of every call, for ui.perfetto.dev (docs/traces.md)."),
        _compute_options(kind),
    )


_model_option = click.option("--model", required=True, metavar="DIR", help="Folder of a Hugging Face checkpoint, or a GGUF file.")
_json_option = click.option("--json", "as_json", is_flag=True, help="For programs.")
_text_options = _all(
    click.option("--quiet", is_flag=True, help="Nothing on standard error but warnings and errors."),
    click.option("--json", "as_json", is_flag=True, help="For programs: the outcome on standard output, the text on standard error."),
)

_prompt_options = _all(
    _model_option,
    click.option("--prompt", required=True, help="What to go on from."),
    click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template."),
    _defaulted(GenerateOptions, "--max-new-tokens", type=click.IntRange(1)),
)

_source_options = _all(
    click.option("--model", metavar="DIR", help="Folder of a Hugging Face checkpoint, or a GGUF file."),
    click.option("--shape", metavar="NAME", help="A known shape instead, e.g. llama-3.2-1b, with random weights."),
    _defaulted(PrefillOptions, "--tokens", type=click.IntRange(1), help="Tokens of the prompt."),
)


# --- commands ---------------------------------------------------------------------------------------------------------------------------


@cli.command()
@_prompt_options
@run_options(GenerateOptions)
@_text_options
def generate(as_json: bool, quiet: bool, until_exit: int, **options: Any) -> None:
    """Generate text, on standard output as it comes; what goes on, and the report, on standard error."""
    _begin(until_exit)
    from tee_worker import generate as generation

    outcome = generation.generate(GenerateOptions(**options), _text_printer(as_json, quiet), _note_printer(quiet))
    _finish(outcome, as_json, quiet, outcome.report.render(), generation.summary(outcome))


@cli.command()
@_prompt_options
@_compute_options(GenerateOptions)
@_text_options
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
@_source_options
@_defaulted(RunOptions, "--dtype", help="float32, bfloat16 or float16.")
@click.option("--new-tokens", type=click.IntRange(1), default=1, show_default=True, help="Tokens to generate; 1 is the prefill alone.")
@_defaulted(RunOptions, "--pipeline", type=click.IntRange(1), metavar="N", help="Parts of a pass on their way at once.")
@click.option("--split", "detailed", metavar="SPLIT", help="Tell module by module where it runs at this split.")
@_json_option
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
@_source_options
@_defaulted(PrefillOptions, "--seed", type=int, help="Of the random weights, and of the prompt.")
@click.option("--compare", is_flag=True, help="Also in this process alone, with the largest difference of the logits.")
@run_options(PrefillOptions)
@_json_option
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
@_model_option
@_defaulted(RunOptions, "--dtype", help="As the run's.")
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
@_json_option
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
@_model_option
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
@_model_option
@_defaulted(ServeOptions, "--host", help="Where to listen: this machine's loopback alone.")
@_defaulted(ServeOptions, "--port", type=click.IntRange(0, 65535), help="0: any free one.")
@_defaulted(ServeOptions, "--served-model-name", metavar="NAME", help="What requests call the model. Default: its folder's name.")
@_defaulted(
    ServeOptions,
    "--max-context",
    type=int,
    metavar="TOKENS",
    help=f"Longest prompt and answer together. Default: the model's, {LONGEST_CONTEXT} at most.",
)
@_defaulted(
    ServeOptions,
    "--max-concurrency",
    type=click.IntRange(1),
    metavar="N",
    help=f"Sequences computed at once. Default: {MOST_AT_ONCE}, or 1 where the split or the model does not allow it.",
)
@_defaulted(
    ServeOptions,
    "--api-key",
    envvar="SHMBROKER_API_KEY",
    metavar="KEY",
    help="That requests must carry, but for /health. In $SHMBROKER_API_KEY it is in no list of processes.",
)
@run_options(ServeOptions)
def serve(until_exit: int, **options: Any) -> None:
    """Answer OpenAI-compatible HTTP requests until SIGTERM."""
    _begin(until_exit)
    from shmbroker.systemd import notify
    from tee_worker.serving import serve as serving

    serving.serve(ServeOptions(**options), notify.ready, notify.watchdog, _note_printer(quiet=False))


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
