"""Starting and ending the processes of a test. Only what a test started is ever ended, by pid."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

from shmbroker.client.channel import Channel
from shmbroker.client.local_broker import stop_process
from shmbroker.memory import layout
from tests.zygote import Forked, forkable

PROGRAMS = Path(__file__).parent / "programs"
START_SECONDS = 300.0
"""How long a program of a test may take to start: torch alone takes seconds on a busy machine."""


Process = subprocess.Popen[bytes]
"""A program of a test; where that saves loading torch, a fork that is used alike."""


def start_program(command: Sequence[str], environment: Mapping[str, str], *, stderr: bool) -> Process:
    """Start a program with its output in a pipe, and what it writes to stderr too where that is asked for."""
    whole = {**os.environ, **environment}
    if forkable(command, environment):
        return cast(Process, Forked(command, whole, stderr=stderr))
    return subprocess.Popen(command, env=whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE if stderr else None)


@contextlib.contextmanager
def running(*command: str, **environment: str) -> Iterator[Process]:
    """A process for the length of a block."""
    process = start_program(command, environment, stderr=True)
    try:
        yield process
    finally:
        stop_process(process)
        if process.stderr is not None:
            process.stderr.close()


@contextlib.contextmanager
def ready_program(name: str, *arguments: str, **environment: str) -> Iterator[Process]:
    """A program of ``tests/programs`` that has said that it is ready."""
    command = [sys.executable, str(PROGRAMS / name), *arguments]
    process = start_program(command, environment, stderr=False)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        stop_process(process)


def worker_process(service: str = "test", **environment: str) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """The worker of ``tests/programs/worker.py``, ready."""
    return ready_program("worker.py", service, **environment)


@contextlib.contextmanager
def broker_process(instance: str, *options: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """``shmbroker serve`` with options of its own, ready."""
    command = (sys.executable, "-m", "shmbroker", "--log-level", "warning", "serve", "--instance", instance, *options)
    with running(*command, **environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n", process.stderr and process.stderr.read().decode()
        yield process


def wait_until(condition: Callable[[], bool], seconds: float = START_SECONDS) -> None:
    """Wait for something that another process does and does not announce."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not so after {seconds:g} s"
        time.sleep(0.02)


def run(*command: str, seconds: float = 600.0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    if forkable(command, environment):
        process = start_program(command, environment, stderr=True)
        out, err = process.communicate(seconds)
        return subprocess.CompletedProcess(command, process.returncode, out.decode(), err.decode())
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=seconds, check=False, stdin=subprocess.DEVNULL
    )


def submissions_taken(channel: Channel) -> int:
    """How many frames the worker of a channel on lane shm has taken so far."""
    segment = channel.memory.segment
    area = segment.geometry.channel_offset(channel.index)
    return int(segment.words[(area + layout.offset_of(layout.ChannelHeader, "submissions_taken")) // 8])


def freeze(pid: int) -> None:
    """SIGSTOP, and wait until no thread of the process runs any more: the signal alone only asks for it."""
    os.kill(pid, signal.SIGSTOP)

    def stopped() -> bool:
        states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").iterdir()]
        return all(state == "T" for state in states)

    wait_until(stopped)


def check_is_small_and_light(pid: int) -> str:
    """A broker has at most 40 MiB resident and has loaded neither torch nor NumPy; returns what it has mapped, a line for each."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])  # type: ignore[index]
    assert resident < 40 * 1024
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "torch" not in maps
    assert "numpy" not in maps
    return maps
