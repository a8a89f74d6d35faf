"""Names of the objects in shared memory: ``/shmbroker.<instance>.<kind>.<random>``, so that one look at ``/dev/shm`` tells what is whose."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from shmbroker.errors import BadInput

SHM_DIR = "/dev/shm"
"""Where glibc and musl keep POSIX shared memory and named semaphores on Linux; only the reaper needs to list it."""

SEGMENT, BELL = "segment", "bell"
"""Kinds of objects."""

_SEMAPHORE_PREFIX = "sem."
_INSTANCE = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")
_FILE = re.compile(r"(sem\.)?shmbroker\.(?P<instance>[a-z0-9][a-z0-9-]{0,30})\.(?P<kind>segment|bell)\.(?P<id>[0-9a-f]{16})")


def check_instance(instance: str) -> str:
    """``instance`` itself, or :class:`BadInput` where it could not be part of a name."""
    if not isinstance(instance, str) or not _INSTANCE.fullmatch(instance):
        raise BadInput(f"instance {instance!r} cannot be used: 1 to 31 lower-case letters, digits and '-', e.g. 'default'")
    return instance


def new_id() -> str:
    """A fresh random id for a process or a segment: 16 hexadecimal digits."""
    return secrets.token_hex(8)


def segment_name(instance: str, owner: str) -> str:
    """POSIX name of the segment of client ``owner``."""
    return f"/shmbroker.{instance}.segment.{owner}"


def bell_name(instance: str, owner: str) -> str:
    """POSIX name of the semaphore that process ``owner`` sleeps on."""
    return f"/shmbroker.{instance}.bell.{owner}"


def bell_path(name: str) -> str:
    """The file behind a named semaphore, which can be locked like any other."""
    return f"{SHM_DIR}/{_SEMAPHORE_PREFIX}{name.lstrip('/')}"


@dataclass(frozen=True, slots=True)
class ObjectName:
    """What a file name in ``/dev/shm`` says of the object."""

    file: str
    instance: str
    kind: str
    owner: str
    folder: str = SHM_DIR

    @property
    def path(self) -> str:
        """Where the file lies."""
        return f"{self.folder}/{self.file}"


def parse(file: str, folder: str = SHM_DIR) -> ObjectName | None:
    """The parts of a file name in ``/dev/shm``, or another folder for segments; None for what is not ours."""
    match = _FILE.fullmatch(file)
    if match is None:
        return None
    return ObjectName(file=file, instance=match["instance"], kind=match["kind"], owner=match["id"], folder=folder)
