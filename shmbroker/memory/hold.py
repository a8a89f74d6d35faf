"""Holding an object in shared memory: a shared ``flock`` on its file, which the kernel drops when the holder dies, however it dies.

H1  Who uses an object for life (a client its segment, every process its doorbell) holds it.
H2  The reaper unlinks an object only while it has the exclusive lock, so exactly what nobody holds.
H3  After taking a hold, the holder checks that the object still has its name: if the reaper came between, it is told so.
H4  Where a process cannot lock (a TEE runtime without ``flock``, or one whose locks nobody else sees), the broker holds for it while it lives.
H5  A hold ends with its process and not before, however long that is silent: so a holder whose pid means nothing here is watched by its hold. The lock
    belongs to the file and not to its name, which may be removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
import weakref

LOCK_SECONDS = 1.0
"""How long a reaper's exclusive lock may stand in the way of a hold: it needs microseconds, so longer means foul play."""

_SURE_LOOKS, _SURE_SECONDS = 3, 0.001
"""Looks, and the pause between two, after which a lock is no reaper's: one has it for some 20 us."""

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""What a system without ``flock`` answers."""

_holds: weakref.WeakSet[Hold] = weakref.WeakSet()


class Hold:
    """A shared lock on an open file, kept until :meth:`release` or death. Not inherited: a forked child's copy is closed."""

    __slots__ = ("__weakref__", "fd")

    def __init__(self, fd: int) -> None:
        """Take over ``fd``. Raises FileNotFoundError when the file was unlinked before the lock was had (H3)."""
        self.fd = fd
        try:
            _lock_shared(fd)
            if os.fstat(fd).st_nlink == 0:
                raise FileNotFoundError("unlinked before it could be held")
        except BaseException:
            self.release()
            raise
        _holds.add(self)

    @classmethod
    def on(cls, path: str) -> Hold:
        """Hold the file at ``path``."""
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC))

    def __del__(self) -> None:
        self.release()

    def is_at(self, path: str) -> bool:
        """Whether ``path`` still names the file that is held, and not nothing or another one."""
        try:
            return os.path.samestat(os.stat(path), os.fstat(self.fd))
        except OSError:
            return False

    def release(self) -> None:
        """Give the hold up; a second time does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def _lock_shared(fd: int) -> None:
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.001)  # the reaper's whole turn is shorter than this
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return None  # H4


def _open_file(path: str) -> int:
    """A descriptor of a plain file; -1 for one that is gone or for anything else, which somebody may have put there to be stumbled over.

    Raises PermissionError, and OSError where no file can be opened at all: of such a file nothing is known.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        if isinstance(error, PermissionError) or error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        return -1
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    return -1


def is_held(path: str) -> bool:
    """Whether any living process holds the file. False also when it is gone."""
    fd = _open_file(path)
    if fd < 0:
        return False
    try:
        return _is_locked(fd)
    finally:
        os.close(fd)


def is_surely_held(path: str) -> bool:
    """:func:`is_held`, and not by a reaper that looks at the same moment. For whoever acts on a hold rather than on its end."""
    for _ in range(_SURE_LOOKS):
        if not is_held(path):
            return False
        time.sleep(_SURE_SECONDS)
    return True


def _is_locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


class HoldWatch:
    """Tells whether somebody still holds the file that is at a path now, also when that is taken away (H5). For any thread that asks."""

    __slots__ = ("fd",)

    def __init__(self, path: str) -> None:
        """Raises OSError where the file cannot be opened, FileNotFoundError also where nobody holds it: it would tell nothing."""
        self.fd = -1
        if not is_surely_held(path):
            raise FileNotFoundError(errno.ENOENT, "held by nobody", path)
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)

    def held(self) -> bool:
        """False once its last holder has let go of it or died."""
        fd = self.fd
        return fd < 0 or _is_locked(fd)

    def __del__(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def unlink_if_unheld(path: str) -> int:
    """Unlink the file unless somebody holds it (H2). Returns the bytes given back, -1 if it is held, gone, or no plain file."""
    fd = _open_file(path)
    if fd < 0:
        return -1
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.fstat(fd)
        if found.st_nlink == 0:
            return -1
        # fault: before segment unlinked
        os.unlink(path)
        # fault: after segment unlinked
        return found.st_blocks * 512
    except BlockingIOError:
        return -1
    finally:
        os.close(fd)


def unlink_own(path: str) -> None:
    """Unlink an object whose hold was just released. Where another user's broker made it, that one reaps it."""
    with contextlib.suppress(PermissionError):
        unlink_if_unheld(path)


def _forget_in_child() -> None:
    # A lock belongs to the open file, which a forked child shares: its copy would keep a dead parent's objects alive.
    for hold in list(_holds):
        hold.release()


os.register_at_fork(after_in_child=_forget_in_child)
