"""The steps of the core in C, on a processor that reorders as far as C11 lets it: ``python docs/protocol/weak_memory.py`` (half a minute).

An exhaustive search, over all interleavings and all values that each load may return, of small programs made of the functions of
``shmbroker/include/shmbroker/`` (``core_programs.py``): queues, doorbells, both together. The memory orders are read out of ``word.h``.

The memory is that of C11 without load buffering (RC11; in its operational form as in the promise-free part of Kang and others, A Promising Semantics for
Relaxed-Memory Concurrency, POPL 2017, section 4):

- A location is a list of messages in modification order. A message is a value and a *view*: how far into each location its writer's history reaches.
- A thread has a view of its own. It reads any message that is not before what it has seen, and writes anywhere behind that.
- Release writes hand the thread's view on, acquire reads take it over. A seq_cst fence also exchanges views with all fences before it.
- Frames are plain memory: whoever reads or writes what he does not know to be complete is a race, which is a fault, whatever the values are.
- A semaphore is posted by a release, and waited for by an acquire, read-modify-write, as C libraries do.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import NamedTuple

from core_programs import INCLUDE, ORDERS, Instruction, Programs, Thread, calls, orders_in, sleeper, stream, two_senders

# --- the memory -----------------------------------------------------------------------------------------------------------------------------

View = tuple[int, ...]
"""How far into each location's history; behind these, how many plain reads of each thread are known of."""
Message = tuple[int, View]
Process = tuple[int, int, View, View, View]
"""The next instruction, the register; what the thread has seen, what an acquire fence would add to that, and what its last release fence had."""
State = tuple[tuple[Process, ...], tuple[tuple[Message, ...], ...], View, tuple[tuple[int, ...], ...]]
"""Threads, memory, what the seq_cst fences have exchanged, and of each location and thread the number of its last plain read."""


def joined(one: View, other: View) -> View:
    """What is seen by who has seen both."""
    return one if one == other else tuple(map(max, one, other))


def at(view: View, index: int, value: int) -> View:
    """With another value at one index, where that is more."""
    return view if view[index] >= value else (*view[:index], value, *view[index + 1 :])


PRIVATE = ("jump", "check", "read", "write")


class Found(Exception):
    """A fault, told in words."""


class Search:
    """All states that the threads of a program can reach."""

    def __init__(self, threads: list[Thread]) -> None:
        self.code = [thread.code for thread in threads]
        self.locations = sorted({instruction.location for code in self.code for instruction in code if instruction.location})
        self.index = {name: number for number, name in enumerate(self.locations)}
        self.states = 0
        self.ends: set[tuple[int, ...]] = set()
        """What each location may have in the end, in the order of their names."""

    def run(self) -> str:
        """The first fault, or nothing."""
        size = len(self.locations) + len(self.code)
        zero: View = (0,) * size
        seen: set[State] = set()
        begun: State = (
            tuple((0, 0, zero, zero, zero) for _ in self.code),
            tuple(((0, zero),) for _ in self.locations),
            zero,
            tuple((0,) * len(self.code) for _ in self.locations),
        )
        try:
            for number in range(len(self.code)):
                begun = self.settled(begun, number)
            seen.add(begun)
            left = [begun]
            while left:
                state = left.pop()
                moved = False
                for after in self.next(state):
                    moved = True
                    if after not in seen:
                        seen.add(after)
                        left.append(after)
                if not moved:
                    if any(process[0] < len(code) for process, code in zip(state[0], self.code, strict=True)):
                        return "asleep for ever"
                    self.ends.add(tuple(history[-1][0] for history in state[1]))
        except Found as fault:
            return str(fault)
        finally:
            self.states = len(seen)
        return ""

    def next(self, state: State) -> Iterator[State]:
        """What can be after one step of any thread."""
        for number, (process, code) in enumerate(zip(state[0], self.code, strict=True)):
            if process[0] < len(code):
                for after in self.stepped(state, number, code[process[0]]):
                    yield self.settled(after, number)

    def settled(self, state: State, number: int) -> State:
        """After what a thread does next that nobody else can meddle with. A race is seen by whichever of the two comes later."""
        code = self.code[number]
        while (pc := state[0][number][0]) < len(code) and code[pc].kind in PRIVATE:
            (state,) = self.stepped(state, number, code[pc])
        return state

    def stepped(self, state: State, number: int, instruction: Instruction) -> Iterator[State]:
        """After this instruction of thread ``number``: a state for each message that a load may read, and each place that a store may have."""
        threads, memory, fences, reads = state
        pc, register, cur, acq, rel = threads[number]
        kind, order, when = instruction.kind, instruction.order, instruction.when

        def after(
            process: Process, memory: tuple[tuple[Message, ...], ...] = memory, fences: View = fences, reads: object = reads
        ) -> State:
            return (*threads[:number], process, *threads[number + 1 :]), memory, fences, reads  # type: ignore[return-value]

        if kind == "jump":
            assert when is not None
            yield after((instruction.target if when(register) else pc + 1, register, cur, acq, rel))
        elif kind == "check":
            assert when is not None
            if not when(register):
                raise Found("wrong frame")
            yield after((pc + 1, 0, cur, acq, rel))
        elif kind == "fence":
            cur = acq
            if order == "seq_cst":
                cur = fences = joined(cur, fences)
            yield after((pc + 1, register, cur, cur, cur), fences=fences)
        else:
            where = self.index[instruction.location]
            history = memory[where]
            last = len(history) - 1
            if kind == "load":
                for place in range(cur[where], last + 1):
                    value, view = history[place]
                    if when is not None and not when(value):
                        continue
                    now = at(joined(cur, view) if order == "acquire" else cur, where, place)
                    yield after((pc + 1, value, now, joined(at(acq, where, place), view), rel))
            elif kind == "store":
                for place in range(cur[where] + 1, last + 2):
                    yield self.stored(state, number, where, place, instruction)
            elif kind in ("post", "wait"):
                value, view = history[last]
                if kind == "wait" and value == 0:
                    return
                taken = kind == "wait"
                now = at(joined(cur, view) if taken else cur, where, last + 1)
                acq = joined(at(acq, where, last + 1), view)
                message = (value + (-1 if taken else 1), joined(at(rel if taken or order == "relaxed" else now, where, last + 1), view))
                yield after((pc + 1, 0, now, acq, rel), (*memory[:where], (*history, message), *memory[where + 1 :]))
            else:
                clocks = len(self.locations)
                if cur[where] != last:
                    raise Found("race")
                if kind == "read":
                    clock = cur[clocks + number] + 1
                    cur, acq = at(cur, clocks + number, clock), at(acq, clocks + number, clock)
                    mine = reads[where]
                    known = (*reads[:where], (*mine[:number], clock, *mine[number + 1 :]), *reads[where + 1 :])
                    yield after((pc + 1, history[last][0], cur, acq, rel), reads=known)
                else:
                    if any(cur[clocks + other] < clock for other, clock in enumerate(reads[where]) if other != number):
                        raise Found("race")
                    cur, acq = at(cur, where, last + 1), at(acq, where, last + 1)
                    message = (instruction.value, cur)
                    yield after((pc + 1, register, cur, acq, rel), (*memory[:where], (*history, message), *memory[where + 1 :]))

    def stored(self, state: State, number: int, where: int, place: int, instruction: Instruction) -> State:
        """After a store at ``place`` of a location's history: what is behind it moves on by one, in whatever tells of it."""
        threads, memory, fences, reads = state
        if place < len(memory[where]):

            def moved(view: View) -> View:
                return view if view[where] < place else (*view[:where], view[where] + 1, *view[where + 1 :])

            threads = tuple((pc, register, moved(cur), moved(acq), moved(rel)) for pc, register, cur, acq, rel in threads)
            memory = tuple(tuple((value, moved(view)) for value, view in history) for history in memory)
            fences = moved(fences)
        pc, register, cur, acq, rel = threads[number]
        cur, acq = at(cur, where, place), at(acq, where, place)
        message = (instruction.value, cur if instruction.order == "release" else at(rel, where, place))
        history = memory[where]
        memory = (*memory[:where], (*history[:place], message, *history[place:]), *memory[where + 1 :])
        return (*threads[:number], (pc + 1, register, cur, acq, rel), *threads[number + 1 :]), memory, fences, reads


# --- what is searched -----------------------------------------------------------------------------------------------------------------------

PROGRAMS: dict[str, Programs] = {
    "stream, depth 1, 3 frames": stream(3, 1),
    "stream, depth 2, 4 frames": stream(4, 2),
    "sleeper, depth 1, 2 frames": sleeper(2, 1),
    "sleeper, depth 2, 3 frames": sleeper(3, 2),
    "sleeper, nudged, depth 1, 2 frames": sleeper(2, 1, nudges=True),
    "calls, 1": calls(1),
    "calls, 2": calls(2),
    "two senders": two_senders(),
}

LONG = frozenset({"calls, 2"})
"""Programs that take longer than some seconds each: ``make model-check`` searches them, ``make test`` does not."""

RACE, ASLEEP = "race", "asleep for ever"
STREAM, SLEEPER = "stream, depth 1, 3 frames", "sleeper, depth 1, 2 frames"

FAULTS = {
    "PUBLISH relaxed": (STREAM, RACE),
    "LOOK relaxed": (STREAM, RACE),
    "SAY_TAKEN relaxed": (STREAM, RACE),
    "ASK_TAKEN relaxed": (STREAM, RACE),
    "FENCE acq_rel": (SLEEPER, ASLEEP),
    "no claim": (STREAM, RACE),
    "published before it is filled": (STREAM, RACE),
    "taken before it is copied": (STREAM, RACE),
    "no fence of who publishes": (SLEEPER, ASLEEP),
    "no fence of who sleeps": (SLEEPER, ASLEEP),
    "no second look": (SLEEPER, ASLEEP),
    "ring first": (SLEEPER, ASLEEP),
    "ring relaxed": (SLEEPER, ASLEEP),
}
"""Planted faults: by each, the program that it is planted in, and what is found. Each step that is not relaxed is one, weakened."""


class Outcome(NamedTuple):
    """Of a search."""

    found: str
    states: int
    functions: dict[str, list[str]]
    """The steps of each function, as the program took them."""


def search(program: str, fault: str = "", orders: dict[str, str] | None = None) -> Outcome:
    """Search one program, with the orders that word.h has if no others are given, and a fault planted where one is named."""
    orders = dict(orders or orders_in((INCLUDE / "word.h").read_text()))
    step, _, weaker = fault.partition(" ")
    if step in orders:
        orders[step] = weaker
    functions: dict[str, list[str]] = {}
    threads = PROGRAMS[program](lambda: Thread(orders, frozenset({fault}), functions))
    searched = Search(threads)
    return Outcome(searched.run(), searched.states, functions)


def main() -> int:
    """Search all, and print a line for each. 0: all is as expected."""
    wrong = 0
    if orders_in((INCLUDE / "word.h").read_text()) != ORDERS:
        print("word.h has other orders than this model was checked with")
        wrong += 1
    for program, (fault, expected) in itertools.chain(
        ((program, ("", "")) for program in PROGRAMS), ((program, (fault, found)) for fault, (program, found) in FAULTS.items())
    ):
        outcome = search(program, fault)
        wrong += outcome.found != expected
        mark = "ok " if outcome.found == expected else "BAD"
        print(f"{mark} {fault or 'nothing planted':<32} {program:<36} {outcome.states:>8} states  {outcome.found or 'no fault'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
