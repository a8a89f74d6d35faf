"""The group of commands: what each start of ``shmbroker`` costs, also that of the broker daemon."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import shmbroker
from gpu_worker.cli import cli as gpu_worker
from shmbroker import console
from shmbroker.commands.cli import cli
from tee_worker.cli import cli as tee_worker
from tests.processes import run

FILES = {path.stem for path in (Path(shmbroker.__file__).parent / "commands").iterdir()} - {"__init__", "__pycache__"}
SHARED = {"cli", "options", "keyboard", "picture", "round_trip"}


def test_the_help_loads_neither_torch_nor_numpy() -> None:
    words = (
        "import sys; from shmbroker.commands.cli import cli; cli.main(['--help'], standalone_mode=False); "
        "print([module for module in ('torch', 'numpy', 'transformers', 'rich') if module in sys.modules])"
    )
    done = run(sys.executable, "-c", words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_command_has_a_file_of_its_name() -> None:
    assert set(cli.commands) == FILES - SHARED


PROGRAMS: dict[str, click.Group] = {"shmbroker": cli, "gpu-worker": gpu_worker, "tee-worker": tee_worker}


def commands(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, one in group.commands.items():
        if isinstance(one, click.Group):
            yield from commands(one, *path, name)
        else:
            yield (*path, name), one


ALL = [(program, path, command) for program in PROGRAMS for path, command in commands(PROGRAMS[program])]


@pytest.mark.parametrize(("program", "path", "command"), ALL, ids=[" ".join((program, *path)) for program, path, _ in ALL])
def test_every_command_takes_the_log_level_before_its_name_and_after_it_and_the_later_one_counts(
    program: str, path: tuple[str, ...], command: click.Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels: list[str] = []
    monkeypatch.setattr(console, "set_up_logging", levels.append)
    monkeypatch.setattr(command, "callback", lambda **_: None)
    group = PROGRAMS[program]
    for words, last in (
        (path, "error"),
        (("--log-level", "debug", *path), "debug"),
        ((*path, "--log-level", "debug"), "debug"),
        (("--log-level", "info", *path, "--log-level", "debug"), "debug"),
    ):
        with contextlib.suppress(click.UsageError):  # of what else the command must be given
            group.main(list(words), standalone_mode=False, default_map=console.default_map(group, {"log_level": "error"}))
        assert levels[-1] == last, words


def test_a_setting_that_cannot_be_read_stops_everything_but_the_help_for_it() -> None:
    for program in ("shmbroker", "gpu_worker", "tee_worker"):
        wrong = {"SHMBROKER_SPIM": "3"}
        for words in (("--help",), ("-h",), ("--version",), ("serve", "--help")):
            done = run(sys.executable, "-m", program, *words, **wrong)
            assert (done.returncode, done.stderr) == (0, ""), words
        done = run(sys.executable, "-m", program, "serve", **wrong)
        assert done.returncode == 1
        assert done.stderr.startswith("error: variable SHMBROKER_SPIM is not known (did you mean SHMBROKER_SPIN?)")


def test_the_help_is_whole_where_there_is_no_terminal() -> None:
    for program in ("shmbroker", "gpu_worker", "tee_worker"):
        told = run(sys.executable, "-m", program, "--help").stdout
        assert "..." not in told.split("Commands:")[1]
