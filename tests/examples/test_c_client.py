"""The client in C: joins a broker, calls a Python worker's op on shared memory, and leaves; or says in one line why not."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import shmbroker
from shmbroker.control.messages import PROTOCOL_VERSION
from shmbroker.memory import names
from shmbroker.memory.reaper import objects
from tests.c_programs import compiler, ran
from tests.processes import wait_until, worker_process

FOLDER = Path(__file__).parents[2] / "examples" / "c_client"
MOST_LINES = 300


@pytest.fixture(scope="module")
def client_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as its README says, with warnings for errors."""
    program = tmp_path_factory.mktemp("c_client") / "client"
    (command,) = re.findall(r"^cc (.*)$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    command = command.replace("python -c", f"{sys.executable} -c").replace("-o client", f"-o {program}")
    done = subprocess.run(
        f"{compiler()} -Wall -Wextra -Werror {command}", shell=True, cwd=FOLDER, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return program


def left(broker: shmbroker.LocalBroker) -> list[str]:
    """What clients have in shared memory: with them goes what was theirs."""
    return [found.file for found in objects(broker.instance) if found.kind == names.SEGMENT]


def test_the_client_calls_an_op_on_shared_memory_and_leaves_nothing(
    broker: shmbroker.LocalBroker, worker: int, client_program: Path
) -> None:
    bells = len(list(objects(broker.instance)))
    done = ran(client_program, "test", "double", "1", "2.5", "-3")
    assert (done.returncode, done.stdout, done.stderr) == (0, "2 5 -6\n", "")
    assert not left(broker), "it unlinks what was its own before it ends"
    assert len(list(objects(broker.instance))) == bells


def test_an_input_as_large_as_its_arena_takes_is_called_with(broker: shmbroker.LocalBroker, worker: int, client_program: Path) -> None:
    numbers = [str(number) for number in range(10_000)]
    done = ran(client_program, "test", "double", *numbers)
    assert done.stdout == " ".join([f"{2.0 * number:g}" for number in range(10_000)]) + "\n"


def test_a_worker_whose_ends_are_in_python_answers_alike(broker: shmbroker.LocalBroker, client_program: Path) -> None:
    with worker_process("python", SHMBROKER_PURE_PYTHON="1"):
        assert ran(client_program, "python", "contiguous", "1", "7").stdout == "1 7\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("test", "doubel", "1"), r"BadInput: worker 'test-worker' has no op 'doubel'; it has: double, "),
        (("test", "scale", "1"), r"op scale failed \(status 1\): TypeError .*factor"),
        (("test", "fail", "1"), r"op fail failed \(status 1\): ValueError no such luck"),
        (("nobody", "double", "1"), r"no worker offers service nobody on instance local-"),
        (("test", "double"), r"usage: client SERVICE OP NUMBER\.\.\."),
        (("x" * 300, "double", "1"), r"x+ is too long"),
    ],
    ids=["op", "arguments", "error", "service", "usage", "long"],
)
def test_what_cannot_be_called_is_told_in_one_line(
    arguments: tuple[str, ...], told: str, broker: shmbroker.LocalBroker, worker: int, client_program: Path
) -> None:
    done = ran(client_program, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(f"client: {told}.*\n", done.stderr), done.stderr
    wait_until(lambda: not left(broker))


def test_without_a_broker_it_says_how_to_start_one(client_program: Path, short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMBROKER_RUNTIME_DIR", str(short_folder))
    monkeypatch.setenv("SHMBROKER_INSTANCE", "absent")
    done = ran(client_program, "test", "double", "1")
    assert re.fullmatch(
        rf"client: nobody listens at {short_folder}/absent.sock \(.*\): start a broker with 'shmbroker serve'\n", done.stderr
    )


def test_a_worker_that_dies_amid_a_call_ends_it_with_an_error(broker: shmbroker.LocalBroker, client_program: Path) -> None:
    with worker_process("mortal") as mortal:
        done = ran(client_program, "mortal", "die", "1")
        assert mortal.wait(60) == -signal.SIGKILL
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "client: the worker died before it answered\n")
    wait_until(lambda: not left(broker))


def test_the_client_is_short_and_speaks_the_version_of_the_control_protocol_that_there_is() -> None:
    files = [FOLDER / "client.c", FOLDER / "control.h"]
    assert all(len(file.read_text().splitlines()) < MOST_LINES for file in files)
    assert f"PROTOCOL_VERSION = {PROTOCOL_VERSION}," in files[1].read_text()
