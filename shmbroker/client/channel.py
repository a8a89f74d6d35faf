"""A channel: what a client has open with one worker. Binds ops, asks the worker, reports, and closes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from shmbroker.arena.spec import NAME_OF, TensorSpec, dtype_named
from shmbroker.call.call import clock_ns
from shmbroker.call.client_memory import ClientMemory
from shmbroker.call.compiled_op import op_class
from shmbroker.call.kept import Kept, KeptBooks
from shmbroker.call.placement import Placement
from shmbroker.call.queue_pair import QueuePair
from shmbroker.call.remote_op import OutputsOf, RemoteOp
from shmbroker.call.report import Report
from shmbroker.call.statistics import OpStatistics, TrustCounts, no_calls, nothing_told, published
from shmbroker.client.closing import Closing
from shmbroker.control import messages as m
from shmbroker.control.endpoint import transport_of
from shmbroker.control.sockets import Requester
from shmbroker.errors import BadInput, CallTimeout, ChannelError, RemoteOpError, ShmBrokerError
from shmbroker.lane.frame_layout import KEPT_OP
from shmbroker.lane.op_error import read_op_error
from shmbroker.lane.outputs import Outputs, OutSpec

log = logging.getLogger(__name__)

Answer = TypeVar("Answer", bound=m.Message)

ANSWER_SECONDS = 30.0
"""How long a worker that lives may take to answer where no call's deadline says so: it may load something at a bind, or try an op out meanwhile."""

CLOSING_SECONDS = 1.0
"""How long the worker may take to hear that a channel is closed; it finds out by itself when the client ends."""

NO_LIMIT_SECONDS = 1e9
"""For a call without a deadline."""

_COUNTED = ("errors", "sent_bytes", "received_bytes", "rpc_ns", "copied_bytes")


class Channel:
    """Made by :meth:`Client.channel`. Thread-safe: several threads may bind, call, submit and wait on one channel."""

    def __init__(
        self,
        memory: ClientMemory,
        pair: QueuePair,
        requester: Requester,
        opened: m.ChannelOpened,
        worker: m.WorkerInfo,
        service: str,
        index: int,
        timeout: float | None,
        on_close: Callable[[Channel], None],
    ) -> None:
        """``requester``: to ask the worker by. ``index``: of the channel's area in the segment. ``timeout``: of calls that give none, seconds."""
        self.memory = memory
        self.pair = pair
        self.opened = opened
        """What the worker answered when it was opened."""
        self.index = index
        self.service = service
        self.worker_name = worker.name
        self.worker_pid = worker.process.pid
        self.worker_id = worker.peer
        self.device = worker.device
        self.lane = pair.lane.kind.value
        self.doorbell = pair.lane.doorbell.value
        self.endpoint = worker.endpoint
        """Where the worker answers control requests."""
        self.control = transport_of(worker.endpoint)
        self.ops = opened.ops
        self.identity = opened.identity
        """What the worker told of its state, for telling whether another could take its place."""
        self.opened_ns = clock_ns()
        self._timeout = timeout
        self._requester = requester
        self._control_lock = threading.Lock()
        self._closed = False
        self._told_lost = False
        self.goes_on = False
        """The worker still ran a call of it when it was closed."""
        self._closing = Closing(f"the channel to {worker.name}")
        for step in (lambda: on_close(self), pair.close, self._close_requester, self._tell_worker, self._stop):
            self._closing.add(step)
        self.trust: Callable[[], TrustCounts] = nothing_told
        """Tells what its client does about results that it does not believe."""
        self._statistics: list[OpStatistics] = []
        self._counted_before = (0,) * len(_COUNTED)
        """By the channel that this one took over from, on the same counters."""
        self._fetch: RemoteOp | None = None
        self._placement = Placement(memory, pair, KeptBooks(pair, self._fetch_kept), self._open_device_arena)

    # --- binding --------------------------------------------------------------------------------------------------------------------

    def bind(self, op: str, *, out_spec: OutSpec | None = None, **static: Any) -> RemoteOp:
        """Fix the static arguments of ``op`` once; returns a callable for tensors.

        ``out_spec(*input_specs, **static)`` gives the outputs' :class:`TensorSpec` without asking; without it the worker is asked once for
        each new combination of input shapes and dtypes, within the deadline of the call that meets it first. Static arguments are numbers, strings,
        booleans, None, and lists of these. Raises :class:`BadInput` when the worker has no such op or it has no such arguments,
        :class:`RemoteOpError` when the op itself raises.
        """
        return self.bind_counted(op, OpStatistics(op), out_spec=out_spec, **static)

    def bind_counted(self, op: str, statistics: OpStatistics, /, *, out_spec: OutSpec | None = None, **static: Any) -> RemoteOp:
        """:meth:`bind` with counters that are there already."""
        if not isinstance(op, str):
            raise BadInput(f"an op is named by a string, not by {op!r}")
        try:
            nbytes = len(m.encode(m.Bind(0, op, static)))
        except (TypeError, OverflowError) as error:
            raise BadInput(f"op {op!r}: static arguments are numbers, strings, booleans, None and lists of these; {error}") from None
        if nbytes > m.MAX_MESSAGE_BYTES:
            raise BadInput(f"op {op!r}: {nbytes} bytes of static arguments; at most {m.MAX_MESSAGE_BYTES}: hand tensors over as inputs")
        bound = self._ask_soon(m.Bind(self.opened.channel, op, static), m.Bound)
        if statistics.calls or statistics.errors:
            self._counted_before = tuple(
                before + getattr(statistics, field) for before, field in zip(self._counted_before, _COUNTED, strict=True)
            )
        outputs = self._local_outputs(out_spec, static) if out_spec is not None else self._ask_outputs(op, bound.op_id)
        return self._remote_op(op, bound.op_id, outputs, statistics, bound.in_place)

    def _remote_op(self, name: str, op_id: int, outputs: OutputsOf, statistics: OpStatistics, in_place: bool = False) -> RemoteOp:
        self._statistics.append(statistics)
        return op_class(self.pair)(self.pair, self._placement, self._timeout, name, op_id, outputs, statistics, in_place)

    @staticmethod
    def _local_outputs(out_spec: OutSpec, static: dict[str, Any]) -> OutputsOf:
        return lambda inputs, arguments, timeout: Outputs.of(out_spec(*inputs, **static))

    def _ask_outputs(self, op: str, op_id: int) -> OutputsOf:
        def ask(inputs: Sequence[TensorSpec], arguments: dict[str, Any], timeout: float | None) -> Outputs:
            infos = tuple(m.SpecInfo(spec.shape, NAME_OF[spec.dtype]) for spec in inputs)
            seconds = NO_LIMIT_SECONDS if timeout is None else timeout
            try:
                answer = self._ask(m.AskOutSpec(self.opened.channel, op_id, infos, arguments), m.OutSpecs, seconds)
            except TimeoutError:
                raise CallTimeout(
                    f"op {op!r}: {self.pair.peer_text()} had not found the shapes of its outputs after {seconds:g} s, the call's timeout; an op without "
                    "out_spec is tried out for them on its first inputs of a form: give it an out_spec, at the worker or to bind(), or raise timeout="
                ) from None
            return Outputs(tuple(TensorSpec(spec.shape, dtype_named(spec.dtype)) for spec in answer.outputs), answer.single)

        return ask

    def _fetch_kept(self, kept: Kept) -> torch.Tensor:
        """For :class:`KeptBooks`: the values of ``kept``, copied to where the client reads them."""

        def same(inputs: Sequence[TensorSpec], arguments: dict[str, Any], timeout: float | None) -> Outputs:
            return Outputs(tuple(inputs), len(inputs) == 1)

        if self._fetch is None:
            self._fetch = self._remote_op("fetch", KEPT_OP, same, OpStatistics("fetch"))
        fetched: torch.Tensor = self._fetch(kept)  # type: ignore[arg-type]  # for this op alone, what is kept is an input
        return fetched

    # --- asking -----------------------------------------------------------------------------------------------------------------------

    def _ask(self, message: m.Message, answer: type[Answer], seconds: float = ANSWER_SECONDS) -> Answer:
        """Ask the worker. Raises its error; what became of the channel, where that is why it does not answer; else TimeoutError."""
        pair = self.pair
        pair.check_open()
        until = time.monotonic() + seconds
        try:
            if not self._control_lock.acquire(timeout=min(seconds, threading.TIMEOUT_MAX)):
                raise TimeoutError
            try:
                pair.check_open()  # it may have been closed while its turn was waited for
                return self._requester.ask(message, answer, until - time.monotonic(), self._reachable)
            finally:
                self._control_lock.release()
        except TimeoutError:
            pair.loss()
            pair.check_open()
            if self._closed:
                raise ChannelError("the channel was closed") from None
            raise TimeoutError(f"{pair.peer_text()} does not answer control requests") from None
        except RemoteOpError as error:
            what, _, told = str(error).partition("\n")
            failed = read_op_error(told)
            raise RemoteOpError(f"{what}: {failed.type_name}: {failed.text}", failed.type_name, failed.traceback) from None

    def _ask_soon(self, message: m.Message, answer: type[Answer]) -> Answer:
        """:meth:`_ask`, where no call's deadline says for how long."""
        try:
            return self._ask(message, answer)
        except TimeoutError as error:
            if isinstance(error, ShmBrokerError):
                raise
            raise ChannelError(str(error)) from None

    def _reachable(self) -> bool:
        """Whether an answer of the worker can still come."""
        return not self._closed and self.pair.alive()

    def _open_device_arena(self, handle: bytes, nbytes: int) -> None:
        """For :class:`Placement`."""
        self._ask_soon(m.OpenDeviceArena(self.opened.channel, handle, nbytes), m.Done)

    def peer_text(self) -> str:
        """The worker, for messages."""
        return self.pair.peer_text()

    def loss(self) -> ShmBrokerError | None:
        """Why no call on this channel will be answered any more; None while its worker lives."""
        return self.pair.loss()

    # --- reporting --------------------------------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """Calls, times and bytes of this channel so far, per op and in all."""
        return Report.of(self._statistics, self.lane, self.doorbell, self.control, self.pair.lane.socket_bytes, device=self.device)

    def forget_statistics(self) -> None:
        """Let the report begin anew from here. Not while calls are outstanding."""
        for one in self._statistics:
            one.reset()
        self.pair.buckets[:] = no_calls()
        self._counted_before = (0,) * len(_COUNTED)

    def counted(self) -> tuple[int, ...]:
        """For the segment's header, in its order: calls, errors, bytes sent and received, call ns, bytes copied, outstanding, histogram."""
        buckets = published(self.pair.buckets)
        totals = [sum([getattr(one, field) for one in self._statistics]) for field in _COUNTED]
        counted = [total - before for total, before in zip(totals, self._counted_before, strict=True)]
        return (sum(buckets), *counted, self.pair.outstanding, *buckets)

    def info(self) -> m.ChannelInfo:
        """For ``shmbroker status``."""
        return m.ChannelInfo(
            service=self.service,
            worker=self.worker_id,
            lane=self.lane,
            doorbell=self.doorbell,
            control=self.control,
            calls=sum(s.calls for s in self._statistics),
            sent_bytes=sum(s.sent_bytes for s in self._statistics),
            received_bytes=sum(s.received_bytes for s in self._statistics),
            socket_bytes=self.pair.lane.socket_bytes,
            trust=str(self.trust()),
        )

    @property
    def statistics(self) -> tuple[OpStatistics, ...]:
        """The counters of each op that was bound: what :meth:`report` adds up."""
        return tuple(self._statistics)

    @property
    def outstanding(self) -> int:
        """Calls that were submitted and not yet answered."""
        return self.pair.outstanding

    # --- leaving ----------------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Fail what is outstanding, and tell the worker. A second time does nothing. From wherever :meth:`Client.close` may be called."""
        self._closed = True
        self._closing.close()

    def _stop(self) -> None:
        self._told_lost = self.pair.loss() is not None  # which is then why, rather than that it was closed
        self.pair.stop("the channel was closed")

    def _tell_worker(self) -> None:
        """And wait a moment until it runs no call any more. One that goes on keeps its blocks, and the channel's area, until its worker is gone."""
        if self._told_lost:
            return
        unanswered, over = self.pair.unanswered, False
        until = time.monotonic() + CLOSING_SECONDS
        try:
            with self._control_lock:
                while not over and (left := until - time.monotonic()) > 0:
                    closing = m.CloseChannel(self.opened.channel)
                    over = self._requester.ask(closing, m.ChannelClosed, left, self.pair.alive).over or not unanswered
        except (ShmBrokerError, TimeoutError) as error:
            log.debug("closing channel %d: %s", self.opened.channel, error)
        if unanswered and not over and self.pair.alive():
            log.warning("%s still runs a call of a channel that was closed: its blocks stay held until that worker ends", self.peer_text())
            self.memory.park(self.worker_id, unanswered)
            self.goes_on = True
        self.pair.unanswered = []

    def _close_requester(self) -> None:
        with self._control_lock:
            self._requester.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"lane {self.lane}, doorbell {self.doorbell}, {self.outstanding} calls outstanding"
        return f"<Channel for {self.service!r} to {self.peer_text()}: {state}>"
