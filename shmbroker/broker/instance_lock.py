"""Locking an instance for life, so that it has one broker: two on one socket would steal each other's clients without a word."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from shmbroker.errors import InstanceInUse


class InstanceLock:
    """The lock of ``instance`` on the file ``path``, from here to :meth:`release`; the kernel drops it when this process dies.

    Raises :class:`InstanceInUse`, which names the process that has it.
    """

    def __init__(self, path: Path, instance: str) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(self._fd, 32).decode("ascii", "replace").strip()
            self.release()
            raise InstanceInUse(
                f"a broker already serves instance {instance!r} (pid {pid}): use it, stop it, or choose another --instance"
            ) from None
        os.ftruncate(self._fd, 0)
        os.write(self._fd, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Let another broker have the instance. The file stays: removing it would let two brokers lock two files of one name."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def remove(self) -> None:
        """Unlink the file, for an instance that no other broker will ever serve; to be called before :meth:`release`."""
        self._path.unlink()
