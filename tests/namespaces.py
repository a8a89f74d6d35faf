"""Giving a forked child of a test another place in the world: a small ``/dev/shm`` of its own, or another user."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from collections.abc import Callable

from shmbroker.memory import names

_CLONE_NEWNS = 0x00020000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_libc = ctypes.CDLL(None, use_errno=True)


def enter_small_shm(nbytes: int) -> None:
    """Mount a tmpfs of ``nbytes`` over /dev/shm, in a mount namespace of this process and its children alone. Needs root."""
    size = f"size={nbytes}".encode()
    shm = names.SHM_DIR.encode()
    for failed in (
        _libc.unshare(_CLONE_NEWNS),
        _libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None),
        _libc.mount(b"tmpfs", shm, b"tmpfs", 0, size),
    ):
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def become(uid: int, gid: int, groups: tuple[int, ...] = ()) -> None:
    """Be another user from now on. Needs root. What was imported before stays, though the user may not read its files."""
    os.setgroups(groups)
    os.setgid(gid)
    os.setuid(uid)


def possible(change: Callable[..., None], *arguments: object) -> bool:
    """Whether a child process may do ``change``."""
    child = multiprocessing.get_context("fork").Process(target=_quietly, args=(change, *arguments))
    child.start()
    child.join()
    try:
        return child.exitcode == 0
    finally:
        child.close()


def _quietly(change: Callable[..., None], *arguments: object) -> None:
    try:
        change(*arguments)
    except OSError:
        os._exit(1)
