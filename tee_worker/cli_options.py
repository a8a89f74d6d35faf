"""Options that several commands of ``tee-worker`` have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from shmbroker.settings import DOORBELL_WORDS, LANE_WORDS, OWN_DEFAULTS, TRUST_WORDS, listed
from shmbroker.trust.bits import BITS
from tee_worker.run_options import (
    API_KEY_VARIABLE,
    LONGEST_CONTEXT,
    MOST_AT_ONCE,
    GenerateOptions,
    PrefillOptions,
    RunOptions,
    ServeOptions,
    default_of,
)

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]


def defaulted(kind: type[RunOptions], flag: str, **attributes: Any) -> Decorator:
    """An option with the default of the field of ``kind`` that is named as the flag is; told in the help, unless it is None."""
    default = default_of(kind, flag.partition("/")[0].removeprefix("--").replace("-", "_"))
    return click.option(flag, default=default, show_default=default is not None, **attributes)


def all_of(*options: Decorator) -> Decorator:
    """One decorator of several; the help lists them in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def compute_options(kind: type[RunOptions]) -> Decorator:
    """How this process computes, and how long it lives."""
    return all_of(
        defaulted(kind, "--dtype", help="As the GPU worker's: float32, bfloat16 or float16."),
        defaulted(kind, "--threads", type=click.IntRange(1), help="CPU threads to compute with. Default: torch's own choice."),
        click.option("--until-exit", type=int, default=0, metavar="PID", help="End when this process does."),
    )


def trust_options(kind: type[RunOptions]) -> Decorator:
    """What the GPU worker is trusted with (docs/trust.md)."""
    return all_of(
        defaulted(
            kind,
            "--trust",
            type=click.Choice(TRUST_WORDS),
            help="What the GPU worker is trusted with: everything, to see but not to compute right, or nothing (docs/trust.md).",
        ),
        defaulted(
            kind,
            "--arithmetic",
            type=click.Choice(["exact", "float"]),
            help="At trust verify: on integers, or approximately, on plain's own numbers.",
        ),
        defaulted(
            kind,
            "--bits",
            type=click.Choice([str(bits) for bits in BITS]),
            callback=lambda context, option, value: int(value),
            help="Of a weight, as an integer.",
        ),
        defaulted(kind, "--pads", type=click.IntRange(0), metavar="N", help="At trust blind: tokens to have pads ready for."),
        click.option("--pads-from", metavar="SERVICE", help="At trust blind: a second worker that makes them. Default: this process."),
        click.option("--second", metavar="SERVICE", help="At trust shares: the second worker."),
        click.option(
            "--same-host-shares",
            is_flag=True,
            help="Take two workers on this host for two. It hides nothing from whoever controls the host.",
        ),
        click.option("--model-digest", metavar="DIGEST", help="Of the model, as 'tee-worker digest' printed it; needed above trust plain."),
        defaulted(
            kind,
            "--hide-lengths",
            type=click.IntRange(1),
            metavar="N",
            help="At trust blind and shares: round the rows of each call up to N.",
        ),
    )


def run_options(kind: type[RunOptions], *, peers: bool = True) -> Decorator:
    """What every command takes that runs a split model; defaults are those of ``kind``.

    ``peers``: whether the run goes to a broker that there is, or has one of its own when told so.
    """
    options: tuple[Decorator, ...] = (
        defaulted(
            kind,
            "--split",
            help="What is one call: linear, fused, op, block or layer; or by layer, e.g. fused:0-3,layer:4-29 (docs/threat-model.md).",
        ),
        defaulted(
            kind,
            "--pipeline",
            type=click.IntRange(1),
            metavar="N",
            help="Parts of a pass on their way at once: chunks of a long prompt, micro-batches of several sequences.",
        ),
        *(_peer_options(kind) if peers else ()),
        defaulted(kind, "--service", help="As the GPU worker's."),
        defaulted(kind, "--lane", help=f"What carries the frames: {listed(LANE_WORDS)}."),
        defaulted(kind, "--doorbell", help=f"What wakes a waiting process, on lane shm: {listed(DOORBELL_WORDS)}."),
        defaulted(
            kind,
            "--arena",
            metavar="SIZE",
            help=f"Shared memory for tensors, e.g. 512M. Default: {OWN_DEFAULTS[kind.command]['arena']}.",
        ),
        defaulted(
            kind,
            "--failover",
            type=float,
            help="Seconds to wait for a GPU worker that takes over from one that died; 0: fail.",
        ),
        defaulted(kind, "--timeout", type=float, help="Seconds that one call may take."),
        defaulted(kind, "--spin", type=float, help="Microseconds to look for an answer before sleeping."),
        defaulted(
            kind, "--check/--no-check", help="Compare what the GPU worker gives with known answers, where 'tee-worker check' left some."
        ),
        click.option("--answers", metavar="FILE", help="Known answers. Default: beside the model, if they are there."),
        trust_options(kind),
        *(_trace_options(kind) if peers else ()),
        compute_options(kind),
    )
    return all_of(*options)


def _peer_options(kind: type[RunOptions]) -> tuple[Decorator, ...]:
    return (
        click.option("--local", is_flag=True, help="Start a broker and a GPU worker for this run alone."),
        defaulted(kind, "--instance", metavar="NAME", help="Which broker. Default: $SHMBROKER_INSTANCE, else 'default'."),
    )


def _trace_options(kind: type[RunOptions]) -> tuple[Decorator, ...]:
    return (defaulted(kind, "--trace", metavar="FILE", help="Write a trace of every call, for ui.perfetto.dev (docs/traces.md)."),)


model_option = click.option("--model", required=True, metavar="DIR", help="Folder of a Hugging Face checkpoint, or a GGUF file.")
json_option = click.option("--json", "as_json", is_flag=True, help="For programs.")
text_options = all_of(
    click.option("--quiet", is_flag=True, help="Nothing on standard error but warnings and errors."),
    click.option("--json", "as_json", is_flag=True, help="For programs: the outcome on standard output, the text on standard error."),
)

prompt_options = all_of(
    model_option,
    click.option("--prompt", required=True, help="What to go on from."),
    click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template."),
    defaulted(GenerateOptions, "--max-new-tokens", type=click.IntRange(1)),
)

source_options = all_of(
    click.option("--model", metavar="DIR", help="Folder of a Hugging Face checkpoint, or a GGUF file."),
    click.option("--shape", metavar="NAME", help="A known shape instead, e.g. llama-3.2-1b, with random weights."),
    defaulted(PrefillOptions, "--tokens", type=click.IntRange(1), help="Tokens of the prompt."),
)


def serve_options(kind: type[ServeOptions]) -> Decorator:
    """What is served, and to whom."""
    return all_of(
        defaulted(kind, "--host", help="Where to listen: this machine's loopback alone."),
        defaulted(kind, "--port", type=click.IntRange(0, 65535), help="0: any free one."),
        defaulted(kind, "--served-model-name", metavar="NAME", help="What requests call the model. Default: its folder's name."),
        defaulted(
            kind,
            "--max-context",
            type=int,
            metavar="TOKENS",
            help=f"Longest prompt and answer together. Default: the model's, {LONGEST_CONTEXT} at most.",
        ),
        defaulted(
            kind,
            "--max-concurrency",
            type=click.IntRange(1),
            metavar="N",
            help=f"Sequences computed at once. Default: {MOST_AT_ONCE}, or 1 where the split or the model does not allow it.",
        ),
        defaulted(
            kind,
            "--api-key",
            envvar=API_KEY_VARIABLE,
            metavar="KEY",
            help="That requests must carry, but for /health. In $SHMBROKER_API_KEY it is in no list of processes.",
        ),
    )
