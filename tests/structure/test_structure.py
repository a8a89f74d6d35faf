"""Imports run downwards only, by one table; the rooms that must stay light stay light."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("shmbroker", "gpu_worker", "tee_worker")

LEAVES = {"errors", "version"}
LOWEST = {*LEAVES, "settings"}
CALLING = {"errors", "settings", "memory", "arena", "lane", "control", "trace"}
ALL = {
    *LOWEST, "trust", "trace", "systemd", "memory", "console", "control", "arena", "lane", "broker", "monitoring", "models", "call", "worker", "client",
    "commands",
}  # fmt: skip

MAY_IMPORT: dict[str, set[str]] = {
    "shmbroker/errors": set(),
    "shmbroker/version": set(),
    "shmbroker/settings": {"errors"},
    "shmbroker/trace": {"errors"},
    "shmbroker/systemd": {"errors"},
    "shmbroker/console": {"errors", "settings", "systemd"},
    "shmbroker/memory": {"errors", "settings"},
    "shmbroker/trust": {"errors", "memory"},
    "shmbroker/control": {"errors", "settings", "memory"},
    "shmbroker/arena": {"errors", "settings", "memory"},
    "shmbroker/lane": {"errors", "settings", "memory", "arena"},
    "shmbroker/monitoring": {"errors", "settings", "memory", "control"},
    "shmbroker/broker": {*LOWEST, "memory", "control", "systemd"},
    "shmbroker/models": {"errors", "settings", "console", "arena"},
    "shmbroker/call": CALLING,
    "shmbroker/worker": {*CALLING, "version", "systemd"},
    "shmbroker/client": {*CALLING, "version", "call"},
    "gpu_worker": {*LOWEST, "console", "memory", "arena", "control", "models", "trust", "worker"},
    "tee_worker": {*LOWEST, "console", "memory", "arena", "control", "models", "trust", "systemd", "call", "client"},
    "shmbroker/commands": ALL,
    "shmbroker/__init__": {"errors", "version", "arena", "call", "client", "worker"},
    "shmbroker/__main__": {"commands"},
}
"""By room: which other rooms of ``shmbroker`` it may import, also for types alone. docs/architecture.md draws the same as floors."""

WITHOUT_TORCH = (
    "shmbroker/memory",
    "shmbroker/control",
    "shmbroker/monitoring",
    "shmbroker/broker",
    "shmbroker/settings",
    "shmbroker/systemd",
)
"""What the broker daemon is made of."""


def room_of(path: Path) -> str:
    """``shmbroker/call`` for ``shmbroker/call/plan.py``; ``shmbroker/errors`` for ``shmbroker/errors.py``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "/".join(parts[:2]) if parts[0] == "shmbroker" else parts[0]


def modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports(source: str) -> Iterator[str]:
    """The modules that a file imports anywhere in it, also for types alone."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            assert node.module is not None
            if node.module == "shmbroker":
                yield from (f"shmbroker.{alias.name}" for alias in node.names)
            else:
                yield node.module


def target_of(module: str) -> str | None:
    """The room that an imported module of ours lies in; the other packages by their name; None for what is not ours."""
    parts = module.split(".")
    if parts[0] == "shmbroker":
        return parts[1] if len(parts) > 1 else "__init__"
    return parts[0] if parts[0] in (*PACKAGES, "tests", "benchmarks") else None


def forbidden(room: str, source: str) -> list[str]:
    """What ``source``, in ``room``, imports against the table."""
    own = room.rpartition("/")[2]
    return [module for module in imports(source) if (target := target_of(module)) is not None and target not in {own, *MAY_IMPORT[room]}]


def test_every_room_has_a_row_and_every_row_a_room() -> None:
    assert {room_of(path) for path in modules()} == set(MAY_IMPORT)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_what_the_table_allows(room: str) -> None:
    found = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in modules()
        if room_of(path) == room
        for module in forbidden(room, path.read_text())
    ]
    assert not found, "\n".join(found)


def test_the_table_has_no_circle() -> None:
    left = {room.rpartition("/")[2]: {name for name in allowed if name != room.rpartition("/")[2]} for room, allowed in MAY_IMPORT.items()}
    while left:
        ready = [room for room, below in left.items() if not below & set(left)]
        assert ready, f"a circle among {sorted(left)}"
        for room in ready:
            del left[room]


def test_no_files_of_a_room_import_each_other_in_a_circle() -> None:
    graph = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): set(imports(path.read_text()))
        for path in modules()
        if path.name != "__init__.py"
    }
    # "from shmbroker.memory import layout" names the module in the list of names.
    for path in modules():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if name in graph:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module:
                    graph[name] |= {f"{node.module}.{alias.name}" for alias in node.names} & set(graph)
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above[above.index(module) :], module))
        if module in done or module not in graph:
            return
        for below in graph[module]:
            visit(below, (*above, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_what_the_daemon_is_made_of_imports_no_torch_and_no_numpy() -> None:
    for path in modules():
        if room_of(path) in WITHOUT_TORCH:
            heavy = {module.split(".")[0] for module in imports(path.read_text())} & {"torch", "numpy", "transformers", "safetensors"}
            assert not heavy, f"{path.relative_to(ROOT)} imports {heavy}"


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("shmbroker/memory", "from shmbroker.arena.spec import TensorSpec"),
        ("shmbroker/call", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from shmbroker.client.channel import Channel"),
        ("shmbroker/broker", "def later():\n    import shmbroker.lane.queue"),
        ("gpu_worker", "from shmbroker.client.client import connect"),
        ("tee_worker", "from shmbroker import broker"),
        ("shmbroker/worker", "import shmbroker"),
    ],
)
def test_an_import_against_the_table_is_seen(room: str, line: str) -> None:
    assert forbidden(room, line)


def test_no_module_has_a_catch_all_name() -> None:
    for path in [*modules(), *(ROOT / "tests").rglob("*.py")]:
        assert path.stem not in ("utils", "helpers", "manager", "common", "misc"), path


def test_no_file_is_too_long_to_be_read_at_once() -> None:
    long = {str(path.relative_to(ROOT)): count for path in modules() if (count := len(path.read_text().splitlines())) > 400}
    assert not long


def test_the_top_of_the_package_holds_five_files() -> None:
    assert {path.name for path in (ROOT / "shmbroker").glob("*.py")} == {
        "__init__.py",
        "__main__.py",
        "errors.py",
        "version.py",
        "console.py",
    }


OTHER_TESTS = {
    "structure", "docs", "benchmarks", "programs",
    "gpu_worker", "gpu_hardware", "tee_worker",
    "examples", "faults", "hostile", "sanitize",
}  # fmt: skip
"""Folders of tests that are of no one room of ``shmbroker``: of the house, of the other packages, of all rooms at work together."""


def folders(parent: Path) -> set[str]:
    return {path.parent.name for path in parent.glob("*/__init__.py")} | {path.name for path in parent.glob("programs")}


def test_every_room_has_a_folder_of_tests_of_its_name_and_every_folder_a_room() -> None:
    rooms = folders(ROOT / "shmbroker")
    assert not rooms & OTHER_TESTS
    assert folders(ROOT / "tests") == rooms | OTHER_TESTS
    for room in rooms:
        assert list((ROOT / "tests" / room).glob("test_*.py")), room


PRIVATE_BUT_NOT_OURS = {
    "_exit",  # os
    "_fields", "_asdict", "_replace",  # of named tuples
    "_fields_", "_length_", "_type_",  # of ctypes
    "_attn_implementation",  # of a configuration of transformers
    "_repr_html_",  # of notebooks
}  # fmt: skip


def private_names(source: str) -> list[str]:
    """The private names of other objects and modules that ``source`` uses: not those of ``self``, nor the compiled modules."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
            found.append(node.attr)
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("__"):
            found += [alias.name for alias in node.names if f"{node.module}.{alias.name}" not in COMPILED_MODULES]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
            found += [word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
    return [name for name in found if re.match(r"_(?!_)", name) and name not in PRIVATE_BUT_NOT_OURS]


COMPILED_MODULES = {"shmbroker.lane._ends", "shmbroker.arena._leases"}


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_tests_and_benchmarks_use_public_names_alone(folder: str) -> None:
    found = {
        str(path.relative_to(ROOT)): names for path in sorted((ROOT / folder).rglob("*.py")) if (names := private_names(path.read_text()))
    }
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "channel._lane.close()",
        "from shmbroker.memory.cheader import _c_name",
        'monkeypatch.setattr(module, "_lock", None)',
        "a = self.b._c",
    ],
)
def test_a_private_name_is_seen(line: str) -> None:
    assert private_names(line)


def test_every_folder_with_python_files_is_a_package() -> None:
    """Another is in no wheel, though all works from a clone."""
    folders = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]
