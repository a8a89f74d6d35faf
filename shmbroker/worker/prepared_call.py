"""A call that need only be run: its frame is checked, its tensors are made.

What an op may do with its inputs: read them while it runs. They are its caller's, and hold other values once the call is over. An op that writes into
one, or keeps one or a view of it, breaks that contract and is told so; one that wants to says so when it is registered.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from sys import getrefcount

import torch

from shmbroker.worker.counters import Watched, WatchedInputs
from shmbroker.worker.ops import BoundOp, Static

_storage_uses: Callable[[int], int] = torch._C._storage_Use_Count

_Watched = tuple[torch.Tensor, int, int, int, int]
"""An input, its version, its storage and who uses that, and the references to the input, while no op has it."""


_nobodys = torch.empty(0)
_NOBODYS = _nobodys.untyped_storage()
_STORAGE_REFERENCES = getrefcount(_nobodys.untyped_storage()) - 1
"""To a storage that nothing but tensors keep."""


class ContractBroken(Exception):
    """An op did with an input what it may not. The text is the answer to the call."""


class PreparedCall:
    """A frame that was checked, with its tensors: when the same one comes again, byte for byte, it need only be run.

    Each tensor has a version counter and a storage of its own, so what the op did with it is seen by counters alone. ``repeatable``: per-call arguments
    lie behind what a frame is recognised by. ``unwritten``: of inputs that are copies, to try out a call of
    the kind ``tried_as``, what they were. ``divisible``: it may be run in pieces, where the op is one that can.
    """

    __slots__ = ("_unwritten", "_watched", "inputs", "op", "outputs", "pieces", "repeatable", "run", "single", "tried_as", "watched")

    def __init__(
        self,
        op: BoundOp,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        arguments: Static,
        *,
        single: bool,
        repeatable: bool,
        unwritten: Sequence[torch.Tensor] = (),
        tried_as: object = None,
        divisible: bool = False,
    ) -> None:
        self.op = op
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.single = single
        self.run: Callable[[], object] = op.prepare(self.inputs, outputs, arguments, single=single)
        self.pieces = op.pieces(self.inputs, outputs, arguments, single=single) if divisible else None
        self.repeatable = repeatable
        self.tried_as = tried_as
        self._unwritten = unwritten
        self._watched: tuple[_Watched, ...] = ()
        self.watched: Watched | None = None
        """What tells the same as :meth:`changed`, where steps are compiled."""

    def watch(self) -> None:
        """Note how the inputs are while no op has them. Called once whoever prepared the call has let go of them."""
        storages = [_own_storage(tensor) for tensor in self.inputs]
        self._watched = tuple(
            [(tensor, tensor._version, storage, _storage_uses(storage), 0) for tensor, storage in zip(self.inputs, storages, strict=True)]
        )
        references = self._references()
        self._watched = tuple([(*one[:4], count) for one, count in zip(self._watched, references, strict=True)])
        if WatchedInputs is not None:
            self.watched = WatchedInputs(self.inputs, tuple(storages))

    def _references(self) -> list[int]:
        """Of each input, counted as :meth:`changed` does: the loop has some itself."""
        counts = []
        for tensor, version, storage, uses, references in self._watched:  # noqa: B007
            counts.append(getrefcount(tensor))
        return counts

    def changed(self) -> bool:
        """Whether an input is not as it was before the op ran. Part of every call: it looks at counters only."""
        for tensor, version, storage, uses, references in self._watched:
            if tensor._version != version or _storage_uses(storage) != uses or getrefcount(tensor) != references:
                return True
        return False

    def check(self) -> None:
        """Raise :class:`ContractBroken` when what has :meth:`changed` is the op's fault."""
        if not self.op.in_place:
            for index, one in enumerate(self._watched):
                if one[0]._version != one[1]:
                    raise self._wrote(index)
        gc.collect()  # what only a reference cycle keeps, an exception that was caught most often, is not kept
        for index, references in enumerate(self._references()):
            one = self._watched[index]
            if references != one[4] or _storage_uses(one[2]) != one[3]:
                raise self._kept(index)

    def check_copies(self) -> None:
        """After a run on copies: look closer, at what no counter tells (writes through NumPy, a storage or a DLPack capsule that is kept)."""
        for index, before in enumerate(self._unwritten):
            copy = self.inputs[index]
            if not _same_bytes(copy, before):
                raise self._wrote(index)
            if _is_held(copy):
                gc.collect()
                if _is_held(copy):
                    raise self._kept(index)

    def _wrote(self, index: int) -> ContractBroken:
        return ContractBroken(
            f"op {self.op.name!r} wrote into input {index}: inputs are their caller's, to be read; register the op with copies_inputs=True, and it "
            "has copies of its own, or with in_place=True, and its callers get what it writes"
        )

    def _kept(self, index: int) -> ContractBroken:
        return ContractBroken(
            f"op {self.op.name!r} kept input {index}, or a view of it: it ends with the call, and its memory will hold other values; keep a clone(), "
            "or register the op with copies_inputs=True, and it has copies of its own"
        )


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    # Copies, whose strides are those of their shapes: a tensor of one element may have any, and counts as contiguous.
    first, second = (tensor.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)


def _is_held(tensor: torch.Tensor) -> bool:
    """Whether more than the interpreter holds it, or anybody its storage."""
    uses: int = tensor._use_count()  # type: ignore[attr-defined]
    return uses > 1 or getrefcount(tensor.untyped_storage()) > _STORAGE_REFERENCES


def _own_storage(tensor: torch.Tensor) -> int:
    """The storage that only views of ``tensor`` use. For one that lies in memory of many (a client's arena on a device): one that nobody uses."""
    storage = tensor.untyped_storage()
    if storage.nbytes() <= tensor.nbytes:
        return int(storage._cdata)
    reach = tensor.nbytes and 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int((storage if storage.nbytes() <= reach * tensor.element_size() else _NOBODYS)._cdata)
