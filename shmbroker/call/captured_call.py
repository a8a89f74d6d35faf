"""A call that was placed and packed once, to be replayed on the same blocks."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from shmbroker.arena.spec import spec_of
from shmbroker.call.call import Call, Places, Result, check_places, places_of
from shmbroker.call.future import CallFuture
from shmbroker.call.timeout import UNSET, Timeout


class Repeatable(Protocol):
    """An op that makes the same call again."""

    name: str

    def resubmit(self, like: Call, offsets: list[int], generations: list[int], timeout: Timeout, written: Places | None = None) -> Call:
        """Another call with the same tensors, plan and places. ``written``: the outputs, for a call that looks after them itself."""

    def wait(self, call: Call) -> Result:
        """The result of a call that was submitted."""

    @staticmethod
    def future_of(call: Call) -> CallFuture:
        """A future for a call that was submitted."""


class CapturedCall:
    """Made by :meth:`RemoteOp.capture`: blocks placed, frame packed. Write into ``inputs`` in place, then :meth:`replay`.

    ``inputs`` and ``outputs`` are tuples of tensors in the arena; every replay reads and overwrites the same ones. Their blocks are the capture's until
    it dies. Once one of the tensors lies elsewhere (``share_memory_()``, a multiprocessing queue and ``set_()`` give a tensor other memory), replaying
    raises :class:`BadInput`.
    """

    __slots__ = ("_call", "_generations", "_handed", "_offsets", "_op", "_written", "fast", "inputs", "outputs")

    def __init__(self, op: Repeatable, call: Call, offsets: list[int], generations: list[int]) -> None:
        self._op = op
        self._call = call
        self._offsets = offsets
        self._generations = generations
        self.inputs = tuple(call.inputs)
        self.outputs = tuple(call.outputs)
        self._handed = places_of([one for one in self.inputs if isinstance(one, torch.Tensor)])
        """Inputs that are no kept tensors."""
        self._written = places_of(self.outputs)
        self.fast: object = None
        """What it is replayed by without Python, where it is."""

    def __repr__(self) -> str:
        inputs, outputs = (", ".join(str(spec_of(tensor)) for tensor in tensors) or "nothing" for tensors in (self.inputs, self.outputs))
        return f"<CapturedCall of {self._op!r}: {inputs} to {outputs}>"

    def replay(self, *, timeout: Timeout = UNSET) -> Any:
        """Call again and wait: the output tensor, or a tuple of them. Raises as :meth:`RemoteOp.__call__`.

        A hot path: what looking whether the tensors lie where they lay costs is in docs/performance.md.
        """
        op = self._op
        for tensor, place in self._handed:
            if tensor.data_ptr() != place or tensor.requires_grad:
                check_places(f"op {op.name!r}: captured input", self._handed)
        call = op.resubmit(self._call, self._offsets, self._generations, timeout)
        moved = False
        for tensor, place in self._written:  # while the worker is at it
            if tensor.data_ptr() != place or tensor.requires_grad:
                moved = True
        result = op.wait(call)
        if moved:
            self._check_written()
        return result

    def _check_written(self) -> None:
        """Raise :class:`BadInput` where an output does not lie any more where the worker writes it."""
        check_places(f"op {self._op.name!r}: captured output", self._written)

    def submit(self, *, timeout: Timeout = UNSET) -> CallFuture:
        """Call again without waiting. The same blocks are used by every replay: wait for one before the next."""
        check_places(f"op {self._op.name!r}: captured input", self._handed)
        return self._op.future_of(self._op.resubmit(self._call, self._offsets, self._generations, timeout, self._written))
