"""What all console scripts share: the log's form, and errors as one line instead of a traceback."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

import click

from shmbroker.errors import BadInput, ShmBrokerError
from shmbroker.settings.load import load
from shmbroker.systemd import journal

if TYPE_CHECKING:
    from rich.console import Console

NO_TERMINAL_COLUMNS = 200

LEVELS = ("debug", "info", "warning", "error")


def set_up_logging(level: str) -> None:
    """Log to standard error, one line an event."""
    logging.basicConfig(level=level.upper(), handlers=[journal.handler()], force=True)


def _set_level(context: click.Context, option: click.Parameter, level: str | None) -> None:
    assert option.name is not None
    if level is not None and context.get_parameter_source(option.name) is click.core.ParameterSource.COMMANDLINE:
        set_up_logging(level)


class Program(click.Group):
    """A group of commands that take ``--log-level`` both before the command's name and after it; the later one counts."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add ``cmd``, with the option."""
        super().add_command(cmd, name)
        _with_log_level(cmd)


def _with_log_level(command: click.Command) -> None:
    if isinstance(command, click.Group):
        for one in command.commands.values():
            _with_log_level(one)
    elif not any(param.name == "log_level" for param in command.params):
        kind, text = click.Choice(LEVELS), "As before the command's name."
        command.params.append(click.Option(["--log-level"], type=kind, metavar="LEVEL", expose_value=False, callback=_set_level, help=text))


def terminal(*, stderr: bool = False) -> Console:
    """Where tables are printed, on standard output or error: as wide as the terminal; where there is none, as wide as they need."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    fitting = stream.isatty() or "COLUMNS" in os.environ
    return Console(stderr=stderr) if fitting else Console(stderr=stderr, width=NO_TERMINAL_COLUMNS)


def progress_bars_on_terminals_alone() -> None:
    """Have Hugging Face's progress bars left out where standard error is no terminal: piped, they are pages of half lines.

    To be called before transformers is loaded. Said by variables, it holds for child processes too; a user's own stay.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


def end_with(pid: int) -> None:
    """End this process when process ``pid`` does; for the children of a demo, whose starter may be killed."""

    def watch() -> None:
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(pid)
            select.select([fd], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    if pid:
        threading.Thread(target=watch, name="end-with", daemon=True).start()


def share_cpus() -> None:
    """Let idle compute threads sleep. To be called before torch is loaded; a user's own OMP_WAIT_POLICY stays.

    By default GNU OpenMP's threads spin between parallel regions. Two processes that take turns on the same cores then spin against each
    other: 64 tokens at split op took 25.8 s so, 6.1 s with this (2 cores, 2 threads in each process).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


RESOLVED_LATER = ("instance", "control", "keys")
"""Options that the roles take from the settings themselves, as they do for who uses them from Python."""


def default_map(command: click.Command, chosen: dict[str, Any]) -> dict[str, Any]:
    """Defaults of a command's options, and of its subcommands', from the settings that somebody set (click's ``default_map``)."""
    defaults = {param.name: chosen[param.name] for param in command.params if param.name in chosen and param.name not in RESOLVED_LATER}
    if isinstance(command, click.Group):
        defaults |= {name: default_map(one, chosen) for name, one in command.commands.items()}
    return defaults


HELP_WORDS = {"-h", "--help", "--version"}


def _defaults(command: click.Command) -> dict[str, Any]:
    """:func:`default_map` of the settings; of none where they cannot be read and only help was asked for, which is what then helps."""
    try:
        chosen = load().chosen()
    except BadInput:
        if HELP_WORDS.isdisjoint(sys.argv[1:]):
            raise
        chosen = {}
    return default_map(command, chosen)


def _help_columns() -> int | None:
    """For click, which takes 80 columns where there is no terminal, and cuts what it says of a command to one line of those."""
    return None if sys.stdout.isatty() or "COLUMNS" in os.environ else NO_TERMINAL_COLUMNS


def run(command: click.Command) -> None:
    """Run a click command, its defaults as the settings say; errors of ours become one line on standard error and exit status 1. Tracebacks need ``--log-level debug``."""
    progress_bars_on_terminals_alone()
    try:
        command.main(standalone_mode=False, default_map=_defaults(command), terminal_width=_help_columns())
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (ShmBrokerError, OSError) as error:
        if logging.getLogger().isEnabledFor(logging.DEBUG):
            raise
        click.echo(journal.line(logging.ERROR, f"error: {error}"), err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
