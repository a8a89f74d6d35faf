"""What a worker asks of the device that its ops compute on: where kept tensors live, what a mapped segment and a device arena mean to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from shmbroker.arena.spec import TensorSpec
from shmbroker.errors import BadInput


def nothing() -> None:
    """What is to be done at the end where nothing was done at the start."""


class Launched(Protocol):
    """A call whose op has returned while its device still works. Returned by ops of devices that are :attr:`DeviceMemory.asynchronous`."""

    def wait(self) -> None:
        """Wait until its results are where they belong, without the interpreter lock. Raises what went wrong on the device."""


class DeviceMemory(Protocol):
    """The device's memory, as the worker sees it."""

    asynchronous: bool
    """Whether ops return a :class:`Launched`."""

    def map(self, address: int, nbytes: int) -> Callable[[], None]:
        """Told of a client's segment, mapped at ``address``; returns what is to be called before it is unmapped."""

    def empty(self, spec: TensorSpec) -> torch.Tensor:
        """A tensor for a result that stays."""

    def open_arena(self, handle: bytes, nbytes: int) -> tuple[torch.Tensor, Callable[[], None]]:
        """A client's device arena as bytes, by its handle, and what closes it. Raises :class:`ShmBrokerError` when it cannot be had."""


class HostMemory:
    """Of a worker that computes where the client's memory is."""

    asynchronous = False

    def map(self, address: int, nbytes: int) -> Callable[[], None]:
        """Nothing need be done."""
        return nothing

    def empty(self, spec: TensorSpec) -> torch.Tensor:
        """A tensor of its own."""
        return torch.empty(spec.shape, dtype=spec.dtype)

    def open_arena(self, handle: bytes, nbytes: int) -> tuple[torch.Tensor, Callable[[], None]]:
        """Refused: the CPU does not see a device's memory."""
        raise BadInput("this worker computes on the CPU and opens no device arena")
