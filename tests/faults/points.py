"""Fault points: comments ``# fault: NAME`` in the package's source, which cost nothing, and become calls only where :func:`install` was called.

A point is armed with the number of times that it may be passed; then the process is killed there, as by the kernel's own hand.
"""

from __future__ import annotations

import builtins
import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType

ROOT = Path(__file__).parents[2]
_MARKER = re.compile(r"^( *)# fault: (.+)$", re.MULTILINE)

_armed = ""
_passes_left = 0


def all_points() -> list[str]:
    """The names of all points in the package, in all its rooms."""
    found: dict[str, None] = {}
    for path in sorted((ROOT / "shmbroker").rglob("*.py")):
        found.update(dict.fromkeys(name for _, name in _MARKER.findall(path.read_text())))
    return list(found)


def arm(point: str, passes: int = 0) -> None:
    """Die at ``point``, after it was passed ``passes`` times."""
    global _armed, _passes_left
    _armed, _passes_left = point, passes


def reach(point: str) -> None:
    """A point is passed: what its comment becomes."""
    global _passes_left
    if point == _armed:
        if _passes_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        _passes_left -= 1


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles a module with its points made calls; never from a cache, nor into one."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        source = _MARKER.sub(r"\1__fault_point__('\2')", Path(path).read_text())
        return compile(source, path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("shmbroker."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


def install() -> None:
    """Make the points of all modules that are imported from now on calls. Before the package is imported."""
    imported = [name for name in sys.modules if name.startswith("shmbroker.")]
    if imported:
        raise RuntimeError(f"already imported: {', '.join(imported)}")
    builtins.__fault_point__ = reach  # type: ignore[attr-defined]
    sys.meta_path.insert(0, _Finder())
