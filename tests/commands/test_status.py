"""``shmbroker status``: once or again and again, on a terminal of 80 columns."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios

import pytest

import shmbroker
from shmbroker.control import messages as m
from tests.processes import broker_process, run, running, wait_until

COMMAND = (sys.executable, "-m", "shmbroker", "status")


def busy(names: str) -> m.StatusReport:
    """A report of peers that are called so, with large figures."""
    channel = m.ChannelInfo(names, "w", "shm", "sem", "ipc", 123456789, 1 << 40, 1 << 41)
    arena = m.ArenaInfo(1 << 36, 1 << 35, 1 << 34, 12345)
    worker = m.PeerStatus(
        "worker", "w", names, 1234567, (names,), "cuda:0 NVIDIA H100 80GB HBM3, pinned", "", 0, 1e6, 0.1, m.PeerStats(10**9, 10**6)
    )
    segment = "/shmbroker.default.segment.0123456789abcdef"
    client = m.PeerStatus("client", "c", names, 7654321, (), "", segment, 1 << 36, 1e6, 0.1, m.PeerStats(channels=(channel,), arena=arena))
    return m.StatusReport("default", "ipc:///run/user/1000/shmbroker/default.sock", 4567, "1.2.3", 1e6, 1 << 40, (worker, client))


@pytest.mark.parametrize("name", ["gpu", "a-name-that-somebody-thought-about-for-long"])
@pytest.mark.parametrize("columns", [80, 200])
def test_tables_fit_80_columns_and_lose_nothing(name: str, columns: int) -> None:
    from rich.console import Console

    from shmbroker.commands.status import render

    console = Console(width=columns, color_system=None)
    with console.capture() as captured:
        console.print(render(busy(name)))
    told = captured.get()
    assert "…" not in told
    if columns == 80:
        assert max(len(line.rstrip()) for line in told.splitlines()) <= 80
    for figure in ("123456789", "1048576.0", "2097152.0", "65536.0 MiB", "32768.0 MiB", "16384.0 MiB", "12345", "1234567", "1000000000"):
        assert re.search(rf"(^|\s){re.escape(figure)}(\s|$)", told, re.MULTILINE), figure
    assert "/shmbroker.default.segment.0123456789abcdef" in told


def test_watched_for_programs_it_is_a_line_for_each_look(broker: shmbroker.LocalBroker) -> None:
    with running(*COMMAND, "--watch", "--interval", "0.1", "--json") as process:
        assert process.stdout is not None
        before = json.loads(process.stdout.readline())
        with shmbroker.connect(arena="1M", name="came"):
            while True:
                now = json.loads(process.stdout.readline())
                if [client["name"] for client in now["clients"]] == ["came"]:
                    break
        assert before["broker"]["pid"] == now["broker"]["pid"] == broker.pid
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 0


@pytest.mark.parametrize("key", [b"q", b"\x03"], ids=["q", "ctrl-c"])
def test_watched_on_a_terminal_it_lives_until_a_key_and_outlives_its_broker(instance: str, key: bytes) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    seen = b""

    def shown(words: bytes) -> bool:
        nonlocal seen
        with contextlib.suppress(OSError):  # nobody is at the other end any more
            while select.select([ours], [], [], 0)[0]:
                seen += os.read(ours, 65536)
        return words in seen

    def controlling() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    with broker_process(instance) as broker:
        command = [*COMMAND, "--instance", instance, "--watch", "--interval", "0.1"]
        process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=controlling)
        os.close(theirs)
        try:
            wait_until(lambda: shown(f"broker pid {broker.pid}".encode()))
            broker.terminate()
            broker.wait(300)
            wait_until(lambda: shown(b"no broker answers"))
            with broker_process(instance) as another:
                wait_until(lambda: shown(f"broker pid {another.pid}".encode()))
                os.write(ours, key)
                wait_until(lambda: shown(b"") and process.poll() is not None)
            assert process.returncode == 0
            assert b"Traceback" not in seen
        finally:
            process.kill()
            process.wait()
            os.close(ours)


def test_a_first_look_without_a_broker_is_an_error(instance: str) -> None:
    done = run(*COMMAND, "--watch", "--instance", instance)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: no broker answers for instance {instance!r}")
