"""Readiness and watchdog, told to a datagram socket as systemd has one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmbroker.systemd import notify
from tests.processes import START_SECONDS, wait_until

TIMEOUT = 0.4
"""Of the watchdogs here, seconds."""


class Manager:
    """Who is told."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self.socket.bind(address)

    def told(self, seconds: float = 0.0) -> list[str]:
        """The next message, within ``seconds``; empty if there is none."""
        self.socket.settimeout(seconds)
        try:
            return self.socket.recv(4096).decode().split("\n")
        except (BlockingIOError, TimeoutError):
            return []


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    name = str(tmp_path / "notify") if request.param == "path" else f"@shmbroker-test-{os.getpid()}"
    found = Manager(name.replace("@", "\0", 1))
    monkeypatch.setenv(notify.SOCKET_VARIABLE, name)
    monkeypatch.setenv(notify.WATCHDOG_MICROSECONDS_VARIABLE, str(int(TIMEOUT * 1e6)))
    monkeypatch.setenv(notify.WATCHDOG_PID_VARIABLE, str(os.getpid()))
    notify.of_process.cache_clear()
    yield found
    found.socket.close()
    notify.of_process.cache_clear()


def test_ready_and_stopping_are_told(manager: Manager) -> None:
    assert notify.ready()
    assert manager.told() == ["READY=1"]
    assert notify.ready("in words")
    assert manager.told() == ["READY=1", "STATUS=in words"]
    assert notify.stopping()
    assert manager.told() == ["STOPPING=1"]


def test_nobody_is_told_where_nobody_asked(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(notify.SOCKET_VARIABLE)
    assert not notify.ready()
    assert notify.Watchdog.of_environment() is None
    notify.watchdog()
    assert manager.told() == []


@pytest.mark.parametrize("address", ["/nonexistent/socket", "relative", "", "@nobody-listens"])
def test_a_manager_that_cannot_be_told_is_no_error(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(notify.SOCKET_VARIABLE, address)
    assert not notify.ready()


@pytest.mark.parametrize(("variable", "value"), [(notify.WATCHDOG_PID_VARIABLE, "1"), (notify.WATCHDOG_MICROSECONDS_VARIABLE, "0")])
def test_a_watchdog_of_another_process_is_not_fed(manager: Manager, monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    assert notify.Watchdog.of_environment() is None
    notify.watchdog()
    assert manager.told() == []


def test_a_turning_loop_feeds_the_watchdog_when_it_is_due_and_not_each_time(manager: Manager) -> None:
    begun = time.monotonic()
    turns = 0
    while time.monotonic() < begun + 2 * TIMEOUT:
        notify.watchdog()
        turns += 1
    due = (time.monotonic() - begun) / TIMEOUT * notify.FEEDS_PER_TIMEOUT
    fed = 0
    while manager.told() == ["WATCHDOG=1"]:
        fed += 1
    assert 1 <= fed <= due + 1
    assert turns > fed


def test_one_hung_loop_starves_the_watchdog_though_another_turns(manager: Manager) -> None:
    watchdog = notify.Watchdog.of_environment()
    assert watchdog is not None
    watchdog.turning("hangs")
    stop = threading.Event()

    def turn() -> None:
        while not stop.wait(TIMEOUT / 20):
            watchdog.turning("turns")

    thread = threading.Thread(target=turn)
    thread.start()
    try:
        time.sleep(TIMEOUT)
        while manager.told():
            pass
        assert manager.told(2 * TIMEOUT) == []
        watchdog.turning("hangs")
        assert manager.told(START_SECONDS) == ["WATCHDOG=1"]
    finally:
        stop.set()
        thread.join()


def test_a_broker_tells_readiness_feeds_from_its_loop_and_tells_its_end(manager: Manager, instance: str, tmp_path: Path) -> None:
    environment = {**os.environ, "SHMBROKER_RUNTIME_DIR": str(tmp_path / "run")}
    environment.pop(notify.WATCHDOG_PID_VARIABLE)  # it has the pid of this process
    command = [sys.executable, "-m", "shmbroker", "--log-level", "warning", "serve", "--instance", instance]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        told = manager.told(START_SECONDS)
        assert told[0] == "READY=1"
        assert told[1].startswith(f"STATUS=instance {instance} on ipc://")
        assert [manager.told(START_SECONDS) for _ in range(3)] == [["WATCHDOG=1"]] * 3
        process.terminate()
        wait_until(lambda: manager.told() == ["STOPPING=1"])
        assert process.wait(START_SECONDS) == 0
    finally:
        process.kill()
        process.wait()
