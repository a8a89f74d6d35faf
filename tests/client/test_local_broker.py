"""Private brokers: they end with their holder, however that ends, and only then; nothing is left. Real processes, real signals, a real terminal."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import shmbroker
from shmbroker.memory.reaper import objects
from tests.processes import START_SECONDS, wait_until

HOLDER = """
import os, subprocess, sys, threading, time
import torch, shmbroker

def serve():
    worker = shmbroker.Worker("test")
    worker.op("double", out_spec=lambda x: x)(lambda x: x * 2)
    worker.serve(ready.set)

ready = threading.Event()
with shmbroker.local_broker() as broker:
    client = shmbroker.connect(arena="1M")
    threading.Thread(target=serve, daemon=True).start()
    ready.wait()
    double = client.channel("test").bind("double")
    children = []
    if "child" in sys.argv:
        children = [subprocess.Popen([sys.executable, "-c", "import shmbroker, time; c = shmbroker.connect(arena='1M'); print('ready', flush=True); time.sleep(1800)"],
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE)]
        children[0].stdout.readline()
    said = ["held", broker.instance, broker.pid, os.environ["SHMBROKER_RUNTIME_DIR"], *[child.pid for child in children]]
    ended = False
    while not ended:
        try:  # all that a Ctrl-C may meet: it is sent once "held" or an answer was read
            while not ended:
                print(*said, flush=True)
                line = sys.stdin.readline()
                ended = line.strip() == "end" or not line
                said = [] if ended else ["answer", double(torch.ones(1)).item(), repr(broker)]
        except KeyboardInterrupt:
            said = ["interrupted"]
print("left", flush=True)
"""
"""Holds a broker, with a client of its own and a worker in a thread, as a notebook does; says what it is told to."""


class Holder:
    """The process, and what it said of its broker."""

    def __init__(self, pid: int, read: int, write: int) -> None:
        self.pid = pid
        self._write = write
        self._lines = os.fdopen(read, "r", closefd=False)
        told = self.wait_for("held").split()
        self.instance, self.broker, self.runtime = told[1], int(told[2]), Path(told[3])
        self.children = [int(pid) for pid in told[4:]]

    def say(self, text: str) -> None:
        os.write(self._write, text.encode())

    def wait_for(self, word: str) -> str:
        said: list[str] = []
        while not said or word not in said[-1]:
            said.append(self._line())
            assert said[-1], f"it ended before it said {word!r}: {''.join(said)}"
        return said[-1]

    def _line(self) -> str:
        try:
            return self._lines.readline()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return ""  # how a terminal tells that nobody has it open on the other side

    def left(self) -> list[str]:
        """Of its broker, in shared memory and elsewhere."""
        there = [name.file for name in objects(self.instance)]
        there += [f"broker {self.broker}"] if Path(f"/proc/{self.broker}").exists() else []
        return there + ([str(self.runtime)] if self.runtime.exists() else [])


@contextmanager
def holding(*arguments: str) -> Iterator[tuple[Holder, subprocess.Popen[bytes]]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield Holder(process.pid, process.stdout.fileno(), process.stdin.fileno()), process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_at_the_end_of_the_block_nothing_is_left_of_it_though_client_and_worker_live_on() -> None:
    """A worker in a thread has a doorbell, which is a semaphore."""
    with holding() as (holder, process):
        holder.say("end\n")
        holder.wait_for("left")
        assert holder.left() == []
        process.communicate(timeout=START_SECONDS)
        assert process.returncode == 0
        assert holder.left() == []


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP, signal.SIGQUIT, signal.SIGABRT], ids=lambda number: number.name
)
@pytest.mark.parametrize("to", ["process", "group"])
def test_a_holder_that_a_signal_ends_leaves_nothing(number: signal.Signals, to: str) -> None:
    with holding() as (holder, process):
        (os.kill if to == "process" else os.killpg)(process.pid, number)
        process.wait(START_SECONDS)
        assert process.returncode == -number
        wait_until(lambda: holder.left() == [], START_SECONDS)


def test_a_child_that_outlives_the_holder_keeps_its_memory_and_no_name() -> None:
    with holding("child") as (holder, process):
        (child,) = holder.children
        process.send_signal(signal.SIGTERM)
        process.wait(START_SECONDS)
        try:
            wait_until(lambda: holder.left() == [], START_SECONDS)
        finally:
            os.kill(child, signal.SIGKILL)


def test_ctrl_c_at_a_terminal_interrupts_the_holder_and_not_its_broker() -> None:
    pid, terminal = os.forkpty()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", HOLDER])
    try:
        holder = Holder(pid, terminal, terminal)
        assert Path(f"/proc/{holder.broker}").exists()
        for _ in range(3):
            holder.say("\x03")
            holder.wait_for("interrupted")
            holder.say("call\n")
            answer = holder.wait_for("answer")
            assert "answer 2.0" in answer
            assert f"(pid {holder.broker}, running)" in answer
        holder.say("end\n")
        holder.wait_for("left")
        assert holder.left() == []
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)


def test_it_tells_whether_it_runs() -> None:
    with shmbroker.local_broker() as broker:
        assert repr(broker) == f"<LocalBroker of instance {broker.instance!r} (pid {broker.pid}, running)>"
    assert repr(broker).endswith("ended)>")
