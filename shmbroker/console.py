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

from shmbroker.errors import ShmBrokerError
from shmbroker.settings.load import load

if TYPE_CHECKING:
    from rich.console import Console

NO_TERMINAL_COLUMNS = 200

LEVELS = ("debug", "info", "warning", "error")


def set_up_logging(level: str) -> None:
    """Log to standard error, one line an event."""
    logging.basicConfig(level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)


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


def run(command: click.Command) -> None:
    """Run a click command, its defaults as the settings say; errors of ours become one line on standard error and exit status 1. Tracebacks need ``--log-level debug``."""
    progress_bars_on_terminals_alone()
    try:
        command.main(standalone_mode=False, default_map=default_map(command, load().chosen()))
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
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
