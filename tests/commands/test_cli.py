"""The group of commands: what each start of ``shmbroker`` costs, also that of the broker daemon."""

from __future__ import annotations

import sys
from pathlib import Path

import shmbroker
from shmbroker.commands.cli import cli
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
