"""Imports run downwards only, and the parts that must stay light stay light."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LEAVES = {"shmbroker.errors", "shmbroker.settings", "shmbroker.sizes"}
"""Import nothing of ours but each other; everybody may import them."""

MAY_IMPORT = {
    "shmbroker/memory": {"shmbroker.memory", *LEAVES},
    "shmbroker/lane": {"shmbroker.lane", "shmbroker.memory", *LEAVES},
    "shmbroker/control": {"shmbroker.control", *LEAVES},
    "gpu_worker": {"gpu_worker", "shmbroker"},
    "tee_worker": {"tee_worker", "shmbroker"},
    "shmbroker": {"shmbroker"},
}
"""By folder: what its modules may import of ours."""


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path, *, at_run_time: bool) -> Iterator[str]:
    """Modules of ours that a file imports."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if at_run_time and id(node) in typing_only:
            continue
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "shmbroker":
            names = [f"shmbroker.{alias.name}" for alias in node.names]
        yield from (name for name in names if name.split(".")[0] in ("shmbroker", "gpu_worker", "tee_worker", "tests"))


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_run_downwards_only(folder: str) -> None:
    for path in modules(folder):
        for name in imports(path, at_run_time=False):
            allowed = any(name == top or name.startswith(top + ".") for top in MAY_IMPORT[folder])
            assert allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_leaves_import_leaves_only() -> None:
    for leaf in LEAVES:
        assert set(imports(ROOT / (leaf.replace(".", "/") + ".py"), at_run_time=False)) <= LEAVES


def test_there_are_no_circles() -> None:
    graph = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): set(imports(path, at_run_time=True))
        for folder in ("shmbroker", "gpu_worker", "tee_worker")
        for path in modules(folder)
        if path.name != "__init__.py"
    }
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        if module in done or module not in graph:
            return
        for below in graph[module]:
            visit(below, (*above, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_no_module_has_a_catch_all_name() -> None:
    for path in [path for folder in ("shmbroker", "gpu_worker", "tee_worker", "tests") for path in modules(folder)]:
        assert path.stem not in ("utils", "helpers", "manager", "common", "misc"), path
