"""Kept tensors: results that stay with the worker, and the handle that a client has of one."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import torch

from shmbroker.arena.spec import TensorSpec, contiguous_strides
from shmbroker.call.call import Call, clock_ns
from shmbroker.call.plan import Plan
from shmbroker.call.queue_pair import QueuePair
from shmbroker.call.statistics import OpStatistics
from shmbroker.errors import BadInput, ShmBrokerError
from shmbroker.lane.frame_layout import KEPT_OP
from shmbroker.lane.outputs import Outputs
from shmbroker.memory import layout

LETTING_GO = "shmbroker.free"
"""The name of the calls that tell the worker what was dropped: nobody waits for them, and no report has them."""


class Kept:
    """A result that stayed on the worker, made by :meth:`RemoteOp.keep`. An input for later calls on the same channel.

    It lives until the handle dies, is let go with :meth:`free`, or the channel is closed. The worker is told of a handle's death with the next call.
    Thread-safe.
    """

    __slots__ = ("_books", "dtype", "number", "shape")

    def __init__(self, books: KeptBooks, number: int, spec: TensorSpec) -> None:
        self._books: KeptBooks | None = books
        self.number = number
        self.shape = torch.Size(spec.shape)
        self.dtype = spec.dtype

    def __repr__(self) -> str:
        state = "" if self._books is not None else ", freed"
        return f"<Kept {TensorSpec(self.shape, self.dtype)}{state}>"

    def stride(self) -> tuple[int, ...]:
        """Elements; a kept tensor is contiguous."""
        return contiguous_strides(self.shape)

    def number_in(self, books: KeptBooks) -> int:
        """What names it in frames of the channel whose ``books`` these are. Raises :class:`BadInput` on another channel, and once it was freed."""
        if self._books is None:
            raise BadInput("this kept tensor was freed: keep it anew")
        if self._books is not books:
            raise BadInput("a kept tensor lies with the worker of its own channel: fetch() it, and hand over the tensor")
        return self.number

    def fetch(self) -> torch.Tensor:
        """A copy of its values in shared memory. Raises as a call does."""
        if self._books is None:
            raise BadInput("this kept tensor was freed: keep it anew")
        result: torch.Tensor = self._books.fetch(self)
        return result

    def free(self) -> None:
        """Let it go now rather than with the handle. A second time does nothing."""
        books, self._books = self._books, None
        if books is not None:
            books.dropped.append(self.number)
            books.let_go()

    def __del__(self) -> None:
        books = getattr(self, "_books", None)
        if books is not None:
            # Nothing but this: a finaliser runs at any moment, in the midst of a call too.
            books.dropped.append(self.number)


class KeptBooks:
    """A channel's kept tensors as its client counts them: numbers never given twice, and those to be let go."""

    def __init__(self, pair: QueuePair, fetch: Callable[[Kept], torch.Tensor]) -> None:
        """``fetch``: copies a kept tensor's values to where the client reads them."""
        self.fetch = fetch
        self._pair = pair
        self._numbers = itertools.count(1)
        self.dropped: deque[int] = deque()
        """Not told to the worker yet. Appending to it takes no lock."""
        self._statistics = OpStatistics(LETTING_GO)
        pair.do_first(self.dropped, self.let_go)

    def new(self, spec: TensorSpec) -> Kept:
        """A handle for a result that the worker is about to keep."""
        return Kept(self, next(self._numbers), spec)

    def let_go(self) -> None:
        """Tell the worker which were dropped, in frames of their own, as far as its queue has room; the rest with a later call.

        Their answers are not waited for.
        """
        dropped, pair = self.dropped, self._pair
        while dropped:
            numbers: list[int] = []
            with suppress(IndexError):  # another thread was faster
                while len(numbers) < layout.MAX_TENSORS:
                    numbers.append(dropped.popleft())
            nothing = [torch.empty(0, dtype=torch.uint8)] * len(numbers)
            spaces = [layout.Space.KEPT] * len(numbers)
            plan = Plan(pair, self._statistics, KEPT_OP, nothing, Outputs((), False), b"", spaces)
            try:
                sent = pair.try_submit(Call(plan, (), (), clock_ns(), 0, ()), plan.template, numbers, [1] * len(numbers))
            except ShmBrokerError:
                return  # the worker is lost, and what it kept with it
            if not sent:
                dropped.extend(numbers)
                return
