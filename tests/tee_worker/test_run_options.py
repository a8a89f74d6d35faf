"""``generate``, ``prefill`` and ``serve`` take the same run options, and every default is the settings'."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
import torch

from shmbroker.client import FailoverChannel
from shmbroker.models.checkpoint import Checkpoint
from shmbroker.settings.schema import OWN_DEFAULTS, Settings, default_for
from tee_worker.analytic import compare
from tee_worker.cli import cli
from tee_worker.prefill import prefill
from tee_worker.run_options import GenerateOptions, PrefillOptions, RunOptions, ServeOptions
from tee_worker.split_run import channel_as_asked, split_run
from tests.processes import run

COMMANDS = {"generate": GenerateOptions, "prefill": PrefillOptions, "serve": ServeOptions}
NEEDED = {"generate": {"model": "m", "prompt": "p"}, "prefill": {}, "serve": {"model": "m"}}
OF_THE_COMMAND_LINE = {"until_exit", "as_json", "quiet"}
RUN = set(RunOptions.__struct_fields__)
SETTINGS = RUN & set(Settings.__struct_fields__)
FOUND_LATER = {"instance", "arena"}
"""What stays unset until the run: where the broker is, and how much the run needs."""


def options(command: str) -> dict[str, click.Option]:
    return {str(one.name): one for one in cli.commands[command].params if isinstance(one, click.Option)}


def given_nothing(command: str) -> dict[str, Any]:
    """What the command is called with."""
    words = [word for name, value in NEEDED[command].items() for word in (f"--{name}", value)]
    above = click.Context(cli, **cli.context_settings)  # click keeps the help option that a command's first context has asked for
    return cli.commands[command].make_context(command, words, parent=above).params


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_takes_every_run_option(command: str) -> None:
    assert {*RUN, "until_exit"} <= set(options(command))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", sorted({*RUN, "until_exit"}))
def test_a_run_option_is_the_same_one_in_all_commands_but_for_its_default(command: str, name: str) -> None:
    def told(command: str) -> tuple[object, ...]:
        option = options(command)[name]
        return option.opts, type(option.type), option.metavar, (option.help or "").partition(" Default: ")[0]

    assert told(command) == told("generate")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_line_with_nothing_given_means_the_defaults_of_its_options(command: str) -> None:
    values = {name: value for name, value in given_nothing(command).items() if name not in OF_THE_COMMAND_LINE}
    assert COMMANDS[command](**values) == COMMANDS[command](**NEEDED[command])


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", sorted(SETTINGS - FOUND_LATER))
def test_a_default_is_the_settings_or_the_commands_own(command: str, name: str) -> None:
    default = default_for(f"tee-worker {command}", name)
    assert given_nothing(command)[name] == (None if name == "threads" and default == 0 else default)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_own_defaults_only_for_what_it_takes(command: str) -> None:
    assert set(OWN_DEFAULTS[f"tee-worker {command}"]) <= SETTINGS


def test_no_default_stands_a_second_time() -> None:
    """With other defaults in the settings, all commands have those."""
    names = [*COMMANDS, "ray"]
    words = f"""
import json
from shmbroker import settings
from shmbroker.settings import schema
other = dict(split="linear", dtype="bfloat16", threads=3, service="other", lane="zmq", doorbell="poll", failover=1.5, timeout=2.5, spin=7.0)
settings.DEFAULTS = schema.DEFAULTS = schema.Settings(**other)
settings.OWN_DEFAULTS = schema.OWN_DEFAULTS = {{f"tee-worker {{name}}": {{"arena": "enough"}} for name in {names}}}
from tee_worker.analytic import compare
from tee_worker.cli import cli
from tee_worker.prefill import prefill
print(json.dumps([{{one.name: one.default for one in cli.commands[name].params if one.name in other}} == other for name in {names}]))
"""
    done = run(sys.executable, "-c", words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True] * len(names)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_of_every_command_reach_its_channel(tiny_worker: str, tiny: Path, command: str) -> None:
    asked = {"service": tiny_worker, "split": "op", "lane": "shm", "doorbell": "poll", "spin": 0.0, "arena": "32M", "failover": 3.0}
    options = COMMANDS[command](**{**NEEDED[command], "model": str(tiny), **asked})
    with split_run(options, Checkpoint.at(str(tiny)), channel_as_asked, prompt_tokens=8, new_tokens=1) as running:
        assert isinstance(running.channel, FailoverChannel)
        assert running.channel.patience == 3.0
        running.model(input_ids=torch.ones(1, 8, dtype=torch.int64), logits_to_keep=1)
        report = running.channel.report()
    assert (report.lane, report.doorbell) == ("shm", "poll")
    assert compare(running.traffic(8, 1), report).equal


def test_a_prefill_that_may_fail_over_counts_its_own_calls_alone(tiny_worker: str, tiny: Path) -> None:
    asked = PrefillOptions(model=str(tiny), service=tiny_worker, tokens=70, failover=3.0)
    for options in (asked, msgspec.structs.replace(asked, pipeline=2), msgspec.structs.replace(asked, failover=0.0)):
        assert prefill(options).analytic.equal


@pytest.mark.parametrize("words", [["--failover", "-1"], ["--split", "half"], ["--dtype", "int3"]])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_cannot_be_is_refused_before_anything_is_looked_for(command: str, words: list[str]) -> None:
    needed = [word for name, value in NEEDED[command].items() for word in (f"--{name}", value)]
    done = run(sys.executable, "-m", "tee_worker", command, *needed, *words, SHMBROKER_INSTANCE="nobody")
    assert done.returncode == 1
    assert words[0].removeprefix("--") in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_showing_the_options_loads_no_torch() -> None:
    words = "import sys, tee_worker.cli; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    assert run(sys.executable, "-c", words).stdout == "[]\n"
