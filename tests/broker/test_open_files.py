"""A broker that may open few files: it refuses with a reason, and lives; whoever is there already is served."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import shmbroker
from shmbroker.broker.limits import FILES_PER_CLIENT, OWN_FILES, Limits
from shmbroker.control.endpoint import socket_path
from shmbroker.control.status import ask
from shmbroker.errors import BadInput
from tests.processes import run, stop_process, wait_until

LIMIT = 96
SERVE = (sys.executable, "-m", "shmbroker", "--log-level", "warning", "serve")
HARD = resource.getrlimit(resource.RLIMIT_NOFILE)[1]


@contextlib.contextmanager
def limited_broker(instance: str, folder: Path, monkeypatch: pytest.MonkeyPatch, soft: int, hard: int) -> Iterator[subprocess.Popen[bytes]]:
    monkeypatch.setenv("SHMBROKER_RUNTIME_DIR", str(folder))
    monkeypatch.setenv("SHMBROKER_INSTANCE", instance)
    process = subprocess.Popen(SERVE, stdout=subprocess.PIPE, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)))
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
        assert process.poll() is None, f"the broker ended, status {process.returncode}"
    finally:
        stop_process(process)


def small_client() -> shmbroker.Client:
    return shmbroker.connect(arena="4K", channels=1, depth=1)


def files_of(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_clients_are_refused_before_the_last_file_and_taken_again_when_others_have_left(
    instance: str, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with limited_broker(instance, short_folder, monkeypatch, LIMIT, LIMIT) as broker, contextlib.ExitStack() as stack:
        clients = []
        told = ""
        while not told:
            try:
                clients.append(stack.enter_context(small_client()))
            except shmbroker.TooManyOpenFiles as error:
                told = str(error)
        assert f"keeps the last of its {LIMIT} open files and takes nobody more" in told
        assert "LimitNOFILE" in told
        assert len(clients) >= (LIMIT - OWN_FILES) // FILES_PER_CLIENT
        assert len(ask(None).peers) == len(clients), "how it stands is told to everybody"
        assert all(client.empty((4,)).numel() for client in clients)
        clients[0].close()
        clients[1].close()
        wait_until(lambda: len(ask(None).peers) == len(clients) - 2)
        stack.enter_context(small_client())
        assert files_of(broker.pid) < LIMIT


def test_hundreds_of_connections_that_say_nothing_neither_end_it_nor_keep_clients_out(
    instance: str, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with limited_broker(instance, short_folder, monkeypatch, LIMIT, LIMIT), small_client() as before, contextlib.ExitStack() as stack:
        for _ in range(5 * LIMIT):
            one = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            one.connect(str(socket_path(instance)))
        with small_client() as after:
            assert {peer.peer for peer in ask(None).peers} >= {before.id, after.id}


def test_the_soft_limit_is_raised_to_the_hard_one(instance: str, short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with limited_broker(instance, short_folder, monkeypatch, 64, HARD) as broker:
        assert resource.prlimit(broker.pid, resource.RLIMIT_NOFILE) == (HARD, HARD)


def test_as_many_clients_as_the_hard_limit_cannot_carry_are_refused_at_the_start(
    instance: str, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHMBROKER_RUNTIME_DIR", str(short_folder))
    most = (HARD - OWN_FILES) // FILES_PER_CLIENT
    done = run(*SERVE, "--instance", instance, "--max-clients", str(most + 1))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"--max-clients {most + 1} takes" in line
    assert f"the hard limit of this process is {HARD}: give at most {most}, or raise the limit" in line
    assert not list(short_folder.glob("*.sock"))
    set_by_variable = run(*SERVE, "--instance", instance, SHMBROKER_MAX_CLIENTS=str(most + 1))
    assert f"give at most {most}" in set_by_variable.stderr


def test_so_many_clients_as_are_promised_can_come(instance: str, short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    promised = (LIMIT - OWN_FILES) // FILES_PER_CLIENT
    Limits(max_clients=promised).check_files(LIMIT)
    with pytest.raises(BadInput, match=f"give at most {promised}"):
        Limits(max_clients=promised + 1).check_files(LIMIT)
    with limited_broker(instance, short_folder, monkeypatch, LIMIT, LIMIT), contextlib.ExitStack() as stack:
        for _ in range(promised):
            stack.enter_context(small_client())
