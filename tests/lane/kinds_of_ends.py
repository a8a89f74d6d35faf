"""The compiled ends of queues and those in Python, made alike in private memory."""

from __future__ import annotations

import importlib
from array import array
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from shmbroker.arena.spec import TensorSpec
from shmbroker.lane.frames import FrameTemplate
from shmbroker.memory import layout

KINDS = {"python": "shmbroker.lane.python_ends", "compiled": "shmbroker.lane._ends"}
ENDS = ("SubmissionSender", "SubmissionReceiver", "CompletionSender", "CompletionReceiver")
DEPTH = 4
TAKEN, SLEEPING, SLOTS = 0, 8, 64
"""Offsets in a segment of one queue."""

UINT32_MAX, UINT64_MAX = (1 << 32) - 1, (1 << 64) - 1


def module_of(kind: str) -> ModuleType:
    if kind == "compiled":
        pytest.importorskip("shmbroker.lane._ends", reason="built without a C compiler")
    return importlib.import_module(KINDS[kind])


def slot_bytes(name: str) -> int:
    return layout.SUBMISSION_SLOT_BYTES if name.startswith("Submission") else layout.COMPLETION_SLOT_BYTES


def segment_for(name: str, depth: int = DEPTH) -> Any:
    """What an end needs of a segment, in private memory that ends with the last slot: a sanitizer sees what is written behind it."""
    memory = array("B", [0]) * (SLOTS + depth * slot_bytes(name))  # a bytearray would have a byte more than it says
    return SimpleNamespace(map=memory, geometry=SimpleNamespace(depth=depth))


def with_words(segment: Any) -> Any:
    segment.words = memoryview(segment.map).cast("Q")
    return segment


def arguments_of(name: str, segment: Any, **changed: Any) -> dict[str, Any]:
    """What an end is made with."""
    made: dict[str, Any] = {"segment": segment, "offset": SLOTS, "taken_offset": TAKEN}
    if name.endswith("Sender"):
        made |= {"sleeping_offset": SLEEPING, "ring": lambda: None}
    return {**made, **changed}


def make(ends: ModuleType, name: str, segment: Any, **changed: Any) -> Any:
    return getattr(ends, name)(**arguments_of(name, segment, **changed))


def uses(name: str) -> dict[str, Callable[[Any], object]]:
    """Each method of an end, called as it should be."""
    return {
        "SubmissionSender": {"submit": lambda end: end.submit(TEMPLATE, 1, 0, 1, [0, 0], [1, 1]), "nudge": lambda end: end.nudge()},
        "SubmissionReceiver": {"take": lambda end: end.take(), "ready": lambda end: end.ready()},
        "CompletionSender": {"complete": lambda end: end.complete((1, 0, 0, 0, b""))},
        "CompletionReceiver": {"take": lambda end: end.take(), "ready": lambda end: end.ready()},
    }[name]


def template_of(tensors: int, metadata: bytes = b"") -> FrameTemplate:
    form = (TensorSpec((3, 5), torch.float32), (5, 1))
    return FrameTemplate(7, [form] * (tensors - 1), [form] * min(tensors, 1), metadata)


TEMPLATE = template_of(2)


def submission(**changed: Any) -> tuple[Any, ...]:
    arguments = {"template": TEMPLATE, "call_id": 5, "deadline_ns": 6, "submitted_ns": 7, "offsets": [256, 512], "generations": [8, 9]}
    return tuple({**arguments, **changed}.values())


def completion(**changed: Any) -> tuple[Any, ...]:
    return tuple({"call_id": 5, "status": 1, "queued_ns": 6, "compute_ns": 7, "body": b"why", **changed}.values())


class Pair:
    """Both ends of one queue."""

    def __init__(self, ends: ModuleType, what: str, depth: int = DEPTH) -> None:
        self.segment = with_words(segment_for(what, depth))
        self.rung = 0
        sender = make(ends, f"{what}Sender", self.segment, ring=self.ring)
        self.send: Callable[..., bool] = sender.submit if what == "Submission" else lambda completion: sender.complete(completion)
        self.receiver = make(ends, f"{what}Receiver", self.segment)

    def ring(self) -> None:
        self.rung += 1

    def sequences(self) -> list[int]:
        """What is published in each slot."""
        step = (len(self.segment.map) - SLOTS) // self.segment.geometry.depth
        return [self.segment.words[at // 8] for at in range(SLOTS, len(self.segment.map), step)]

    def sleep(self) -> None:
        self.segment.words[SLEEPING // 8] = 1
