"""Going on with a stream at another server: what has been told of it, as the first server says with each of its chunks.

A server that is given a :class:`Resumption` reads the tokens as if it had generated them, one arrival after the other, says nothing of them, and goes
on with the next: so text, calls, counts and ids are those of a stream that was never cut. It travels in the ASGI scope, where only the process that
calls the application can put it; nothing that a client sends is read as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol

import msgspec

from tee_worker.serving.chosen import Chosen

EXTENSION = "shmbroker.journal"
"""The scope's extension that holds the :class:`Journal` of a request."""


class Stage(IntEnum):
    """How far an answer has been told."""

    GENERATING = 0
    TEXT = 1
    """All of its text."""
    END = 2
    """And why it ended."""


class Step(msgspec.Struct, array_like=True):
    """What one chunk tells of an answer: the tokens that came since the last one, as they came, and how far that is."""

    answer: int
    arrivals: list[list[int]]
    chosen: list[Chosen]
    stage: Stage


class AnswerSoFar(msgspec.Struct, array_like=True):
    """All that was told of an answer."""

    arrivals: list[list[int]] = []
    chosen: list[Chosen] = []
    stage: Stage = Stage.GENERATING


class Resumption(msgspec.Struct, array_like=True):
    """A stream so far."""

    created: int
    chunks: int = 0
    """That were told."""
    answers: list[AnswerSoFar] = []

    def add(self, steps: Sequence[Step]) -> None:
        """One chunk more."""
        self.chunks += 1
        for step in steps:
            answer = self.answers[step.answer]
            answer.arrivals += step.arrivals
            answer.chosen += step.chosen
            answer.stage = step.stage


class Telling(Protocol):
    """Of an answer: what of it was handed on to whoever tells it."""

    @property
    def told_arrivals(self) -> int:
        """How many."""

    @property
    def told_stage(self) -> Stage:
        """How far that is."""

    def arrived(self, first: int, last: int) -> tuple[list[list[int]], list[Chosen]]:
        """The tokens of so many arrivals, and their log probabilities where they are asked for."""


class Journal:
    """Of one request, between the application and whoever calls it and may go on with it elsewhere."""

    def __init__(self, resumption: Resumption | None = None) -> None:
        self.resumption = resumption
        """Where to go on; None: from the beginning."""
        self.created = 0
        self.answers = 0
        """How many there are."""
        self.resumable = False
        """Whether the same text comes of it elsewhere: every token is the likeliest."""
        self.failed = False
        """Whether what is told last is a failure of this server, which another one need not have."""
        self._steps: list[Step] | None = None
        self._noted: list[tuple[int, Stage]] = []

    def begin(self, created: int, answers: Sequence[Telling], *, resumable: bool) -> None:
        """What is generated."""
        self.created, self.answers, self.resumable = created, len(answers), resumable
        self._noted = [(one.told_arrivals, one.told_stage) for one in answers]

    def steps_to(self, answers: Sequence[Telling]) -> list[Step]:
        """What the answers have told since the last chunk."""
        steps = []
        for index, answer in enumerate(answers):
            arrivals, stage = self._noted[index]
            if (answer.told_arrivals, answer.told_stage) != (arrivals, stage):
                steps.append(Step(index, *answer.arrived(arrivals, answer.told_arrivals), answer.told_stage))
                self._noted[index] = (answer.told_arrivals, answer.told_stage)
        return steps

    def note(self, steps: list[Step]) -> None:
        """Of the chunk that is sent next."""
        self._steps = steps

    def taken(self) -> list[Step] | None:
        """The steps of what is being sent; None where it is no chunk."""
        steps, self._steps = self._steps, None
        return steps
