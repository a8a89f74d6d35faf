"""Locking an instance for life, so that it has one broker: two on one socket would steal each other's clients without a word."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from shmbroker.errors import InstanceInUse


class InstanceLock:
    """The lock of ``instance`` on the file ``path``, from here to :meth:`release`; the kernel drops it when this process dies.

    The file goes with the lock. Whoever opened it before and locks it after has a file without a name, and another broker may lock a new one of
    that name: so who has the lock looks whether the name still is that of its file, and otherwise begins anew.

    Raises :class:`InstanceInUse`, which names the process that has it.
    """

    def __init__(self, path: Path, instance: str) -> None:
        self._path = path
        self._fd = -1
        while self._fd < 0:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = os.read(fd, 32).decode("ascii", "replace").strip()
                os.close(fd)
                raise InstanceInUse(
                    f"a broker already serves instance {instance!r} (pid {pid}): use it, stop it, or choose another --instance"
                ) from None
            if self._is_named(fd):
                self._fd = fd
            else:
                os.close(fd)
        os.ftruncate(self._fd, 0)
        os.write(self._fd, f"{os.getpid()}\n".encode())

    def _is_named(self, fd: int) -> bool:
        """Whether ``path`` still names the file that ``fd`` is open on."""
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self._path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let another broker have the instance, and remove the file while it is locked. A second time does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            if self._is_named(fd):
                with contextlib.suppress(
                    OSError
                ):  # a folder that may not be written any more: the next broker locks the file that is there
                    self._path.unlink()
            os.close(fd)
