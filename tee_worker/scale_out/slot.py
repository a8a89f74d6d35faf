"""The name of a replica's instance: fixed by its host, its folder and a slot, so that whoever comes next reaps what the last one left."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
from pathlib import Path

from shmbroker.control.endpoint import make_private_dir, runtime_dir
from shmbroker.control.instance_lock import InstanceLock
from shmbroker.errors import BadInput, InstanceInUse

MOST_SLOTS = 64
"""Replicas on one host."""

LONGEST_HOST = 19
"""Of an instance's 31 characters."""

_HOST_DIGEST = 8
_FOLDER_DIGEST = 4
"""Two who have folders of their own share the host's memory: neither may take the other's names."""


def host_word(host: str) -> str:
    """A host's name as part of an instance's; one that cannot be, with a digest of it instead of what is cut or changed."""
    word = re.sub(r"[^a-z0-9-]", "-", host.lower())
    if word == host and len(word) <= LONGEST_HOST and word:
        return word
    return f"{word[: LONGEST_HOST - _HOST_DIGEST - 1]}-{_digest(host)[:_HOST_DIGEST]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def instances(folder: Path, host: str | None = None) -> list[str]:
    """The names of all slots, in the order in which they are taken."""
    word = host_word(socket.gethostname() if host is None else host)
    return [f"ray-{word}-{_digest(str(folder))[:_FOLDER_DIGEST]}-{number}" for number in range(MOST_SLOTS)]


def sockets_folder() -> Path:
    """Of all replicas of this user on this host: not the machine's own, which others may share."""
    return runtime_dir() / f"ray-{os.geteuid()}"


class Slot:
    """One of this host's, from here to :meth:`release`, or the end of this process. Raises :class:`BadInput` where none is free."""

    def __init__(self, folder: Path, host: str | None = None) -> None:
        make_private_dir(folder)
        self.folder = folder
        for self.instance in instances(folder, host):
            with contextlib.suppress(InstanceInUse):
                self._lock = InstanceLock(folder / f"{self.instance}.slot", self.instance)
                return
        raise BadInput(f"{MOST_SLOTS} replicas are on this host already: spread them over more hosts")

    def clear(self) -> None:
        """Remove the sockets and files of the instance, whose processes are gone."""
        for path in self.folder.glob(f"{self.instance}.*"):
            if path.suffix != ".slot":
                path.unlink(missing_ok=True)

    def release(self) -> None:
        """Let another replica have it."""
        self._lock.release()
