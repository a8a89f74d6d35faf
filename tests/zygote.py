"""Programs of tests started from a process that has torch and transformers loaded already: a fork instead of seconds of imports.

The process (``python -m tests.zygote FD``) has loaded what others wrote, and nothing of ours: what a program of ours reads when it is loaded, it reads
in each fork anew. A fork runs the module or file as ``python`` would, and ends as it would. Its parent is the zygote, which tells how it ended.

Not for programs whose variables are read when torch is loaded (``OMP_...``): :func:`forkable` says which can be started so.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
PROGRAMS = str(ROOT / "tests" / "programs") + os.sep
MODULES = ("tee_worker", "gpu_worker", "benchmarks")
COMMANDS = {"doctor", "ping", "ops"}
"""Of ``shmbroker``: those that load torch."""

READ_BY_LIBRARIES = ("OMP_", "MKL_", "TORCH_", "KMP_", "PYTHON", "LD_", "HF_")
"""Variables that would come too late."""

_MESSAGE_BYTES = 1 << 20


def forkable(command: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether the program can be started so, and is one that loads torch."""
    if command[0] != sys.executable or any(name.startswith(READ_BY_LIBRARIES) for name in environment):
        return False
    if command[1] == "-m":
        return command[2] in MODULES or (command[2] == "shmbroker" and not COMMANDS.isdisjoint(command[3:]))
    if command[1] == "-c":
        return "torch" in command[2] and "sys.modules" not in command[2]
    return command[1].startswith(PROGRAMS)


# --- in the tests -----------------------------------------------------------------------------------------------------------------------


class _Zygote:
    """The tests' end."""

    def __init__(self) -> None:
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {
            **os.environ,
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, "-m", "tests.zygote", str(other.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[other.fileno()], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL)
        other.close()
        self._lock = threading.Lock()
        self._statuses: dict[int, int] = {}
        atexit.register(self.close)

    def start(self, request: dict[str, Any], fds: Sequence[int]) -> int:
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(request).encode()], list(fds))
            while True:
                told = self._receive()
                if "pid" in told:
                    self._statuses.pop(told["pid"], None)  # of one that had the same pid before
                    return int(told["pid"])

    def status(self, pid: int) -> int | None:
        """How the process ended, as ``Popen.returncode`` says it; None while it runs."""
        with self._lock:
            while pid not in self._statuses and select.select([self._socket], [], [], 0)[0]:
                self._receive()
            return self._statuses.get(pid)

    def _receive(self) -> dict[str, int]:
        message = self._socket.recv(_MESSAGE_BYTES)
        if not message:
            raise RuntimeError("the process that programs are forked from has died")
        told: dict[str, int] = json.loads(message)
        if "ended" in told:
            self._statuses[told["ended"]] = os.waitstatus_to_exitcode(told["status"])
        return told

    def close(self) -> None:
        self._socket.close()
        self._process.wait(60)


_zygotes: dict[int, _Zygote] = {}
"""By the process that started it: a fork of the tests has none."""


class Forked:
    """A program that was forked; used like a :class:`subprocess.Popen`, as far as tests do."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], *, stderr: bool) -> None:
        """Its output comes by a pipe, and what it writes to stderr too where that is asked for."""
        if os.getpid() not in _zygotes:
            _zygotes[os.getpid()] = _Zygote()
        self._zygote = _zygotes[os.getpid()]
        self.args = list(command)
        self.returncode: int | None = None
        self.stdin = None
        reading, writing = os.pipe()
        self.stdout: IO[bytes] = os.fdopen(reading, "rb")
        self.stderr: IO[bytes] | None = None
        errors = 2
        if stderr:
            reading, errors = os.pipe()
            self.stderr = os.fdopen(reading, "rb")
        request = {"argv": self.args[1:], "environment": dict(environment), "folder": os.getcwd()}
        try:
            self.pid = self._zygote.start(request, [writing, errors])
        finally:
            os.close(writing)
            if stderr:
                os.close(errors)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._zygote.status(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        until = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if until is not None and time.monotonic() >= until:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[bytes, bytes]:
        """All that it has written, once it has ended."""
        streams = [self.stdout] if self.stderr is None else [self.stdout, self.stderr]
        written: dict[IO[bytes], bytes] = dict.fromkeys(streams, b"")

        def read(stream: IO[bytes]) -> None:
            written[stream] = stream.read()

        threads = [threading.Thread(target=read, args=[stream]) for stream in streams]
        for thread in threads:
            thread.start()
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            for thread in threads:
                thread.join()
            for stream in streams:
                stream.close()
        return written[self.stdout], b"" if self.stderr is None else written[self.stderr]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


# --- the zygote -------------------------------------------------------------------------------------------------------------------------


def _requests(end: socket.socket) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """What is asked for, until the tests end. Tells meanwhile of those that have ended."""
    waking, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    while True:
        readable, _, _ = select.select([end, waking], [], [])
        if waking in readable:
            os.read(waking, 4096)
            with contextlib.suppress(ChildProcessError):
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    end.send(json.dumps({"ended": ended[0], "status": ended[1]}).encode())
        if end in readable:
            message, fds, _, _ = socket.recv_fds(end, _MESSAGE_BYTES, 2)
            if not message:
                return
            yield json.loads(message), list(fds)


def _become(end: socket.socket, request: dict[str, Any], fds: list[int]) -> None:
    """In the fork: be as a process that was just started."""
    signal.set_wakeup_fd(-1)
    end.detach()  # its number will be another file's
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(fds[0], 1)
    os.dup2(fds[1], 2)
    os.closerange(3, 256)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    random.seed()
    sys.modules["numpy"].random.seed()


def main() -> None:
    end = socket.socket(fileno=int(sys.argv[1]))
    for module in ("torch", "transformers", "transformers.models.auto.modeling_auto", "transformers.generation", "click", "zmq", "msgspec"):
        importlib.import_module(module)
    importlib.import_module("gc").freeze()
    for request, fds in _requests(end):
        pid = os.fork()
        if pid == 0:
            _become(end, request, fds)
            break
        for fd in fds:
            os.close(fd)
        end.send(json.dumps({"pid": pid}).encode())
    else:
        return
    argv = request["argv"]
    if argv[0] == "-m":
        sys.argv = argv[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    elif argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        sys.path[0] = ""
        main_module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(argv[1], "<string>", "exec"), main_module.__dict__)
    else:
        sys.argv = argv
        sys.path[0] = str(Path(argv[0]).parent)
        sys.path.insert(1, str(ROOT))
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
