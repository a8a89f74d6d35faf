"""The core's memory orders, on a processor that reorders: the model of docs/protocol/weak_memory.py, held against the headers that it speaks of."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shmbroker

PROTOCOL = Path(__file__).parents[2] / "docs" / "protocol"
sys.path.insert(0, str(PROTOCOL))  # as for a program that lies there
model: Any = importlib.import_module("weak_memory")
core: Any = importlib.import_module("core_programs")
sys.path.remove(str(PROTOCOL))

INCLUDE = Path(shmbroker.get_include()) / "shmbroker"
LANE = Path(shmbroker.__file__).parent / "lane"
HEADERS = {path.name: path.read_text() for path in INCLUDE.glob("*.h")}


# --- the model speaks of the code ---------------------------------------------------------------------------------------------------------


def test_the_orders_of_the_headers_are_those_that_were_checked() -> None:
    assert core.orders_in(HEADERS["word.h"]) == core.ORDERS


def test_every_access_of_the_table_is_a_step_of_the_model() -> None:
    """So that none is in the headers under a form that the model does not read."""
    accesses = re.findall(r"^#define SHMBROKER_(\w+)\(.*?atomic_(?:store|load|thread_fence|signal_fence)", HEADERS["word.h"], re.MULTILINE)
    assert set(accesses) == set(core.ORDERS) | core.OF_THE_COMPILER
    assert len(re.findall(r"\batomic_(?:\w+)\(", HEADERS["word.h"])) == len(accesses)


def test_the_functions_of_the_headers_take_the_steps_of_the_model_in_its_order() -> None:
    taken: dict[str, list[str]] = {}
    for program in model.PROGRAMS:
        functions: dict[str, list[str]] = {}
        model.PROGRAMS[program](lambda seen=functions: core.Thread(core.ORDERS, frozenset(), seen))
        for name, steps in functions.items():
            assert taken.setdefault(name, steps) == steps
    in_headers: dict[str, list[str]] = {}
    for name in ("queue.h", "doorbell.h"):
        in_headers |= core.functions_in(HEADERS[name])
    assert taken == in_headers
    assert set(core.ORDERS) == {step for steps in taken.values() for step in steps}


def test_no_other_header_takes_a_step_on_a_word() -> None:
    steps = re.compile("|".join(rf"SHMBROKER_{step}\(" for step in core.ORDERS))
    assert [name for name, text in HEADERS.items() if steps.search(text)] == sorted(
        ["word.h", "queue.h", "doorbell.h"], key=list(HEADERS).index
    )


@pytest.mark.parametrize(
    ("change", "by"),
    [
        (r"(SHMBROKER_PUBLISH\(.*memory_order_)release", r"\1relaxed"),
        (r"(SHMBROKER_ASK_SLEEPING\(.*memory_order_)relaxed", r"\1acquire"),
        (r"#define SHMBROKER_FENCE\(\).*\n", ""),
    ],
)
def test_an_order_that_was_changed_in_the_header_alone_is_seen(change: str, by: str) -> None:
    changed, count = re.subn(change, by, HEADERS["word.h"])
    assert count == 1
    assert core.orders_in(changed) != core.ORDERS


def test_steps_that_were_exchanged_in_a_header_alone_are_seen() -> None:
    put_up, fence = "    SHMBROKER_PUT_UP(sleeping);\n", "    SHMBROKER_FENCE();\n"
    assert put_up + fence in HEADERS["doorbell.h"]
    exchanged = core.functions_in(HEADERS["doorbell.h"].replace(put_up + fence, fence + put_up))
    assert exchanged["before_sleep"] != core.functions_in(HEADERS["doorbell.h"])["before_sleep"] == ["PUT_UP", "FENCE"]


USES = {
    "_submission_ends.c": ["claim", "fill_submission", "fill_tensor", "peek", "copy_submission", "advance"],
    "_completion_ends.c": ["claim", "fill_completion", "peek", "copy_completion", "advance"],
    "_queue.h": ["commit", "must_ring"],
}
"""By file of the compiled ends: what it calls of the core between claim and advance, in order. Filled slots are committed by ``commit`` of _queue.h."""


@pytest.mark.parametrize("file", USES)
def test_the_compiled_ends_call_the_core_in_the_order_of_the_model(file: str) -> None:
    calls = [name for name in re.findall(r"shmbroker_(\w+)\(", (LANE / file).read_text()) if name in {*USES[file], "must_ring"}]
    in_order = list(dict.fromkeys(calls))
    assert in_order == USES[file]
    if file != "_queue.h":
        text = (LANE / file).read_text()
        filled, committed = (
            max(text.rfind(f"shmbroker_{name}(") for name in USES[file] if name.startswith("fill_")),
            text.find("commit(self, slot)"),
        )
        assert 0 < filled < committed


# --- what the model finds -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", [program for program in model.PROGRAMS if program not in model.LONG])
def test_no_frame_is_lost_and_nobody_sleeps_for_ever_on_a_weak_processor(program: str) -> None:
    outcome = model.search(program)
    assert (outcome.found, outcome.states > 10) == ("", True)


@pytest.mark.parametrize("fault", model.FAULTS)
def test_a_planted_fault_is_found(fault: str) -> None:
    program, expected = model.FAULTS[fault]
    assert model.search(program, fault).found == expected


def test_every_order_that_is_not_relaxed_is_planted_as_a_weaker_one() -> None:
    assert {step for step, order in core.ORDERS.items() if order != "relaxed"} == {name.split()[0] for name in model.FAULTS} & set(
        core.ORDERS
    )


def test_the_documents_list_every_program_fault_and_order() -> None:
    text = (PROTOCOL / "README.md").read_text()
    for program in model.PROGRAMS:
        assert len(re.findall(rf"^\| {re.escape(program)} \| \d+ \|$", text, re.MULTILINE)) == 1
    assert re.findall(rf"^\| (.+) \| (?:{model.RACE}|{model.ASLEEP}) \|$", text, re.MULTILINE) == list(model.FAULTS)
    table = re.findall(r"^\| (`[^|:]+)[^|]*\| (\w+)", (PROTOCOL.parent / "c.md").read_text().split("## Memory orders")[1], re.MULTILINE)
    told = {step: order for steps, order in table for step in re.findall(r"`(\w+)`", steps) if step in core.ORDERS}
    assert told == core.ORDERS


# --- the model's memory is that of C11 ------------------------------------------------------------------------------------------------------

Write = Callable[[Any], None]


def ends(*programs: Write) -> set[tuple[int, ...]]:
    """What the locations, in the order of their names, may have after these threads."""
    threads = []
    for program in programs:
        thread = core.Thread(core.ORDERS, frozenset(), {})
        program(thread)
        threads.append(thread)
    search = model.Search(threads)
    assert search.run() == ""
    return set(search.ends)


def store(location: str, value: int = 1, order: str = "relaxed") -> Write:
    return lambda thread: thread.emit("store", location, order, value)


def fence(order: str) -> Write:
    return lambda thread: thread.emit("fence", order=order)


def sequence(*steps: Write) -> Write:
    def written(thread: Any) -> None:
        for step in steps:
            step(thread)

    return written


def if_then(location: str, value: int, then: Write, order: str = "relaxed") -> Write:
    """Load, and go on only where it gives ``value``."""

    def written(thread: Any) -> None:
        thread.emit("load", location, order)
        other = thread.jump(lambda loaded: loaded != value)
        then(thread)
        thread.here(other)

    return written


SEEN = store("a"), store("b")
"""A thread's mark that it has seen what it looked for; both come before x and y by name."""


@pytest.mark.parametrize(("order", "weak"), [("none", True), ("acq_rel", True), ("seq_cst", False)])
def test_two_stores_before_two_loads_need_a_full_fence_at_either_side(order: str, weak: bool) -> None:
    between = sequence() if order == "none" else fence(order)
    left = sequence(store("x"), between, if_then("y", 0, SEEN[0]))
    right = sequence(store("y"), between, if_then("x", 0, SEEN[1]))
    assert ((1, 1, 1, 1) in ends(left, right)) == weak
    assert (1, 1, 1, 1) in ends(left, sequence(store("y"), if_then("x", 0, SEEN[1])))


@pytest.mark.parametrize(("stored", "loaded", "weak"), [
    ("relaxed", "relaxed", True), ("release", "relaxed", True), ("relaxed", "acquire", True), ("release", "acquire", False),
])  # fmt: skip
def test_a_message_is_passed_by_release_and_acquire(stored: str, loaded: str, weak: bool) -> None:
    sender = sequence(store("x"), store("y", 1, stored))
    receiver = if_then("y", 1, if_then("x", 0, SEEN[0]), loaded)
    assert ((1, 1, 1) in ends(sender, receiver)) == weak


@pytest.mark.parametrize(("order", "weak"), [("acq_rel", True), ("seq_cst", False)])
def test_two_readers_may_see_two_writers_in_two_orders_but_for_full_fences(order: str, weak: bool) -> None:
    one = if_then("x", 1, sequence(fence(order), if_then("y", 0, SEEN[0])), "acquire")
    other = if_then("y", 1, sequence(fence(order), if_then("x", 0, SEEN[1])), "acquire")
    assert ((1, 1, 1, 1) in ends(store("x"), store("y"), one, other)) == weak


def test_one_location_is_seen_in_one_order() -> None:
    twice = if_then("x", 2, if_then("x", 1, SEEN[0]))
    assert not any(end[0] for end in ends(sequence(store("x", 1), store("x", 2)), twice))


def test_stores_to_two_locations_may_come_in_two_orders() -> None:
    one, other = sequence(store("x", 1), store("y", 2)), sequence(store("y", 1), store("x", 2))
    assert ends(one, other) == {(1, 1), (1, 2), (2, 1), (2, 2)}


def test_a_load_does_not_return_what_depends_on_it() -> None:
    """Load buffering, which C11 allows and this model leaves out: docs/protocol/README.md says why nothing here turns on it."""
    one, other = if_then("x", 1, store("y")), if_then("y", 1, store("x"))
    assert ends(one, other) == {(0, 0)}


@pytest.mark.parametrize(("posted", "weak"), [("release", False), ("relaxed", True)])
def test_who_is_woken_sees_what_was_done_before_the_ring(posted: str, weak: bool) -> None:
    waker = sequence(store("x"), lambda thread: thread.emit("post", "bell", posted))
    sleeper = sequence(lambda thread: thread.emit("wait", "bell"), if_then("x", 0, SEEN[0]))
    assert ((1, 0, 1) in ends(waker, sleeper)) == weak
