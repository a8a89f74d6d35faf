"""Whether a process lives, told by the kernel and not by its silence: by pidfd, and in another pid namespace by what it holds or listens on."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from pathlib import Path

from shmbroker.control.messages import ProcessId
from shmbroker.memory.open_files import is_exhaustion

_START_TIME_FIELD = 19
"""Of ``/proc/PID/stat``, counted after the command's closing bracket (proc(5), field 22)."""


def _start_time(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_bytes()
    return int(stat[stat.rindex(b")") + 2 :].split()[_START_TIME_FIELD])


def _namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def this_process() -> ProcessId:
    """The caller's own identity, to be told to others."""
    return process_of(os.getpid())


def process_of(pid: int) -> ProcessId:
    """The identity of a process of this pid namespace; of one that has ended already, an identity that is not alive."""
    try:
        start_time = _start_time(pid)
    except (FileNotFoundError, ProcessLookupError):
        start_time = 0
    return ProcessId(pid, start_time, _namespace())


class Watch:
    """Watches one process, for any thread that asks. ``fd`` becomes readable when it ends; -1 when it cannot be watched by its pid from here."""

    __slots__ = ("_dead", "_otherwise", "fd")

    def __init__(self, process: ProcessId, otherwise: Callable[[], bool] | None = None) -> None:
        """``otherwise``: what else tells whether it lives, asked where its pid tells nothing. It must be the kernel's word: never how long it is silent."""
        self.fd = -1
        self._dead = False
        self._otherwise = otherwise
        if process.namespace != _namespace():
            return  # its pid means nothing here
        try:
            self.fd = os.pidfd_open(process.pid)
            if _start_time(process.pid) != process.start_time:
                raise ProcessLookupError
        except (ProcessLookupError, FileNotFoundError):
            self._dead = True
        except OSError as error:
            self._close_fd()
            if is_exhaustion(error):
                raise
            # else no pidfd on this kernel or in this sandbox

    @property
    def tells(self) -> bool:
        """Whether an end would be noticed; else whoever watches is told by others."""
        return self._dead or self.fd >= 0 or self._otherwise is not None

    def alive(self) -> bool:
        """False once the process has ended; True while it lives or cannot be watched."""
        fd = self.fd
        if self._dead:
            return False
        if fd < 0:
            self._dead = self._otherwise is not None and not self._otherwise()
        else:
            poll = select.poll()  # one for each look: an object of this kind refuses a second thread
            poll.register(fd, select.POLLIN)
            if any(events & select.POLLIN for _, events in poll.poll(0)):
                self._dead = True
        return not self._dead

    def close(self) -> None:
        """Stop watching: from now on it counts as one that lives."""
        self._otherwise = None
        self._close_fd()

    def _close_fd(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def age_of(process: ProcessId) -> float:
    """Seconds since the process was started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - process.start_time / os.sysconf("SC_CLK_TCK")
