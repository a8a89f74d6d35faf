"""Versions, compiled parts, and what overrides the settings' defaults."""

from __future__ import annotations

import os
import platform
import resource
import stat
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec

from shmbroker.commands.doctor.check import Check, ok, warn
from shmbroker.lane.ends import COMPILED
from shmbroker.memory import compiled
from shmbroker.settings.load import Loaded
from shmbroker.settings.sizes import mib
from shmbroker.trust.private import swap_in_use
from shmbroker.version import __version__

_PACKAGES = ("torch", "transformers", "pyzmq", "posix_ipc")
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def checks(loaded: Loaded) -> Iterator[Check]:
    """All of this family."""
    yield _versions()
    yield _compiled(loaded)
    yield _trust(loaded)
    yield from _settings(loaded)


def _versions() -> Check:
    versions = {"shmbroker": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "missing"
    missing = [package for package, version in versions.items() if version == "missing"]
    text = ", ".join(f"{package} {version}" for package, version in versions.items())
    if missing:
        return warn("versions", text, f"pip install {' '.join(missing)}, or install shmbroker with its dependencies", **versions)
    return ok("versions", text, **versions)


def _trust(loaded: Loaded) -> Check:
    """What may be started here, and whether pads can be kept from a disk."""
    floor = loaded.settings.trust_floor
    origin = loaded.origins["trust_floor"]
    meaning = _FLOORS[floor]
    text = f"floor {floor!r} ({origin}): {meaning}"
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY and soft < _PADS_BYTES and os.geteuid() != 0 and swap_in_use():
        return warn(
            "trust",
            f"{text}; only {mib(soft)} of memory can be locked, and this machine swaps: pads of --trust blind will be refused",
            "ulimit -l unlimited, LimitMEMLOCK=infinity in the unit, or switch swap off",
            floor=floor,
        )
    return ok("trust", text, floor=floor)


_FLOORS = {
    "plain": "a GPU worker may see every activation and be believed; tee-worker --trust does better (docs/trust.md)",
    "verify": "no GPU worker is believed",
    "shares": "no GPU worker is believed, and none alone sees an activation",
    "blind": "no GPU worker is believed, and none sees an activation",
}

_PADS_BYTES = 1 << 28
"""Of locked memory, that pads for a model of some hundred million weights need."""


def _compiled(loaded: Loaded) -> Check:
    parts = {
        "queues": COMPILED,
        "leases": compiled.WANTED and find_spec("shmbroker.arena._leases") is not None,
        "calls": _calls_are_compiled(),
        "trust loops": compiled.WANTED and find_spec("shmbroker.trust._loops") is not None,
    }
    missing = [part for part, there in parts.items() if not there]
    if not missing:
        return ok("compiled parts", "queues, leases, calls and the loops of the trust modes are compiled", **parts)
    if loaded.settings.pure_python:
        return warn(
            "compiled parts",
            f"not used, because pure_python is set by {loaded.origins['pure_python']}: a call costs some 50 us more",
            "unset it, unless Python is what you want to measure",
            **parts,
        )
    return warn(
        "compiled parts",
        f"{' and '.join(missing)} in Python: not built, or built from another release" + _OLD_TORCH * (missing == ["calls"]),
        "install a C compiler and run 'pip install --force-reinstall --no-deps .' in the source tree",
        **parts,
    )


_OLD_TORCH = ", or torch is older than 2.10 and has no exchange of tensors in C"


def _calls_are_compiled() -> bool:
    from shmbroker.call import compiled_op
    from shmbroker.worker.counters import STEPS_COMPILED

    return compiled_op.COMPILED and STEPS_COMPILED


def _settings(loaded: Loaded) -> Iterator[Check]:
    chosen = {name: loaded.origins[name] for name in loaded.chosen()}
    if chosen:
        told = ", ".join(f"{name} by {origin}" for name, origin in chosen.items())
        yield ok("settings", f"set: {told}", **chosen)
    else:
        yield ok("settings", "all at their defaults, no file and no variable")
    for path in loaded.files:
        if os.stat(path).st_mode & _WRITABLE_BY_OTHERS and path.is_file():
            yield warn("settings", f"{path} can be written by others than its owner", f"chmod go-w {path}")
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    if policy.upper() == "ACTIVE":
        yield warn(
            "settings",
            "OMP_WAIT_POLICY=ACTIVE lets idle compute threads spin: processes that take turns on the same cores slow each other down",
            "unset OMP_WAIT_POLICY: the commands then set PASSIVE",
        )
