"""Where segments lie: in POSIX shared memory, or where ``$SHMBROKER_SEGMENTS`` says: a folder, or one file, that every process can map.

A folder may be of any file system whose files can be mapped (a tmpfs of its own, virtiofs with DAX); each segment is a file in it. One file (the
memory of an ivshmem device, or a plain file) holds one segment at a time. All processes of an instance must be told the same memory, under whatever path
they see it.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import stat
from typing import Protocol

import posix_ipc

from shmbroker.errors import BadInput, SegmentError
from shmbroker.memory import names
from shmbroker.memory.hold import unlink_own
from shmbroker.settings.load import current

VARIABLE = "SHMBROKER_SEGMENTS"
PREFIX = "path:"


class SegmentStore(Protocol):
    """Makes, opens and unlinks the files of segments. Names are those of :func:`names.segment_name`, wherever it is."""

    folder: str | None
    """Where a reaper looks for segments that nobody holds; None where there is nothing to unlink."""

    def __str__(self) -> str:
        """For messages."""

    def path(self, name: str) -> str:
        """The file of segment ``name``."""

    def create(self, name: str, mode: int) -> int:
        """A descriptor of a new, empty segment. Raises :class:`SegmentError`."""

    def open(self, name: str) -> int:
        """A descriptor of a segment that is there. Raises FileNotFoundError, PermissionError."""

    def unlink(self, name: str) -> None:
        """Take the name away; a name already gone is fine."""

    def unlink_own(self, name: str) -> None:
        """Take the name away, unless somebody holds the segment."""


class PosixStore:
    """POSIX shared memory."""

    folder: str | None = names.SHM_DIR

    def __str__(self) -> str:
        return names.SHM_DIR

    def path(self, name: str) -> str:
        """Below ``/dev/shm``, where glibc and musl keep it on Linux."""
        return names.SHM_DIR + name

    def create(self, name: str, mode: int) -> int:
        """As ``shm_open``."""
        return int(posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=mode).fd)

    def open(self, name: str) -> int:
        """As ``shm_open``."""
        try:
            return int(posix_ipc.SharedMemory(name).fd)
        except posix_ipc.ExistentialError:
            raise FileNotFoundError(errno.ENOENT, name) from None
        except posix_ipc.PermissionsError:
            raise PermissionError(errno.EACCES, name) from None

    def unlink(self, name: str) -> None:
        """As ``shm_unlink``."""
        try:
            posix_ipc.unlink_shared_memory(name)
        except posix_ipc.ExistentialError:
            pass

    def unlink_own(self, name: str) -> None:
        """After its hold was released."""
        unlink_own(self.path(name))


class FolderStore:
    """A folder with a file for each segment."""

    def __init__(self, folder: str) -> None:
        self.folder: str | None = folder
        self._folder = folder

    def __str__(self) -> str:
        return self._folder

    def path(self, name: str) -> str:
        """In the folder."""
        return self._folder + name

    def create(self, name: str, mode: int) -> int:
        """A new file."""
        return os.open(self.path(name), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)

    def open(self, name: str) -> int:
        """A file that is there."""
        return os.open(self.path(name), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)

    def unlink(self, name: str) -> None:
        """Remove the file."""
        try:
            os.unlink(self.path(name))
        except FileNotFoundError:
            pass

    def unlink_own(self, name: str) -> None:
        """After its hold was released."""
        unlink_own(self.path(name))


class FileStore:
    """One file, or device, that holds one segment at a time and stays when it ends."""

    folder: str | None = None

    def __init__(self, file: str) -> None:
        self._file = file

    def __str__(self) -> str:
        return self._file

    def path(self, name: str) -> str:
        """Always the same."""
        return self._file

    def create(self, name: str, mode: int) -> int:
        """The file, if nobody holds the segment that was in it."""
        fd = os.open(self._file, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise SegmentError(
                f"{self._file} holds one segment, and a client has it: end that client, or give ${VARIABLE} a folder, where each client has a file"
            ) from None
        return fd

    def open(self, name: str) -> int:
        """The file."""
        return os.open(self._file, os.O_RDWR | os.O_CLOEXEC)

    def unlink(self, name: str) -> None:
        """Nothing is to be taken away: the next segment is written over this one."""

    def unlink_own(self, name: str) -> None:
        """Neither here."""


def store() -> SegmentStore:
    """The store of this process, as ``$SHMBROKER_SEGMENTS`` says. Raises :class:`BadInput` for what cannot be."""
    return _store_at(current().segments)


@functools.lru_cache(maxsize=4)
def _store_at(told: str) -> SegmentStore:
    if not told:
        return PosixStore()
    path = told.removeprefix(PREFIX)
    if not told.startswith(PREFIX) or not os.path.isabs(path):
        raise BadInput(
            f"${VARIABLE} is {told!r}: give {PREFIX} and an absolute path, e.g. {PREFIX}/mnt/shared; or unset it for {names.SHM_DIR}"
        )
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise BadInput(f"${VARIABLE} is {told!r}: {error.strerror}; mount it, or make the folder or file first") from None
    return FolderStore(path.rstrip("/")) if stat.S_ISDIR(mode) else FileStore(path)
