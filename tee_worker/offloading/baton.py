"""The baton of a pipeline: of the threads that carry parts of a pass, one computes here at a time; the others wait for the GPU worker, or for it.

Each computes with as many threads as the process may use. Two of them at once would take the cores from each other, and from the GPU worker.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from shmbroker.call.remote_op import RemoteOp
from shmbroker.client.channel import Channel
from shmbroker.client.failover import FailoverChannel, FailoverOp


class Baton:
    """Held by the thread that computes. Threads that never took it are not held up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._here = threading.local()

    def take(self) -> None:
        """Wait for it."""
        self._lock.acquire()
        self._here.held = True

    def pass_on(self) -> None:
        """Let another thread compute."""
        self._here.held = False
        self._lock.release()

    @property
    def held(self) -> bool:
        """Whether this thread has it."""
        return getattr(self._here, "held", False)


class PassingOp:
    """An op whose caller passes the baton on while it waits for the completion."""

    def __init__(self, op: RemoteOp | FailoverOp, baton: Baton) -> None:
        self._op = op
        self._baton = baton

    def __call__(self, *inputs: torch.Tensor, **arguments: Any) -> Any:
        """As the op's."""
        baton = self._baton
        if not baton.held:
            return self._op(*inputs, **arguments)
        future = self._op.submit(*inputs, **arguments)
        baton.pass_on()
        try:
            return future.result()
        finally:
            baton.take()


class PassingChannel:
    """A channel whose ops are such."""

    def __init__(self, channel: Channel | FailoverChannel, baton: Baton) -> None:
        self.memory = channel.memory
        self._channel = channel
        self._baton = baton

    def bind(self, op: str, **arguments: Any) -> Any:
        """As the channel's."""
        return PassingOp(self._channel.bind(op, **arguments), self._baton)
