"""Kept tensors: results that stay with the worker, and the handle that a client has of one."""

from __future__ import annotations

import itertools
from collections import deque
from typing import TYPE_CHECKING, Any

import torch

from shmbroker.arena.spec import TensorSpec, contiguous_strides
from shmbroker.errors import BadInput

if TYPE_CHECKING:
    from shmbroker.client.channel import Channel


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

    def number_on(self, channel: Channel) -> int:
        """What names it in frames of ``channel``. Raises :class:`BadInput` on another channel, and once it was freed."""
        if self._books is None:
            raise BadInput("this kept tensor was freed: keep it anew")
        if self._books is not channel.kept:
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
            books.tell()

    def __del__(self) -> None:
        books = getattr(self, "_books", None)
        if books is not None:
            # Nothing but this: a finaliser runs at any moment, in the midst of a call too.
            books.dropped.append(self.number)


class KeptBooks:
    """A channel's kept tensors as its client counts them: numbers never given twice, and those to be let go."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._numbers = itertools.count(1)
        self.dropped: deque[int] = deque()
        """Not told to the worker yet. Appending to it takes no lock."""
        self._fetch: Any = None

    def new(self, spec: TensorSpec) -> Kept:
        """A handle for a result that the worker is about to keep."""
        return Kept(self, next(self._numbers), spec)

    def fetch(self, kept: Kept) -> Any:
        """The values of ``kept``, in shared memory."""
        if self._fetch is None:
            self._fetch = self._channel.kept_op()
        return self._fetch(kept)

    def tell(self) -> None:
        """Tell the worker of what is to be let go, where its queue has room; else with a later call."""
        self._channel.let_go()
