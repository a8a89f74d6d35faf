"""The C header tells what the layout is, as a C compiler sees it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

import shmbroker
from shmbroker.memory import layout
from shmbroker.memory.cheader import render, struct_name
from tests.memory.golden import (
    GOLDEN_CONSTANTS,
    GOLDEN_DTYPE_CODES,
    GOLDEN_SPACES,
    GOLDEN_STATUSES,
)


def _c_program() -> str:
    """A program that prints every field, size, constant and code as the C compiler sees it."""
    lines = ['#include "layout.h"', "#include <stdio.h>", "int main(void) {"]

    def show(label: str, *values: str) -> None:
        lines.append(f'    printf("{label}{" %zu" * len(values)}\\n", {", ".join(f"(size_t)({value})" for value in values)});')

    for structure in layout.STRUCTURES:
        kind = f"struct {struct_name(structure)}"
        show(f"size {structure.__name__}", f"sizeof({kind})")
        for name, *_ in structure._fields_:
            show(f"field {structure.__name__}.{name}", f"offsetof({kind}, {name})", f"sizeof((({kind} *)0)->{name})")
    for name in GOLDEN_CONSTANTS:
        show(f"constant {name}", f"SHMBROKER_{name}")
    for prefix, codes in (("DTYPE", GOLDEN_DTYPE_CODES), ("SPACE", GOLDEN_SPACES), ("STATUS", GOLDEN_STATUSES)):
        for name in codes:
            show(f"code {prefix}_{name}", f"SHMBROKER_{prefix}_{name}")
    lines += ['    printf("magic %s\\n", SHMBROKER_MAGIC);', "    return 0;", "}"]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def seen_by_c(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) on this machine: the C header can only be compiled where there is one")
    folder: Path = tmp_path_factory.mktemp("cheader")
    (folder / "layout.h").write_text(render())
    (folder / "show.c").write_text(_c_program())
    program = folder / "show"
    subprocess.run(
        [compiler, "-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic", str(folder / "show.c"), "-o", str(program)], check=True
    )
    return subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines()


def test_the_header_in_the_package_is_the_generated_one() -> None:
    """The compiled parts include it; ``python -m shmbroker.memory.cheader > shmbroker/include/shmbroker/layout.h`` makes it anew."""
    assert Path(shmbroker.get_include(), "shmbroker", "layout.h").read_text() == render()


def test_c_header_puts_every_field_where_ctypes_puts_it(seen_by_c: list[str]) -> None:
    expected = []
    for structure in layout.STRUCTURES:
        expected.append(f"size {structure.__name__} {ctypes.sizeof(structure)}")
        for name, *_ in structure._fields_:
            field = getattr(structure, name)
            expected.append(f"field {structure.__name__}.{name} {field.offset} {field.size}")
    assert [line for line in seen_by_c if line.startswith(("size ", "field "))] == expected


def test_c_header_has_the_constants_and_codes(seen_by_c: list[str]) -> None:
    expected = [f"constant {name} {value}" for name, value in GOLDEN_CONSTANTS.items()]
    for prefix, codes in (("DTYPE", GOLDEN_DTYPE_CODES), ("SPACE", GOLDEN_SPACES), ("STATUS", GOLDEN_STATUSES)):
        expected += [f"code {prefix}_{name} {value}" for name, value in codes.items()]
    assert [line for line in seen_by_c if line.startswith(("constant ", "code "))] == expected
    assert "magic SHMBROKR" in seen_by_c
