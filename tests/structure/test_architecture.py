"""docs/architecture.md draws the floors and lists the threads as the code has them."""

from __future__ import annotations

import ast
import re

from tests.structure.test_structure import MAY_IMPORT, ROOT, modules

PAGE = (ROOT / "docs" / "architecture.md").read_text()


def short(room: str) -> str:
    """``call`` for ``shmbroker/call``: as the table of imports names what may be imported."""
    return room.rpartition("/")[2]


def floors() -> dict[str, int]:
    """Of each room that is drawn, the floor, counted from 1 at the bottom."""
    picture = PAGE.split("```floors\n", 1)[1].split("```", 1)[0]
    drawn = [line.split() for line in picture.splitlines()]
    rooms = [room for _, *names in drawn for room in names]
    assert len(rooms) == len(set(rooms)), "a room is drawn twice"
    assert [int(floor) for floor, *_ in drawn] == list(range(len(drawn), 0, -1))
    return {room: int(floor) for floor, *names in drawn for room in names}


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_every_room_is_drawn_and_has_a_line_that_says_what_is_in_it() -> None:
    rooms = {short(room) for room in MAY_IMPORT}
    assert set(floors()) == rooms
    assert set(re.findall(r"^\| `(\w+)` \|", section("The floors"), re.MULTILINE)) == rooms


def test_every_room_stands_above_everything_that_it_may_import() -> None:
    floor = floors()
    wrong = [
        f"{room} on floor {floor[short(room)]} may import {below} on floor {floor[below]}"
        for room, allowed in MAY_IMPORT.items()
        for below in allowed - {short(room)}
        if floor[below] >= floor[short(room)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_room_stands_higher_than_it_need() -> None:
    floor = floors()
    for room, allowed in MAY_IMPORT.items():
        assert floor[short(room)] == 1 + max([floor[below] for below in allowed - {short(room)}], default=0), room


def test_the_steps_of_a_call_are_numbered_one_after_the_other() -> None:
    steps = [int(number) for number in re.findall(r"^(\d+)\. ", section("One call, step by step"), re.MULTILINE)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 10


def threads() -> dict[str, set[str]]:
    """By the name of a thread that the code starts: the files that do."""
    found: dict[str, set[str]] = {}
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("Thread", "ThreadPoolExecutor")):
                named = {keyword.arg: keyword.value for keyword in node.keywords}
                name = named.get("name") or named.get("thread_name_prefix")
                assert isinstance(name, ast.Constant), f"{path.relative_to(ROOT)}: a thread without a name"
                found.setdefault(str(name.value), set()).add(str(path.relative_to(ROOT)))
    return found


def test_every_thread_is_listed_with_the_file_that_starts_it() -> None:
    started = threads()
    listed: dict[str, set[str]] = {}
    for name, by in re.findall(r"^\| `([\w-]+)` \| ([^|]*)\|", section("Threads"), re.MULTILINE):
        listed.setdefault(name, set()).update(re.findall(r"`(\w+/[\w/]+\.py)`", by))
    assert listed == started
