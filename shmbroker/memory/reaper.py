"""The reaper: unlinks exactly what nobody holds (see :mod:`shmbroker.memory.hold`)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from shmbroker.memory import names
from shmbroker.memory.hold import unlink_if_unheld
from shmbroker.memory.stores import store


@dataclass(frozen=True, slots=True)
class Reaped:
    """An object that was unlinked, and the bytes of memory that it gave back."""

    name: names.ObjectName
    nbytes: int


def objects(instance: str | None = None) -> Iterator[names.ObjectName]:
    """All objects of shmbroker in shared memory, of one instance or of all."""
    for folder in dict.fromkeys([names.SHM_DIR, store().folder]):
        for file in sorted(os.listdir(folder)) if folder is not None else ():
            name = names.parse(file, folder or "")
            if name is not None and instance in (None, name.instance):
                yield name


def unlink_all(instance: str) -> None:
    """Unlink all that lies in shared memory of a private instance that is over, held or not. Living processes keep their memory, without a name."""
    for name in objects(instance):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            os.unlink(name.path)


def reap(instance: str | None = None, owner: str | None = None) -> list[Reaped]:
    """Unlink what nobody holds, of one instance or all, of one owner or all. Objects of other users are passed over."""
    reaped = []
    for name in objects(instance):
        if owner in (None, name.owner):
            try:
                nbytes = unlink_if_unheld(name.path)
            except PermissionError:
                continue
            if nbytes >= 0:
                reaped.append(Reaped(name, nbytes))
    return reaped
