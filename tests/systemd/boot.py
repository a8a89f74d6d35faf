"""Process 1 of new namespaces: builds a root for it out of the machine's own, and becomes systemd.

Every write goes to a tmpfs: the machine that the tests run on is not changed. Run by ``tests.systemd.machine``, with a scratch folder, the folder of units,
and whatever else must be visible at its own path.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

SYSTEMD = "/lib/systemd/systemd"
IMPOSSIBLE = 77
"""Exit status when this kernel, or this container, does not allow it; the reason is on standard error."""

DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
MISSING_STUBS = ("basic", "sysinit", "shutdown", "sockets", "timers", "multi-user", "exit")
"""Targets that everything hangs on. Those of the machine would start what has no business here."""

_PIVOT_ROOT = 155
"""System call number on x86-64."""


def mount(kind: str, target: Path, options: str = "", source: str = "none") -> None:
    command = ["mount", "-t", kind, *(["-o", options] if options else []), source, str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


def bind(source: Path, target: Path) -> None:
    done = subprocess.run(["mount", "--bind", str(source), str(target)], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"binding {source}: {done.stderr.strip()}")


def build(scratch: Path, units: Path, visible: list[Path]) -> Path:
    """The new root: the machine's as an overlay, with /dev, /proc, /run, /dev/shm and cgroups of its own."""
    mount("tmpfs", scratch)
    upper, work, root = scratch / "upper", scratch / "work", scratch / "root"
    for folder in (upper, work, root):
        folder.mkdir()
    upper.chmod(0o755)
    mount("overlay", root, f"lowerdir=/,upperdir={upper},workdir={work}")
    for path in visible:
        if os.lstat(path).st_dev != os.stat("/").st_dev:  # mounted: the overlay shows an empty folder
            inside = root / path.relative_to("/")
            inside.mkdir(parents=True, exist_ok=True)
            bind(path, inside)
    mount("proc", root / "proc")
    mount("sysfs", root / "sys")
    mount("cgroup2", root / "sys/fs/cgroup")
    devices = root / "dev"
    mount("tmpfs", devices, "mode=755")
    for name in DEVICES:
        (devices / name).touch()
        bind(Path("/dev") / name, devices / name)
    (devices / "console").touch()
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2"), ("ptmx", "pts/ptmx")):
        (devices / name).symlink_to(target)
    for name, kind, options in (("pts", "devpts", "newinstance,ptmxmode=0666"), ("shm", "tmpfs", "mode=1777,size=1g")):
        (devices / name).mkdir()
        mount(kind, devices / name, options)
    mount("tmpfs", root / "run", "mode=755")
    shutil.copytree(units, root / "run/units", symlinks=True)
    (root / "run/log").mkdir()
    for name in MISSING_STUBS:
        (root / f"run/units/{name}.target").write_text("[Unit]\nDefaultDependencies=no\n")
    return root


def enter(root: Path) -> None:
    """Make ``root`` the root of this mount namespace."""
    old = root / "mnt"
    os.chdir(root)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_PIVOT_ROOT, os.fsencode(root), os.fsencode(old)):
        raise OSError(ctypes.get_errno(), f"pivot_root: {os.strerror(ctypes.get_errno())}")
    os.chdir("/")
    subprocess.run(["umount", "-l", "/mnt"], check=True)


def main() -> None:
    scratch, units, *visible = map(Path, sys.argv[1:])
    try:
        enter(build(scratch, units, visible))
    except (OSError, subprocess.SubprocessError) as error:
        print(error, file=sys.stderr)
        sys.exit(IMPOSSIBLE)
    environment = {
        "container": "test",
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "SYSTEMD_UNIT_PATH": "/run/units",
        "SYSTEMD_GENERATOR_PATH": "/nonexistent",
    }
    options = ["--system", "--unit=basic.target", "--log-target=console", "--log-color=no", "--show-status=no"]
    os.execve(SYSTEMD, [SYSTEMD, *options], environment)


if __name__ == "__main__":
    main()
