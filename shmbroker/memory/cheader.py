"""The C header of the layout, generated from the ctypes structures: ``python -m shmbroker.memory.cheader > shmbroker/include/shmbroker/layout.h``."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from typing import Any

from shmbroker.memory import layout

_C_NAMES: dict[Any, str] = {
    ctypes.c_char: "char",
    ctypes.c_uint8: "uint8_t",
    ctypes.c_uint16: "uint16_t",
    ctypes.c_uint32: "uint32_t",
    ctypes.c_uint64: "uint64_t",
    ctypes.c_int64: "int64_t",
}

_STATISTICS = ("BUCKETS", "FIRST_BUCKET", "PICTURED_BLOCKS")


def struct_name(structure: type[ctypes.Structure]) -> str:
    """``TensorDescriptor`` becomes ``shmbroker_tensor_descriptor``."""
    return "shmbroker" + re.sub(r"([A-Z])", r"_\1", structure.__name__).lower()


def declaration(name: str, kind: Any) -> str:
    """A field as C declares it, without the semicolon: ``uint64_t offset``, ``uint64_t shape[8]``."""
    if issubclass(kind, ctypes.Array):
        return f"{_c_name(kind._type_)} {name}[{kind._length_}]"
    return f"{_c_name(kind)} {name}"


def _c_name(kind: Any) -> str:
    if issubclass(kind, ctypes.Structure):
        return f"struct {struct_name(kind)}"
    return _C_NAMES[kind]


def _lines() -> Iterator[str]:
    yield f"/* Layout of a shmbroker segment, version {layout.LAYOUT_VERSION}. Generated; see docs/memory-layout.md. Little-endian. */"
    yield "#ifndef SHMBROKER_LAYOUT_H\n#define SHMBROKER_LAYOUT_H\n\n#include <assert.h>\n#include <stddef.h>\n#include <stdint.h>\n"
    yield f'#define SHMBROKER_MAGIC "{layout.MAGIC.decode()}"'
    for constant in (
        "LAYOUT_VERSION",
        "BYTE_ORDER_MARK",
        "ALIGNMENT",
        "MAX_DIMS",
        "MAX_TENSORS",
        "METADATA_BYTES",
        "TEXT_BYTES",
        *_STATISTICS,
    ):
        yield f"#define SHMBROKER_{constant} {getattr(layout, constant)}"
    for enumeration in (layout.DTypeCode, layout.Space, layout.Status):
        prefix = "SHMBROKER" + re.sub(r"(?<![A-Z])([A-Z])", r"_\1", enumeration.__name__.replace("DTypeCode", "Dtype")).upper()
        yield f"\nenum {prefix.lower()} {{"
        yield from (f"    {prefix}_{member.name} = {member.value}," for member in enumeration)
        yield "};"
    for structure in layout.STRUCTURES:
        yield f"\nstruct {struct_name(structure)} {{"
        for name, kind, *_ in structure._fields_:
            offset = layout.offset_of(structure, name)
            yield f"    {declaration(name, kind) + ';':<56}/* {offset} */"
        yield "};"
        size = ctypes.sizeof(structure)
        yield f'static_assert(sizeof(struct {struct_name(structure)}) == {size}, "size of {structure.__name__}");'
    yield "\n#endif"


def render() -> str:
    """The whole header as text, ending in a newline."""
    return "\n".join(_lines()) + "\n"


if __name__ == "__main__":
    print(render(), end="")
