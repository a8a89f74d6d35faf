"""A private broker process, for notebooks, tests and the demo."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shmbroker.control.access import CONTROL_VARIABLE, UNIX
from shmbroker.control.joining import INSTANCE_VARIABLE, PRIVATE_INSTANCE
from shmbroker.errors import BrokerUnreachable
from shmbroker.memory import names
from shmbroker.memory.open_files import telling_exhaustion
from shmbroker.memory.reaper import unlink_all
from shmbroker.settings.load import variable_of

if TYPE_CHECKING:
    from shmbroker.client.client import Client

READY_LINE = "ready"
START_SECONDS = 20.0
"""How long a broker process may take to start: an interpreter and a few imports, on a busy machine."""

STOP_SECONDS = 5.0
LONGEST_FOLDER = 30
_RUNTIME_VARIABLE = "SHMBROKER_RUNTIME_DIR"


@dataclass(frozen=True, slots=True)
class LocalBroker:
    """A broker that lives as long as the ``with`` block that started it."""

    instance: str
    pid: int
    environment: dict[str, str]
    """Variables that point another process at this broker."""

    def __repr__(self) -> str:
        state = "running" if os.path.exists(f"/proc/{self.pid}") else "ended"
        return f"<LocalBroker of instance {self.instance!r} (pid {self.pid}, {state})>"

    def connect(self, **options: Any) -> Client:
        """A client of this broker; options as of :func:`shmbroker.connect`."""
        from shmbroker.client.client import connect

        return connect(self.instance, **options)


@contextlib.contextmanager
def local_broker(*, log_level: str = "warning") -> Iterator[LocalBroker]:
    """Start a private broker process on an instance of its own; it ends with the block, and with this process however that ends.

    Within the block ``shmbroker.connect()`` and ``shmbroker.Worker()`` of this process, and of processes started from it, find it by
    themselves. Ctrl-C is not for it. At the end nothing of its instance is left in shared memory, whoever still uses it. Raises :class:`BrokerUnreachable` when it cannot be started.
    """
    instance = PRIVATE_INSTANCE.format(os.getpid(), names.new_id()[:6])
    # A unix socket's path must be short, which a temporary folder's need not be.
    folder = tempfile.gettempdir()
    runtime = tempfile.mkdtemp(prefix="shmbroker-", dir=folder if len(folder) <= LONGEST_FOLDER else "/tmp")
    environment = {INSTANCE_VARIABLE: instance, _RUNTIME_VARIABLE: runtime, CONTROL_VARIABLE: UNIX}
    before = {variable: os.environ.get(variable) for variable in environment}
    command = [sys.executable, "-m", "shmbroker", "--log-level", log_level, "serve", "--instance", instance]
    command += ["--until-exit", str(os.getpid()), "--group", ""]  # for this user, whatever the settings say
    # Of settings of the machine that are meant for its own broker, this one would take the port.
    private = {**os.environ, **environment, variable_of("metrics_port"): "0"}
    try:
        with telling_exhaustion("local_broker()"):
            # A session of its own: Ctrl-C at the terminal, and a signal to this process's group, are not for it.
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env=private, start_new_session=True)
    except BaseException:
        shutil.rmtree(runtime, ignore_errors=True)
        raise
    try:
        _await_ready(process)
        os.environ.update(environment)
        yield LocalBroker(instance, process.pid, environment)
    finally:
        for variable, value in before.items():
            if value is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = value
        stop_process(process)
        unlink_all(
            instance
        )  # what a worker in a thread, a client or a child still holds: its memory stays, and nobody looks for its name any more
        shutil.rmtree(runtime, ignore_errors=True)


def _await_ready(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    until = time.monotonic() + START_SECONDS
    seen = b""
    while READY_LINE.encode() not in seen:
        readable, _, _ = select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))
        chunk = os.read(process.stdout.fileno(), 4096) if readable else b""
        if not chunk:
            stop_process(process)
            why = f"ended with status {process.returncode}" if readable else f"was not ready within {START_SECONDS:g} s"
            raise BrokerUnreachable(f"the private broker {why}; its own words are above")
        seen += chunk


def stop_process(process: subprocess.Popen[Any], seconds: float = STOP_SECONDS) -> int:
    """End a child process: SIGTERM, and SIGKILL if that is not heard within ``seconds``. Returns its exit status."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdout is not None:
        process.stdout.close()
    return process.returncode
