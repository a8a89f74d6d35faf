"""The process that keeps one replica's broker and GPU workers: ``python -m tee_worker.scale_out.keeper FD``.

It starts them, starts anew what dies, and ends them when the replica ends, however it ends: the two hold a socket pair, and the kernel closes the
replica's end. Then it gives back what lies in shared memory and its slot. It leaves its parent, whose supervisor may kill a worker's children; if it is
killed itself, its own end with it, and whoever takes the slot next reaps what they left.

What it says is lines of JSON: :class:`Kept` once, then :class:`Note` and at the end, perhaps, :class:`Failed`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from shmbroker import console
from shmbroker.client.local_broker import READY_LINE, stop_process
from shmbroker.control.access import CONTROL_VARIABLE, UNIX
from shmbroker.control.joining import INSTANCE_VARIABLE
from shmbroker.errors import ShmBrokerError
from shmbroker.memory.reaper import reap, unlink_all
from shmbroker.settings.load import variable_of
from tee_worker.scale_out.slot import Slot

log = logging.getLogger(__name__)

BROKER_SECONDS = 60.0
"""For a broker to start, on a busy machine."""

MOST_FAILURES = 3
"""So often in a row may a process end before it has run for ``STEADY_SECONDS``: then it is not started again."""

STEADY_SECONDS = 20.0

_STDERR = 2


class Plan(msgspec.Struct, tag=True):
    """What is to be kept; the first line from the replica."""

    folder: str
    workers: list[list[str]]
    """The command of each GPU worker, without how it finds the broker."""
    pid: int
    """Of the replica: for people."""


class Kept(msgspec.Struct, tag=True):
    """The broker is there."""

    instance: str
    folder: str


class Note(msgspec.Struct, tag=True):
    """Something that happened."""

    text: str


class Failed(msgspec.Struct, tag=True):
    """It cannot be kept."""

    text: str


Told = Kept | Note | Failed


class _Child:
    """A process that is started anew when it ends."""

    def __init__(self, what: str, start: Callable[[], subprocess.Popen[bytes]]) -> None:
        self.what = what
        self._start = start
        self._failures = 0
        self.start()

    def start(self) -> None:
        self._begun = time.monotonic()
        self.process = self._start()
        self.pidfd = os.pidfd_open(self.process.pid)

    def again(self) -> str:
        """It has ended: start it anew. What happened, in words. Raises :class:`ShmBrokerError` where that makes no sense any more."""
        status = self.process.wait()
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        self._failures = self._failures + 1 if status >= 0 and time.monotonic() - self._begun < STEADY_SECONDS else 0
        if self._failures >= MOST_FAILURES:
            raise ShmBrokerError(f"the {self.what} of this replica {how}, {MOST_FAILURES} times; its own words are in the replica's log")
        os.close(self.pidfd)
        self.start()
        return f"the {self.what} {how}; another one, process {self.process.pid}, takes its place"

    def end(self) -> None:
        """For good. It has nobody to finish anything for, and what it leaves is unlinked."""
        os.close(self.pidfd)
        self.process.kill()
        stop_process(self.process)


class Keeper:
    """What the process does."""

    def __init__(self, plan: Plan, replica: socket.socket) -> None:
        self._plan = plan
        self._replica = replica
        self._slot = Slot(Path(plan.folder))
        self.instance = self._slot.instance
        self._environment = {
            **os.environ,
            INSTANCE_VARIABLE: self.instance,
            variable_of("runtime_dir"): plan.folder,
            CONTROL_VARIABLE: UNIX,
            variable_of("metrics_port"): "0",
        }

    def keep(self) -> None:
        """Until the replica ends or says so, or a signal does. Raises :class:`ShmBrokerError` where something cannot be kept."""
        children: list[_Child] = []
        try:
            self._slot.clear()
            reap(self.instance)  # of a replica before, which was killed with its keeper
            children.append(_Child("broker", self._broker))
            children += [_Child("GPU worker", self._worker(command)) for command in self._plan.workers]
            self._tell(Kept(self.instance, self._plan.folder))
            while True:
                watched = {child.pidfd: child for child in children}
                replica = self._replica.fileno()
                ready, _, _ = select.select([replica, *watched], [], [])
                if replica in ready:
                    return  # it has closed its end: there is nothing else that it could say
                for child in (watched[one] for one in ready):
                    text = child.again()
                    log.warning("%s: %s", self.instance, text)
                    self._tell(Note(text))
        finally:
            for child in reversed(children):
                child.end()
            unlink_all(self.instance)
            self._slot.clear()
            self._slot.release()

    def _tell(self, message: Told) -> None:
        with contextlib.suppress(OSError):  # it is gone: the next look says so
            self._replica.sendall(msgspec.json.encode(message) + b"\n")

    def _broker(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "shmbroker", "--log-level", "warning", "serve", "--instance", self.instance, "--group", ""]
        command += ["--until-exit", str(os.getpid())]
        broker = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=self._environment)
        assert broker.stdout is not None
        until, seen = time.monotonic() + BROKER_SECONDS, b""
        while READY_LINE.encode() not in seen:
            readable, _, _ = select.select([broker.stdout], [], [], max(0.0, until - time.monotonic()))
            part = os.read(broker.stdout.fileno(), 4096) if readable else b""
            if not part:
                stop_process(broker)
                why = f"ended with status {broker.returncode}" if readable else f"was not ready within {BROKER_SECONDS:g} s"
                raise ShmBrokerError(f"the broker of this replica {why}; its own words are in the replica's log")
            seen += part
        return broker

    def _worker(self, command: list[str]) -> Callable[[], subprocess.Popen[bytes]]:
        whole = [*command, "--until-exit", str(os.getpid())]
        return lambda: subprocess.Popen(whole, stdin=subprocess.DEVNULL, stdout=_STDERR, env=self._environment)


def main() -> None:
    """Leave the parent, read the plan and keep it."""
    if os.fork():
        os._exit(0)
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    replica = socket.socket(fileno=int(sys.argv[1]))
    replica.set_inheritable(False)
    console.set_up_logging("warning")
    with replica, replica.makefile("rb") as lines:
        line = lines.readline()
        if not line:
            return
        try:
            Keeper(msgspec.json.decode(line, type=Plan), replica).keep()
        except (ShmBrokerError, OSError) as error:
            log.error("%s", error)
            with contextlib.suppress(OSError):
                replica.sendall(msgspec.json.encode(Failed(str(error))) + b"\n")


if __name__ == "__main__":
    main()
