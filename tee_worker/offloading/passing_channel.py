"""A channel whose callers let another thread compute while they wait for the GPU worker."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import torch

from shmbroker.client import Bindable, Op, Report
from tee_worker.offloading.baton import Baton


class PassingOp:
    """An op whose caller passes the baton on while it waits for the completion. Used as any :class:`Op`."""

    def __init__(self, op: Op, baton: Baton) -> None:
        self.name = op.name
        self._op = op
        self._baton = baton

    def __call__(self, *inputs: torch.Tensor, **options: Any) -> Any:
        """As the op's."""
        baton = self._baton
        if not baton.held:
            return self._op(*inputs, **options)
        future = self._op.submit(*inputs, **options)
        baton.pass_on()
        try:
            return future.result()
        finally:
            baton.take()

    def submit(self, *inputs: torch.Tensor, **options: Any) -> concurrent.futures.Future[Any]:
        """As the op's. Who waits for the future keeps the baton."""
        return self._op.submit(*inputs, **options)

    def capture(self, *inputs: torch.Tensor, **arguments: Any) -> Any:
        """As the op's. Who replays keeps the baton."""
        return self._op.capture(*inputs, **arguments)


class PassingChannel:
    """A channel whose ops are such. Used as any :class:`Bindable`."""

    def __init__(self, channel: Bindable, baton: Baton) -> None:
        self.memory = channel.memory
        self.channel_below = channel
        self._baton = baton

    def bind(self, op: str, **static: Any) -> Op:
        """As the channel's."""
        return PassingOp(self.channel_below.bind(op, **static), self._baton)

    def report(self) -> Report:
        """As the channel's."""
        return self.channel_below.report()

    def close(self) -> None:
        """As the channel's."""
        self.channel_below.close()
