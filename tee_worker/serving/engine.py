"""What generates for the endpoint: sequences go in, tokens come out, whether one sequence at a time or many at once.

Whose thread does what: an engine generates in a thread of its own; everything here is called in the event loop's thread, and tokens arrive there.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, TypeVar

from tee_worker.serving.sampling import Chooser

Result = TypeVar("Result")


class End(str, Enum):
    """Why a sequence ended, in OpenAI's words."""

    STOP = "stop"
    """It said that it is done, or it reached a string at which the request wanted it to stop."""
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class SequenceToGenerate:
    """What is generated for one answer."""

    prompt: Sequence[int]
    new_tokens: int
    """At most."""
    ends: frozenset[int]
    """Tokens after which it is over."""
    chooser: Chooser


class Generation:
    """One sequence as it is generated."""

    _numbers = itertools.count(1)

    def __init__(self, sequence: SequenceToGenerate) -> None:
        self.sequence = sequence
        self.name = f"sequence-{next(self._numbers)}"
        self.tokens: list[int] = []
        """All that were read."""
        self.first_at: float | None = None
        """When the first came, by the monotonic clock."""
        self.seen = 0
        """The engine's count of those that came."""
        self._arrived: asyncio.Queue[list[int] | BaseException | None] = asyncio.Queue()
        self.cancel: Callable[[], None] = lambda: None
        """Generate no more of it: nobody reads it. Set by the engine; a second time does nothing."""

    def put(self, tokens: list[int]) -> None:
        """More tokens; none: that was all. For the engine."""
        if tokens and self.first_at is None:
            self.first_at = time.monotonic()
        self._arrived.put_nowait(tokens or None)

    def fail(self, error: BaseException) -> None:
        """No more will come. For the engine."""
        self._arrived.put_nowait(error)

    async def arrivals(self) -> AsyncGenerator[list[int], None]:
        """The tokens in the order of their generation. Raises what went wrong. Whoever stops reading early calls ``cancel``."""
        while True:
            arrived = await self._arrived.get()
            if arrived is None:
                return
            if isinstance(arrived, BaseException):
                raise arrived
            self.tokens.extend(arrived)
            yield arrived

    @property
    def end(self) -> End:
        """Why it ended, if it did so by itself."""
        return End.STOP if self.tokens and self.tokens[-1] in self.sequence.ends else End.LENGTH


@dataclass(frozen=True, slots=True)
class Load:
    """How much an engine has to do now: sequences, and blocks of its cache."""

    running: int
    waiting: int
    blocks_used: int = 0
    blocks: int = 0
    passes: int = 0
    """So far, of the present batch."""


class Engine(Protocol):
    """What the endpoint needs of one."""

    most: int
    """Sequences that are computed at once."""

    def start(self, generation: Generation) -> None:
        """Begin to generate, when its turn comes."""

    async def alone(self, work: Callable[[], Result]) -> Result:
        """Do ``work`` with the model while no other call of it runs."""

    def load(self) -> Load:
        """How much it has to do now."""

    def stop(self) -> None:
        """Have what generates fail at its next token."""

    def close(self) -> None:
        """End what generates, and wait a moment for that."""
