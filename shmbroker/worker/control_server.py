"""What answers the control requests of a worker's clients: open a channel, bind an op, tell an op's shapes, close."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from shmbroker.arena.spec import NAME_OF, TensorSpec, dtype_named
from shmbroker.control import messages as m
from shmbroker.control.endpoint import transport_of
from shmbroker.control.liveness import Watch
from shmbroker.control.messages import ProcessId
from shmbroker.control.unix_responder import AnyResponder, require_room
from shmbroker.errors import BadInput, ChannelError, ProtocolMismatch, RemoteOpError, describe
from shmbroker.lane.choice import agreed
from shmbroker.lane.op_error import pack_op_error
from shmbroker.memory import layout
from shmbroker.systemd.notify import Watchdog
from shmbroker.worker.built_in_ops import BUILT_IN_OPS
from shmbroker.worker.draining import Stop
from shmbroker.worker.open_channels import OpenChannels
from shmbroker.worker.ops import OpDefinition, OpFailed

log = logging.getLogger(__name__)

REQUEST_WAIT_SECONDS = 0.1
"""How long a request is waited for before the server looks after everything else."""

OP_ERROR_BYTES = 3072
"""Of an op's error in an answer, which has room for 4096 characters."""

CHANNEL_FILES = 6
"""Open files that a channel takes at most: the watch on its client, its segment, twice for a moment, the doorbell, two connections of the zmq lane."""

LIVENESS_SECONDS = 0.5
"""How often the server looks whether clients live; the broker tells of their deaths earlier."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What clients are told of a worker when they open a channel. ``ops``: all that were registered."""

    service: str
    name: str
    identity: str
    ops: Mapping[str, OpDefinition]
    bell_name: str
    """Of the doorbell that rouses the worker for frames in shared memory."""
    endpoint: str
    """Of the zmq lane."""
    tracebacks: bool = True
    """Whether an op's error carries its traceback to the client."""
    ensure_named: Callable[[], None] = lambda: None
    """Makes the doorbell's name anew where it was taken away. Called by the control thread."""


class ControlServer:
    """Answers control requests until told to ``stop``, and looks whether clients, and ``parent``, still live.

    :meth:`serve` is the control thread, which alone uses ``responder`` and changes ``channels``. Other threads call :meth:`client_gone`.
    An op without an out_spec is tried out for its shapes in this thread too, on tensors without values.
    ``parent``: a process that this worker ends with. ``watchdog``: thread-safe.
    """

    def __init__(
        self,
        offer: Offer,
        responder: AnyResponder,
        channels: OpenChannels,
        stop: Stop,
        *,
        parent: ProcessId | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self._offer = offer
        self._responder = responder
        self._channels = channels
        self._stop = stop
        self._parent = parent
        self._watchdog = watchdog
        self._gone: queue.SimpleQueue[str] = queue.SimpleQueue()
        """Clients that the broker says are gone: from any thread to the control thread."""
        self._handlers: dict[type, Callable[[Any], m.Message]] = {
            m.AskChannels: lambda asked: m.ChannelCount(self._channels.count),
            m.OpenChannel: self._open_channel,
            m.CloseChannel: self._close_channel,
            m.OpenDeviceArena: self._open_device_arena,
            m.Bind: self._bind,
            m.AskOutSpec: self._ask_out_spec,
        }

    def client_gone(self, client: str) -> None:
        """Have all channels of this client dropped soon. From any thread."""
        self._gone.put(client)

    def serve(self) -> None:
        """Answer until told to stop."""
        parent = Watch(self._parent) if self._parent is not None else None
        next_look = time.monotonic() + LIVENESS_SECONDS
        while not self._stop.requested:
            if self._watchdog is not None:
                self._watchdog.turning("control")
            self._responder.wait(REQUEST_WAIT_SECONDS)
            self._responder.answer_waiting(self._answer)
            while not self._gone.empty():
                self._channels.drop_client(self._gone.get())
            self._channels.drop_broken()
            self._channels.publish()
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + LIVENESS_SECONDS
                if parent is not None and not parent.alive():
                    self._stop.request()
                self._channels.drop_dead()

    def _answer(self, sender: bytes, message: m.AnyMessage) -> m.Message:
        handler = self._handlers.get(type(message))
        if handler is None:
            raise ProtocolMismatch(f"a worker takes no {type(message).__name__}")
        if isinstance(message, m.OpenChannel):
            return self._open_channel(message, self._responder.user_of(sender))
        return handler(message)

    def _open_channel(self, opening: m.OpenChannel, user: int | None = None) -> m.ChannelOpened | m.ChannelCount:
        offer = self._offer
        if opening.service != offer.service:
            raise ChannelError(f"this worker offers {offer.service!r}, not {opening.service!r}")
        if opening.at_most is not None and self._channels.count > opening.at_most:
            return m.ChannelCount(self._channels.count)
        require_room(self._responder, CHANNEL_FILES)
        # fault: before channel opened
        lane, doorbell = agreed(opening.lane, opening.doorbell)
        offer.ensure_named()
        channel = self._channels.open(opening, lane, doorbell, user)
        log.info(
            "channel area %d opened by %s (pid %d): lane %s, doorbell %s, control %s",
            opening.index,
            opening.client_name,
            opening.process.pid,
            lane.value,
            doorbell.value,
            transport_of(self._responder.endpoint),
        )
        # fault: after channel opened
        return m.ChannelOpened(
            channel=channel.number,
            lane=lane.value,
            doorbell=doorbell.value,
            bell=offer.bell_name,
            endpoint=offer.endpoint,
            token=channel.token,
            ops=tuple(offer.ops),
            identity=offer.identity,
        )

    def _close_channel(self, request: m.CloseChannel) -> m.ChannelClosed:
        return m.ChannelClosed(self._channels.close_for_client(request.channel))

    def _open_device_arena(self, request: m.OpenDeviceArena) -> m.Done:
        self._channels.find(request.channel).mapped.open_device(request.handle, request.nbytes)
        return m.Done()

    def _bind(self, request: m.Bind) -> m.Bound | m.Refused:
        channel, ops = self._channels.find(request.channel), self._offer.ops
        definition = ops.get(request.op) or BUILT_IN_OPS.get(request.op)
        if definition is None:
            raise BadInput(f"worker {self._offer.name!r} has no op {request.op!r}; it has: {', '.join(ops) or 'none'}")
        try:
            op = definition.bind(request.static, channel.state)
            return m.Bound(channel.bind(op), op.in_place)
        except OpFailed as failed:
            return self._op_failed(request.op, failed)

    def _op_failed(self, name: str, failed: OpFailed) -> m.Refused:
        """What an op raised outside of a call, as the answer to the client that met it."""
        error = failed.error
        log.warning("op %r failed %s: %s", name, failed, describe(error), exc_info=error)
        told = pack_op_error(error, OP_ERROR_BYTES, traceback=self._offer.tracebacks)
        return m.Refused(RemoteOpError.__name__, f"op {name!r} failed on worker {self._offer.name!r} {failed}\n{told}")

    def _ask_out_spec(self, request: m.AskOutSpec) -> m.OutSpecs | m.Refused:
        op = self._channels.find(request.channel).ops.get(request.op_id)
        if op is None:
            raise ChannelError(f"op id {request.op_id} is not bound on channel {request.channel}")
        arguments_bytes = len(msgspec.msgpack.encode(request.arguments))
        if len(request.inputs) > layout.MAX_TENSORS or arguments_bytes > layout.METADATA_BYTES:
            # Answers are remembered: what no call can ask for must not fill the memory.
            raise BadInput(
                f"{len(request.inputs)} inputs and {arguments_bytes} bytes of arguments are more than a frame carries: {layout.MAX_TENSORS} "
                f"tensors, outputs among them, and {layout.METADATA_BYTES} bytes"
            )
        inputs = [TensorSpec(spec.shape, dtype_named(spec.dtype)) for spec in request.inputs]
        try:
            outputs = op.outputs(inputs, request.arguments)
        except OpFailed as failed:
            return self._op_failed(op.name, failed)
        except Exception as error:  # shapes that no tensor can have
            raise BadInput(f"op {op.name!r} cannot take {', '.join(map(str, inputs))}: {describe(error)}") from None
        return m.OutSpecs(tuple(m.SpecInfo(spec.shape, NAME_OF[spec.dtype]) for spec in outputs.specs), outputs.single)
