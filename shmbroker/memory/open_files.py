"""How many files this process may have open, and how many it has: what is asked before something is begun that cannot be broken off."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Iterator

from shmbroker.errors import TooManyOpenFiles

_EXHAUSTED = (errno.EMFILE, errno.ENFILE)
_EXHAUSTED_WORDS = ("maximum number of files", "total number of open files")
"""What posix_ipc says of the two, without a number."""

_OWN_FILES = "/proc/self/fd"


def file_limit() -> int:
    """Files that this process may have open now (the soft limit of RLIMIT_NOFILE)."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_file_limit() -> int:
    """Raise the soft limit to the hard one, as any process may. Returns what holds then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # a sandbox may forbid even this
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return file_limit()


def open_files() -> int:
    """Files that this process has open. Where that cannot be looked up, at least so many."""
    try:
        return len(os.listdir(_OWN_FILES)) - 1  # the one that lists
    except OSError as error:
        if is_exhaustion(error):
            return file_limit()
    fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)  # no /proc here: a new file has the lowest number that is free
    os.close(fd)
    return fd


def is_exhaustion(error: BaseException) -> bool:
    """Whether it says that no file could be opened, because this process, or the machine, has as many as it may have."""
    return getattr(error, "errno", None) in _EXHAUSTED or any(word in str(error) for word in _EXHAUSTED_WORDS)


def require_files(count: int, what: str) -> None:
    """Raise :class:`TooManyOpenFiles` unless ``count`` more files can be opened, for ``what``.

    libzmq ends the process where it finds none in the midst of what it does, so it is not to begin.
    """
    opened, limit = open_files(), file_limit()
    if opened + count > limit:
        raise TooManyOpenFiles(_advice(f"{what} takes up to {count} open files; process {os.getpid()} has {opened} of {limit}"))


@contextlib.contextmanager
def telling_exhaustion(what: str) -> Iterator[None]:
    """A block whose errors say what to do where a file could not be opened: they are raised as :class:`TooManyOpenFiles`."""
    try:
        yield
    except TooManyOpenFiles:
        raise
    except Exception as error:
        if not is_exhaustion(error):
            raise
        raise TooManyOpenFiles(
            _advice(f"no file could be opened for {what} ({error}); process {os.getpid()} may have {file_limit()} open")
        ) from None


def _advice(found: str) -> str:
    return f"{found}: close what is not needed, or raise the limit (ulimit -n; systemd: LimitNOFILE=; docker run --ulimit nofile=)"
