"""What a program may rely on that calls ops without caring what kind of channel they are bound on."""

from __future__ import annotations

import concurrent.futures
from typing import Any, Protocol

import torch

from shmbroker.call.client_memory import ClientMemory
from shmbroker.call.report import Report
from shmbroker.lane.outputs import OutSpec


class Op(Protocol):
    """An op that was bound, with its static arguments fixed. Thread-safe."""

    name: str
    """As it was bound, and as the report lists it."""

    def __call__(self, *inputs: torch.Tensor, **options: Any) -> Any:
        """Call and wait: the op's output tensor, or a tuple of them, in the client's memory; free again when its last view dies.

        ``timeout`` among the options is in seconds; the others go to the op. Raises :class:`CallTimeout`, :class:`WorkerLost`,
        :class:`RemoteOpError`, :class:`ArenaFull`, :class:`BadInput`.
        """
        ...

    def submit(self, *inputs: torch.Tensor, **options: Any) -> concurrent.futures.Future[Any]:
        """Call without waiting: a future that gives, or raises, what the call would have. Until it is done, nobody may write to the inputs."""
        ...

    def capture(self, *inputs: torch.Tensor, **arguments: Any) -> Any:
        """Place inputs and outputs once. ``replay()`` of what is returned calls on them, as often as is liked, one call after the other.

        After a change of worker the outputs lie elsewhere: take what ``replay()`` returns.
        """
        ...


class Bindable(Protocol):
    """A channel to whoever computes: to one worker, or to whichever takes over from one. Thread-safe."""

    memory: ClientMemory
    """Where the tensors of all calls lie: what is placed there is handed over without a copy."""

    def bind(self, op: str, *, out_spec: OutSpec | None = None, **static: Any) -> Op:
        """Fix the static arguments of ``op`` once. Raises :class:`BadInput` when there is no such op or it refuses them.

        ``out_spec(*input_specs, **static)`` gives the outputs' :class:`TensorSpec`; without it the worker is asked once for each new combination of
        input shapes and dtypes.
        """
        ...

    def report(self) -> Report:
        """Calls, times and bytes so far, by op and in all. May be asked for at any time, also of a channel that was closed."""
        ...

    def close(self) -> None:
        """Fail what is outstanding and call no more. A second time does nothing."""
        ...
