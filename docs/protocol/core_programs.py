"""The steps of the core in C, as programs for :mod:`weak_memory` to search: its functions' accesses, and their memory orders as ``word.h`` has them.

What is known here of a function of ``shmbroker/include/shmbroker/`` is which steps it takes, in which order; a test compares that with the header, so
neither can change alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

INCLUDE = Path(__file__).parents[2] / "shmbroker" / "include" / "shmbroker"

ORDERS = {
    "PUBLISH": "release",
    "LOOK": "acquire",
    "SAY_TAKEN": "release",
    "ASK_TAKEN": "acquire",
    "FENCE": "seq_cst",
    "ASK_SLEEPING": "relaxed",
    "TAKE_DOWN": "relaxed",
    "PUT_UP": "relaxed",
    "PUT_AWAY": "relaxed",
}
"""By step, as they were checked. ``COPIED`` is not among them: it orders the compiler alone, against a peer that means no good."""

OF_THE_COMPILER = frozenset({"COPIED"})


# --- what the headers say -------------------------------------------------------------------------------------------------------------------


def orders_in(word: str) -> dict[str, str]:
    """The memory order of each step, from the text of ``word.h``."""
    pattern = r"^#define SHMBROKER_(\w+)\(\w*(?:, \w+)*\)\s+atomic_\w+\(.*memory_order_(\w+)\)"
    return {step: order for step, order in re.findall(pattern, word, re.MULTILINE) if step not in OF_THE_COMPILER}


def functions_in(header: str) -> dict[str, list[str]]:
    """The steps of each function, in the order in which they stand in its text, with those of functions that it calls in their place."""
    known: dict[str, list[str]] = {}
    for name, body in re.findall(r"^static inline [^;{]*?shmbroker_(\w+)\([^{;]*\)\n\{\n(.*?)^\}", header, re.MULTILINE | re.DOTALL):
        steps: list[str] = []
        for step, called in re.findall(r"SHMBROKER_(\w+)\(|shmbroker_(\w+)\(", body):
            if step in ORDERS:
                steps.append(step)
            elif called:
                steps += known.get(called, [])
        if steps:
            known[name] = steps
    return known


# --- programs -------------------------------------------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    """One step of a thread. ``when``: of a load, the values that it waits for; of a jump, those at which it is taken."""

    kind: str
    """load, store, read, write (of plain memory), fence, post, wait, jump, check."""
    location: str = ""
    order: str = ""
    value: int = 0
    when: Callable[[int], bool] | None = None
    target: int = -1
    """Of a jump."""
    text: str = ""


@dataclass
class Thread:
    """A thread's program, as it is written down. The one register holds what was loaded, read or waited for last."""

    orders: dict[str, str]
    faults: frozenset[str]
    functions: dict[str, list[str]]
    """What each function of the core was seen to do, for all threads."""
    code: list[Instruction] = field(default_factory=list)

    def planted(self, fault: str) -> bool:
        """Whether this fault is in the program."""
        return fault in self.faults

    def emit(self, *of: object, **also: object) -> int:
        """Write an instruction down; its place."""
        self.code.append(Instruction(*of, **also))  # type: ignore[arg-type]
        return len(self.code) - 1

    def jump(self, when: Callable[[int], bool], target: int = -1) -> int:
        """To ``target``, or to where :meth:`here` says later."""
        return self.emit("jump", when=when, target=target)

    def here(self, *jumps: int) -> int:
        """The place of the next instruction, to which ``jumps`` go."""
        for jump in jumps:
            self.code[jump] = self.code[jump]._replace(target=len(self.code))
        return len(self.code)

    def step(self, function: str, step: str, location: str = "", value: int = 0, when: Callable[[int], bool] | None = None) -> None:
        """A step of a function of the core, with the order that word.h gives it."""
        self.functions.setdefault(function, [])
        if step not in self.functions[function]:
            self.functions[function].append(step)
        kind = "fence" if step == "FENCE" else "load" if step in ("LOOK", "ASK_TAKEN", "ASK_SLEEPING") else "store"
        self.emit(kind, location, self.orders[step], value, when, text=step)

    # --- the functions of the core, step by step ----------------------------------------------------------------------------------------

    def claim(self, queue: str, position: int, depth: int) -> None:
        """Waits while the queue is full, as whoever calls it does."""
        if position >= depth and not self.planted("no claim"):
            self.step("claim", "ASK_TAKEN", f"{queue}.taken", when=lambda taken: taken > position - depth)

    def commit(self, queue: str, position: int, depth: int) -> None:
        """Of a slot that is filled."""
        self.step("commit", "PUBLISH", f"{queue}.sequence{position % depth}", position + 1)

    def nudge(self, word: str, bell: str, function: str = "nudge") -> None:
        """And ring where it says so."""
        self.step(function, "ASK_SLEEPING", word)
        awake = self.jump(lambda sleeping: not sleeping)
        if self.planted("ring first"):
            self.emit("post", bell, "release")
        self.step(function, "TAKE_DOWN", word, 0)
        if not self.planted("ring first"):
            self.emit("post", bell, "relaxed" if self.planted("ring relaxed") else "release")
        self.here(awake)

    def must_ring(self, word: str, bell: str) -> None:
        """And ring where it says so."""
        if not self.planted("no fence of who publishes"):
            self.step("must_ring", "FENCE")
        self.nudge(word, bell, "must_ring")

    def peek(self, queue: str, position: int, depth: int) -> int:
        """A jump to where there is a frame."""
        self.step("peek", "LOOK", f"{queue}.sequence{position % depth}")
        return self.jump(lambda sequence: sequence == position + 1)

    def advance(self, queue: str, position: int) -> None:
        """Of a slot that was copied."""
        self.step("advance", "SAY_TAKEN", f"{queue}.taken", position + 1)

    def before_sleep(self, word: str) -> None:
        """Word up, and a fence."""
        self.step("before_sleep", "PUT_UP", word, 1)
        if not self.planted("no fence of who sleeps"):
            self.step("before_sleep", "FENCE")

    def after_sleep(self, word: str) -> None:
        """Word down."""
        self.step("after_sleep", "PUT_AWAY", word, 0)

    # --- what whoever uses them does ----------------------------------------------------------------------------------------------------

    def send(self, queue: str, position: int, depth: int) -> None:
        """Claim, fill, commit; whether to ring comes next."""
        self.claim(queue, position, depth)
        halves = [f"{queue}.{half}{position % depth}" for half in ("first", "last")]
        if self.planted("published before it is filled"):
            self.commit(queue, position, depth)
        for half in halves:
            self.emit("write", half, value=position + 1)
        if not self.planted("published before it is filled"):
            self.commit(queue, position, depth)

    def take(self, queue: str, position: int, depth: int) -> None:
        """Copy, look at the copy, advance."""
        if self.planted("taken before it is copied"):
            self.advance(queue, position)
        for half in ("first", "last"):
            self.emit("read", f"{queue}.{half}{position % depth}")
            self.emit("check", when=lambda value: value == position + 1)
        if not self.planted("taken before it is copied"):
            self.advance(queue, position)

    def wait(self, queues: list[tuple[str, int, int]], word: str, bell: str) -> list[int]:
        """Look, word up, fence, look, block, word down, and again. Jumps to where there is a frame: one for each queue, and another for each."""
        begin = self.here()
        found = [self.peek(*queue) for queue in queues]
        self.before_sleep(word)
        late = [] if self.planted("no second look") else [self.peek(*queue) for queue in queues]
        self.emit("wait", bell)
        self.after_sleep(word)
        self.jump(lambda _: True, begin)
        for jump in late:
            self.here(jump)
            self.after_sleep(word)
            found.append(self.jump(lambda _: True))
        return found


Programs = Callable[[Callable[[], Thread]], list[Thread]]


def stream(frames: int, depth: int) -> Programs:
    """One sends, the other takes, and neither sleeps: Q1 to Q3."""

    def made(thread: Callable[[], Thread]) -> list[Thread]:
        sender, receiver = thread(), thread()
        for position in range(frames):
            sender.send("q", position, depth)
            receiver.step("peek", "LOOK", f"q.sequence{position % depth}", when=lambda sequence, p=position: sequence == p + 1)  # type: ignore[misc]
            receiver.take("q", position, depth)
        return [sender, receiver]

    return made


def sleeper(frames: int, depth: int, nudges: bool = False) -> Programs:
    """One sends and rings, the other sleeps for each frame: all rules but two ways at once."""

    def made(thread: Callable[[], Thread]) -> list[Thread]:
        sender, receiver = thread(), thread()
        for position in range(frames):
            if nudges:
                sender.nudge("sleeping", "bell")
            sender.send("q", position, depth)
            sender.must_ring("sleeping", "bell")
            receiver.here(*receiver.wait([("q", position, depth)], "sleeping", "bell"))
            receiver.take("q", position, depth)
        return [sender, receiver]

    return made


def calls(count: int) -> Programs:
    """A client and a worker: each sends, rings, sleeps."""

    def made(thread: Callable[[], Thread]) -> list[Thread]:
        client, worker = thread(), thread()
        for position in range(count):
            client.send("s", position, 1)
            client.must_ring("worker_sleeping", "worker_bell")
            client.here(*client.wait([("c", position, 1)], "client_sleeping", "client_bell"))
            client.take("c", position, 1)
            worker.here(*worker.wait([("s", position, 1)], "worker_sleeping", "worker_bell"))
            worker.take("s", position, 1)
            worker.send("c", position, 1)
            worker.must_ring("client_sleeping", "client_bell")
        return [client, worker]

    return made


def two_senders() -> Programs:
    """Two workers ring for one client, which sleeps on one bell, behind one word."""

    def made(thread: Callable[[], Thread]) -> list[Thread]:
        client, *workers = thread(), thread(), thread()
        for worker, queue in zip(workers, "ab", strict=True):
            worker.commit(queue, 0, 1)  # of its frame the programs above tell
            worker.must_ring("sleeping", "bell")
        a_first, b_first, a_late, b_late = client.wait([("a", 0, 1), ("b", 0, 1)], "sleeping", "bell")
        client.here(a_first, a_late)
        b_then = client.wait([("b", 0, 1)], "sleeping", "bell")
        client.here(*b_then)
        end = client.jump(lambda _: True)
        client.here(b_first, b_late)
        client.here(*client.wait([("a", 0, 1)], "sleeping", "bell"))
        client.here(end)
        return [client, *workers]

    return made
