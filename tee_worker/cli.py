"""The ``tee-worker`` command."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

from shmbroker import console
from shmbroker.settings.kinds import DOORBELL_WORDS, LANE_WORDS, listed
from shmbroker.settings.schema import DEFAULTS, OWN_DEFAULTS
from shmbroker.version import __version__

Command = TypeVar("Command", bound=Callable[..., Any])
_GENERATE = OWN_DEFAULTS["tee-worker generate"]
_PREFILL = OWN_DEFAULTS["tee-worker prefill"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--log-level", type=click.Choice(console.LEVELS), default=OWN_DEFAULTS["tee-worker"]["log_level"], show_default=True)
def cli(log_level: str) -> None:
    """Run a Hugging Face model whose heavy modules are computed by a GPU worker."""
    console.set_up_logging(log_level)


_SPLIT_HELP = "What is one call: linear, fused, op, block or layer; or by layer, e.g. fused:0-3,layer:4-29 (docs/threat-model.md)."

_pipeline_option = click.option(
    "--pipeline",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Parts of a pass on their way at once: chunks of a long prompt, micro-batches of several sequences.",
)


_trace_option = click.option("--trace", metavar="FILE", help="Write a trace of every call, for ui.perfetto.dev (docs/traces.md).")


def _model_options(command: Command) -> Command:
    for option in reversed(
        [
            click.option("--model", required=True, metavar="DIR", help="Folder of a Hugging Face checkpoint, or a GGUF file."),
            click.option("--prompt", required=True, help="What to go on from."),
            click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template."),
            click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True),
            click.option("--dtype", default=DEFAULTS.dtype, show_default=True, help="As the GPU worker's: float32, bfloat16 or float16."),
            click.option("--threads", type=click.IntRange(1), help="CPU threads to compute with. Default: torch's own choice."),
            click.option("--until-exit", type=int, default=0, metavar="PID", help="End when this process does."),
            click.option("--json", "as_json", is_flag=True, help="For programs."),
        ]
    ):
        command = option(command)
    return command


@cli.command()
@_model_options
@click.option("--split", default=DEFAULTS.split, show_default=True, help=_SPLIT_HELP)
@_pipeline_option
@click.option("--instance", metavar="NAME", help="Which broker. Default: $SHMBROKER_INSTANCE, else 'default'.")
@click.option("--service", default=DEFAULTS.service, show_default=True, help="As the GPU worker's.")
@click.option("--lane", default=DEFAULTS.lane, show_default=True, help=f"What carries the frames: {listed(LANE_WORDS)}.")
@click.option(
    "--doorbell", default=DEFAULTS.doorbell, show_default=True, help=f"What wakes a waiting process, on lane shm: {listed(DOORBELL_WORDS)}."
)
@click.option("--arena", metavar="SIZE", help="Shared memory for tensors, e.g. 512M. Default: what the run needs.")
@click.option(
    "--failover",
    type=float,
    default=DEFAULTS.failover,
    show_default=True,
    help="Seconds to wait for a GPU worker that takes over from one that died; 0: fail.",
)
@click.option("--timeout", type=float, default=_GENERATE["timeout"], show_default=True, help="Seconds that one call may take.")
@click.option("--spin", type=float, default=DEFAULTS.spin, show_default=True, help="Microseconds to look for an answer before sleeping.")
@_trace_option
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


_source_options = (
    click.option("--model", metavar="DIR", help="Folder of a Hugging Face checkpoint, or a GGUF file."),
    click.option("--shape", metavar="NAME", help="A known shape instead, e.g. llama-3.2-1b, with random weights."),
    click.option("--tokens", type=click.IntRange(1), default=1024, show_default=True, help="Tokens of the prompt."),
    click.option("--dtype", default=DEFAULTS.dtype, show_default=True, help="float32, bfloat16 or float16."),
    click.option("--json", "as_json", is_flag=True, help="For programs."),
)


def _with_source(command: Command) -> Command:
    for option in reversed(_source_options):
        command = option(command)
    return command


@cli.command()
@_with_source
@click.option("--new-tokens", type=click.IntRange(1), default=1, show_default=True, help="Tokens to generate; 1 is the prefill alone.")
@click.option("--split", "detailed", metavar="SPLIT", help="Tell module by module where it runs at this split.")
def plan(model: str | None, shape: str | None, tokens: int, dtype: str, as_json: bool, new_tokens: int, detailed: str | None) -> None:
    """Tell calls, bytes each way and the largest block of every split, without running anything."""
    import msgspec

    from shmbroker.models.checkpoint import model_dtype
    from shmbroker.models.source import model_source
    from tee_worker.planning import plan as planning
    from tee_worker.planning.splits import Splits

    _quiet_transformers()
    wanted = None if detailed is None else Splits.named(detailed)
    made = planning.plan(model_source(model, shape, 0), model_dtype(dtype), prompt_tokens=tokens, new_tokens=new_tokens, split=wanted)
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(made)))
        return
    terminal = console.terminal()
    terminal.print(
        f"{made.model}, {made.dtype}, {tokens} tokens and {new_tokens} new: what the TEE worker sends and receives", highlight=False
    )
    terminal.print(made.render())


@cli.command()
@_with_source
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random weights, and of the prompt.")
@click.option("--split", default=_PREFILL["split"], show_default=True, help=_SPLIT_HELP)
@_pipeline_option
@click.option("--compare", is_flag=True, help="Also in this process alone, with the largest difference of the logits.")
@click.option(
    "--instance", metavar="NAME", help="Which broker. Default: $SHMBROKER_INSTANCE, else 'default'; if none runs, one is started."
)
@click.option("--service", default=DEFAULTS.service, show_default=True, help="As the GPU worker's.")
@click.option("--lane", default=DEFAULTS.lane, show_default=True, help=f"What carries the frames: {listed(LANE_WORDS)}.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads to compute with. Default: torch's own choice.")
@click.option("--timeout", type=float, default=_PREFILL["timeout"], show_default=True, help="Seconds that one call may take.")
@_trace_option
def prefill(as_json: bool, **options: Any) -> None:
    """Measure one prefill, and tell it beside the prototype's figures."""
    console.share_cpus()
    import msgspec

    from tee_worker import prefill as measuring

    _quiet_transformers()
    outcome = measuring.prefill(measuring.Options(**options), lambda note: click.echo(note, err=True))
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(outcome)))
        return
    terminal = console.terminal()
    terminal.print(outcome.render(), highlight=False)


@cli.command()
@click.option("--model", required=True, metavar="DIR", help="Folder of a Hugging Face checkpoint, or a GGUF file.")
@click.option("--split", default="fused", show_default=True, help=_SPLIT_HELP)
@_pipeline_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen: this machine's loopback alone.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one.")
@click.option("--served-model-name", metavar="NAME", help="What requests call the model. Default: its folder's name.")
@click.option("--max-context", type=int, metavar="TOKENS", help="Longest prompt and answer together. Default: the model's, 4096 at most.")
@click.option("--instance", metavar="NAME", help="Which broker. Default: $SHMBROKER_INSTANCE, else 'default'.")
@click.option("--service", default="gpu", show_default=True, help="As the GPU worker's.")
@click.option("--dtype", default="float32", show_default=True, help="As the GPU worker's: float32, bfloat16 or float16.")
@click.option("--lane", default="auto", show_default=True, help=f"What carries the frames: {listed(LANE_WORDS)}.")
@click.option("--arena", metavar="SIZE", help="Shared memory for tensors, e.g. 512M. Default: what the longest context needs.")
@click.option(
    "--failover",
    type=float,
    default=30.0,
    show_default=True,
    help="Seconds that a request waits for a GPU worker that takes over; 0: fail.",
)
@click.option("--timeout", type=float, default=60.0, show_default=True, help="Seconds that one call may take.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads to compute with. Default: torch's own choice.")
@click.option("--until-exit", type=int, default=0, metavar="PID", help="End when this process does.")
@_trace_option
def serve(until_exit: int, **options: Any) -> None:
    """Answer OpenAI-compatible HTTP requests until SIGTERM."""
    console.share_cpus()
    console.end_with(until_exit)
    from shmbroker.systemd import notify
    from tee_worker.serving import serve as serving

    _quiet_transformers()
    serving.serve(serving.Options(**options), notify.ready, notify.watchdog)


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
