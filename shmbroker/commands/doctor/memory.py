"""Shared memory: room, what is left behind, who may read it, and the limits on it."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

from shmbroker.commands.doctor.check import Check, content, fail, ok, warn
from shmbroker.control.access import UNIX
from shmbroker.control.endpoint import runtime_dir
from shmbroker.memory import names
from shmbroker.memory.hold import is_held
from shmbroker.memory.reaper import objects
from shmbroker.settings.schema import Settings
from shmbroker.settings.sizes import mib, parse_bytes

_OTHERS = stat.S_IRWXO
_MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_NO_LIMIT = 1 << 60
"""What version 1 of cgroups says is no limit is a little below 2^63."""

_SHMEM_PAGES = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"

_LARGER = (
    "docker run --shm-size=2g; Kubernetes: an emptyDir of medium Memory at /dev/shm; elsewhere: mount -o remount,size=2G /dev/shm; or ask for "
    "a smaller --arena"
)


def checks(settings: Settings, instance: str) -> Iterator[Check]:
    """All of this family."""
    arena = parse_bytes(settings.arena)
    yield _room(arena)
    yield from _cgroup_limit(arena)
    yield _orphans()
    yield _permissions(settings, instance)
    yield _memlock(arena)
    yield _huge_pages()


def _room(arena: int) -> Check:
    where = names.SHM_DIR
    try:
        space = os.statvfs(where)
    except OSError as error:
        return fail("/dev/shm", f"{where} cannot be used: {error.strerror}", f"mount -t tmpfs tmpfs {where}")
    total, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    text = f"{mib(total)}, {mib(free)} free"
    figures = {"total_bytes": total, "free_bytes": free, "arena_bytes": arena}
    if not os.access(where, os.R_OK | os.W_OK | os.X_OK):
        return fail("/dev/shm", f"user {os.geteuid()} may not write in {where}", f"chmod 1777 {where}", **figures)
    if total < arena:
        return fail("/dev/shm", f"{text}: less than one client's arena of {mib(arena)}", _LARGER, **figures)
    if free < arena:
        return fail(
            "/dev/shm",
            f"{text}: not enough for another client's arena of {mib(arena)}",
            f"run 'shmbroker gc', remove what fills it (ls -l {where}), or make it larger: {_LARGER}",
            **figures,
        )
    return ok("/dev/shm", text, **figures)


def _cgroup_limit(arena: int) -> Iterator[Check]:
    for path in _MEMORY_LIMITS:
        told = content(path)
        if told.isdecimal() and int(told) < _NO_LIMIT:
            limit = int(told)
            if limit < 2 * arena:
                yield warn(
                    "memory limit",
                    f"this cgroup may use {mib(limit)}, and shared memory counts: an arena takes {mib(arena)} of it",
                    "raise the container's memory limit, or ask for a smaller --arena",
                    limit_bytes=limit,
                )
            else:
                yield ok("memory limit", f"this cgroup may use {mib(limit)}, shared memory included", limit_bytes=limit)
            return


def _orphans() -> Check:
    orphans, foreign = [], 0
    nbytes = 0
    try:
        for name in objects():
            try:
                if not is_held(name.path) and os.path.exists(name.path):
                    nbytes += os.stat(name.path).st_blocks * 512
                    orphans.append(name)
            except PermissionError:
                foreign += 1
            except FileNotFoundError:
                continue
    except OSError:
        return warn("orphans", f"{names.SHM_DIR} cannot be listed", f"chmod 1777 {names.SHM_DIR}")
    others = f"; {foreign} objects of other users could not be looked at" if foreign else ""
    if not orphans:
        return ok("orphans", f"nothing is left behind by processes that died{others}", orphans=[])
    told = ", ".join(name.file for name in orphans[:3]) + (", ..." if len(orphans) > 3 else "")
    instances = sorted({name.instance for name in orphans})
    remedy = f"shmbroker gc --instance {instances[0]}" if len(instances) == 1 else "shmbroker gc --all"
    text = f"{len(orphans)} objects that no living process holds, {mib(nbytes)}: {told}{others}"
    return warn("orphans", text, remedy, orphans=[name.file for name in orphans], bytes=nbytes)


def _permissions(settings: Settings, instance: str) -> Check:
    paths = [Path(name.path) for name in objects(instance)] if os.path.isdir(names.SHM_DIR) else []
    folder = runtime_dir()
    if settings.control == UNIX:
        paths += [folder, *folder.glob(f"{instance}.sock"), *folder.glob(f"{instance}.*.*.sock")]
    looked_at, open_to_all = 0, []
    for path in paths:
        try:
            mode = path.lstat().st_mode
        except OSError:
            continue
        looked_at += 1
        if mode & _OTHERS:
            open_to_all.append(path)
    if open_to_all:
        told = ", ".join(map(str, open_to_all))
        return fail(
            "permissions",
            f"anybody on this machine may use {told}",
            f"chmod o= {' '.join(map(str, open_to_all))}; what was in them may have been read",
        )
    if folder.is_dir() and not os.access(folder, os.X_OK):
        return warn(
            "permissions", f"user {os.geteuid()} may not enter {folder}", "run as the user of the broker, or start that with --group"
        )
    return ok("permissions", f"{looked_at} sockets and segments of instance {instance!r}, none open to all users")


def _memlock(arena: int) -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return ok("memlock", "unlimited")
    text = f"{mib(soft)} may be locked"
    if soft < arena and os.path.exists("/dev/nvidiactl"):
        remedy = "docker run --ulimit memlock=-1; systemd: LimitMEMLOCK=infinity; shell: ulimit -l unlimited"
        return warn("memlock", f"{text}: less than the arena, which a GPU worker would pin", remedy, limit_bytes=soft)
    return ok("memlock", f"{text}; only pinning for a GPU would need more", limit_bytes=soft)


def _huge_pages() -> Check:
    told = content(_SHMEM_PAGES)
    chosen = told.partition("[")[2].partition("]")[0]
    if not chosen:
        return ok("huge pages", "the kernel has none for shared memory")
    hint = (
        ""
        if chosen in ("always", "within_size", "force")
        else f"; the first touch of a large arena is faster with: echo within_size > {_SHMEM_PAGES}"
    )
    return ok("huge pages", f"for shared memory: {chosen}{hint}", shmem_enabled=chosen)
