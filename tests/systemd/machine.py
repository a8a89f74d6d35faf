"""A system manager of the test's own: systemd as process 1 of new namespaces, with the units under test and nothing else."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.processes import wait_until
from tests.systemd.boot import IMPOSSIBLE, SYSTEMD

ROOT = Path(__file__).parents[2]
BOOT_SECONDS = 300.0
"""systemd is up in half a second on an idle machine."""

COMMAND_SECONDS = 600.0

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Machine:
    """A running systemd. ``pid``: of its process 1, as seen from here."""

    pid: int

    def run(self, *command: str, seconds: float = COMMAND_SECONDS) -> subprocess.CompletedProcess[str]:
        """Run a program inside, as root."""
        inside = ["nsenter", "-t", str(self.pid), "-m", "-p", "-i", "-u", "-C", "--", *command]
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "SYSTEMD_PAGER": "", "SYSTEMD_COLORS": "0"}
        return subprocess.run(
            inside, capture_output=True, text=True, timeout=seconds, check=False, env=environment, stdin=subprocess.DEVNULL
        )

    def systemctl(self, *arguments: str) -> str:
        """What it prints. Fails where it fails."""
        done = self.run("systemctl", *arguments)
        assert done.returncode == 0, f"systemctl {' '.join(arguments)}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout.strip()

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.systemctl("show", "--value", "-p", name, unit)

    def main_pid(self, unit: str) -> int:
        """The pid inside of a unit's main process; 0 where none runs."""
        return int(self.show(unit, "MainPID"))

    def signal(self, unit: str, name: str) -> None:
        """Send a signal to the main process of a unit alone."""
        self.systemctl("kill", "--kill-whom=main", f"--signal={name}", unit)

    def path(self, inside: str) -> Path:
        """A path inside as one from here."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def said(self, unit: str) -> str:
        """What a unit has written to standard output."""
        return self._read(f"/run/log/{unit}.log")

    def complained(self, unit: str) -> str:
        """What a unit has written to standard error."""
        return self._read(f"/run/log/{unit}.err")

    def _read(self, inside: str) -> str:
        path = self.path(inside)
        return path.read_text(errors="replace") if path.exists() else ""

    def logs(self) -> str:
        """What all units have written, for a failure's message."""
        files = [self.path("/dev/console"), *sorted(self.path("/run/log").iterdir())]
        return "".join(f"\n--- {file.name}\n{file.read_text(errors='replace')[-4000:]}" for file in files)

    def shared_memory(self) -> list[str]:
        """What lies in its /dev/shm."""
        return sorted(os.listdir(self.path("/dev/shm")))


def why_not() -> str:
    """Why there can be no machine here; empty where it may be tried."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [program for program in (SYSTEMD, "unshare", "nsenter", "systemctl", "systemd-sysusers") if shutil.which(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if platform.machine() != "x86_64":
        return "x86-64 only"
    if _cgroups() is None:
        return "no cgroup v2 mounted"
    return ""


@contextlib.contextmanager
def machine(folder: Path, units: Path, *visible: Path) -> Iterator[Machine]:
    """A machine with the files in ``units`` and below as its units. Skips the test where the kernel, or a container, does not allow one."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    cgroups = _cgroups()
    assert cgroups is not None
    group = cgroups / f"shmbroker-test-{os.getpid()}-{time.monotonic_ns()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made: {error}")
    scratch = folder / "machine"
    scratch.mkdir()
    programs = {ROOT, Path(sys.prefix), Path(sys.base_prefix), *visible}
    boot = [sys.executable, str(Path(__file__).with_name("boot.py")), str(scratch), str(units), *map(str, programs)]
    command = ["unshare", "--pid", "--mount", "--cgroup", "--ipc", "--uts", "--propagation", "private", "--fork", "--kill-child", *boot]

    def join() -> None:
        # Before the namespace of cgroups is made: systemd moves every process of its root.
        (group / "cgroup.procs").write_text(str(os.getpid()))
        # A test run that is killed takes the machine with it.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    said = folder / "systemd.log"
    try:
        process = _start(command, join, said)
        try:
            yield Machine(_up(process, said))
        finally:
            if process.poll() is None:
                for child in _children(process.pid):
                    os.kill(child, signal.SIGKILL)
            process.wait(BOOT_SECONDS)
    finally:
        _remove(group)


def _start(command: list[str], before: Callable[[], None], said: Path) -> subprocess.Popen[bytes]:
    with said.open("wb") as log:
        try:
            return subprocess.Popen(command, preexec_fn=before, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        except subprocess.SubprocessError as error:
            pytest.skip(f"no process can be started in a cgroup of its own: {error}")


def _up(process: subprocess.Popen[bytes], said: Path) -> int:
    """Wait until systemd has started; returns the pid of its process 1."""
    until = time.monotonic() + BOOT_SECONDS
    while True:
        status = process.poll()
        if status == IMPOSSIBLE or (status is not None and "unshare failed" in said.read_text()):
            pytest.skip(f"no namespaces for a systemd of its own: {said.read_text().strip()}")
        assert status is None, f"systemd ended with status {status}: {said.read_text()}"
        for pid in _children(process.pid):
            if Path(f"/proc/{pid}/comm").read_text().strip() == "systemd":
                found = Machine(pid)
                state = found.run("systemctl", "is-system-running").stdout.strip()
                if state in ("running", "degraded", "starting") and found.run("systemctl", "is-active", "basic.target").returncode == 0:
                    return pid
        assert time.monotonic() < until, f"systemd was not up within {BOOT_SECONDS:g} s: {said.read_text()}"
        time.sleep(0.05)


def _children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def _cgroups() -> Path | None:
    """Where cgroup v2 is mounted."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.startswith("cgroup2 "):
            return Path(before.split()[4])
    return None


def _remove(group: Path) -> None:
    folders = sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True)

    def gone() -> bool:
        for folder in (*folders, group):
            with contextlib.suppress(OSError):
                folder.rmdir()
        return not group.exists()

    wait_until(gone)
