"""A channel: one client's line to one worker. Binds ops, submits their frames, takes their completions."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from shmbroker.arena.arena import Place
from shmbroker.arena.room import Room
from shmbroker.arena.spec import NAME_OF, TensorSpec, dtype_named
from shmbroker.call.call import Call, clock_ns
from shmbroker.call.completions import CompletionLoop
from shmbroker.call.kept import KeptBooks
from shmbroker.call.plan import Plan
from shmbroker.call.remote_op import OutputsOf, RemoteOp
from shmbroker.call.report import Report
from shmbroker.call.statistics import OpStatistics, no_calls, published
from shmbroker.control import messages as m
from shmbroker.control.endpoint import transport_of
from shmbroker.control.liveness import Watch
from shmbroker.control.sockets import Requester
from shmbroker.errors import BadInput, CallTimeout, ChannelError, CudaRefused, PeerRefused, ShmBrokerError, WorkerLost
from shmbroker.lane.doorbell import RECHECK_SECONDS
from shmbroker.lane.frame_layout import KEPT_OP
from shmbroker.lane.frames import FrameTemplate
from shmbroker.lane.outputs import Outputs, OutSpec
from shmbroker.lane.shm_lane import ShmClientLane
from shmbroker.lane.zmq_lane import ZmqClientLane
from shmbroker.memory import layout

if TYPE_CHECKING:
    from shmbroker.client.client import Client

log = logging.getLogger(__name__)

Answer = TypeVar("Answer", bound=m.Message)


class Channel:
    """Made by :meth:`Client.channel`. Thread-safe: several threads may bind, call, submit and wait on one channel."""

    def __init__(
        self,
        client: Client,
        service: str,
        worker: m.WorkerInfo,
        opened: m.ChannelOpened,
        requester: Requester,
        lane: ShmClientLane | ZmqClientLane,
        completions: CompletionLoop,
        index: int,
    ) -> None:
        self.service = service
        self.worker_name = worker.name
        self.worker_pid = worker.process.pid
        self.worker_id = worker.peer
        self.device = worker.device
        self.lane = lane.kind.value
        self.doorbell = lane.doorbell.value
        self.control = transport_of(worker.endpoint)
        self.ops = opened.ops
        self.identity = opened.identity
        """What the worker told of its state, for telling whether another could take its place."""
        self.completions = completions
        self.index = index
        self.client = client
        self._opened = opened
        self._requester = requester
        self._control_lock = threading.Lock()
        self._lane = lane
        self._submit_lock = threading.Lock()
        self._outstanding: dict[int, Call] = {}
        self._last_call_id = 0
        self._unknown_completions = 0
        self.has_frames = lane.ready
        """Whether a completion waits to be taken."""
        self.receivers = lane.receivers
        self.nudge = lane.nudge
        """Wake the worker if it sleeps: a frame will follow in a moment."""
        self.arena = client.arena
        self._watch = Watch(worker.process)
        self._lost: ShmBrokerError | None = None
        self._closed = False
        self._statistics: list[OpStatistics] = []
        self.buckets = no_calls()
        """Histogram of the calls' times."""
        self.opened_ns = clock_ns()
        self._counted_before = (0,) * len(_COUNTED)
        """By the channel that this one took over from, on the same counters."""
        self.kept = KeptBooks(self)
        self._kept_dropped = self.kept.dropped
        self._kept_statistics = OpStatistics("free")
        self._device_opened: bool | None = None
        """Whether the worker has opened the client's device arena; None until it was asked."""
        completions.add(self)

    # --- binding --------------------------------------------------------------------------------------------------------------------

    def bind(self, op: str, *, out_spec: OutSpec | None = None, **static: Any) -> RemoteOp:
        """Fix the static arguments of ``op`` once; returns a callable for tensors.

        ``out_spec(*input_specs, **static)`` gives the outputs' :class:`TensorSpec` without asking; without it the worker is asked once for
        each new combination of input shapes and dtypes. Static arguments are numbers, strings, booleans, None, and lists of these.
        Raises :class:`BadInput` when the worker has no such op or the op refuses the arguments.
        """
        return self.bind_counted(op, OpStatistics(op), out_spec=out_spec, **static)

    def bind_counted(self, op: str, statistics: OpStatistics, /, *, out_spec: OutSpec | None = None, **static: Any) -> RemoteOp:
        """:meth:`bind` with counters that are there already."""
        if not isinstance(op, str):
            raise BadInput(f"an op is named by a string, not by {op!r}")
        try:
            m.encode(m.Bind(0, op, static))
        except (TypeError, OverflowError) as error:
            raise BadInput(f"op {op!r}: static arguments are numbers, strings, booleans, None and lists of these; {error}") from None
        bound = self._ask(m.Bind(self._opened.channel, op, static), m.Bound)
        self._statistics.append(statistics)
        if statistics.calls or statistics.errors:
            self._counted_before = tuple(
                before + getattr(statistics, field) for before, field in zip(self._counted_before, _COUNTED, strict=True)
            )
        outputs = self._local_outputs(out_spec, static) if out_spec is not None else self._ask_outputs(bound.op_id)
        return RemoteOp(self, op, bound.op_id, outputs, statistics)

    @staticmethod
    def _local_outputs(out_spec: OutSpec, static: dict[str, Any]) -> OutputsOf:
        return lambda inputs, arguments: Outputs.of(out_spec(*inputs, **static))

    def _ask_outputs(self, op_id: int) -> OutputsOf:
        def ask(inputs: Sequence[TensorSpec], arguments: dict[str, Any]) -> Outputs:
            infos = tuple(m.SpecInfo(spec.shape, NAME_OF[spec.dtype]) for spec in inputs)
            answer = self._ask(m.AskOutSpec(self._opened.channel, op_id, infos, arguments), m.OutSpecs)
            return Outputs(tuple(TensorSpec(spec.shape, dtype_named(spec.dtype)) for spec in answer.outputs), answer.single)

        return ask

    def _ask(self, message: m.Message, answer: type[Answer]) -> Answer:
        self._check_open()
        with self._control_lock:
            try:
                return self._requester.ask(message, answer, alive=self._watch.alive)
            except TimeoutError:
                self.completions.alone(self.check_peer)
                self._check_open()
                raise ChannelError(f"{self.peer_text()} does not answer control requests") from None

    # --- calls ------------------------------------------------------------------------------------------------------------------------

    def submit(self, call: Call, template: FrameTemplate, offsets: list[int], generations: list[int]) -> None:
        """Write the frame of ``call`` and ring. Waits for a free slot until the call's deadline when the queue is full."""
        lane = self._lane
        lock = self._submit_lock
        if self._kept_dropped:
            self.let_go()
        while True:
            lock.acquire()
            try:
                if self._lost is not None:
                    raise self._lost
                outstanding = self._outstanding
                if len(outstanding) < lane.depth:
                    self._last_call_id = call.call_id = call_id = self._last_call_id + 1
                    call.submitted_ns = now = clock_ns()
                    outstanding[call_id] = call  # before the frame is seen: the answer may be there in the same moment
                    if lane.submit(template, call_id, call.deadline_ns, now, offsets, generations):
                        return
                    del outstanding[call_id]
            finally:
                lock.release()
            self._wait_for_slot(call)

    def let_go(self) -> None:
        """Tell the worker which kept tensors are dropped, in frames of their own, as far as its queue has room. Their answers are not waited for."""
        dropped = self._kept_dropped
        spec = TensorSpec((0,), torch.uint8)
        while dropped and self._lost is None and not self._closed:
            numbers: list[int] = []
            with contextlib.suppress(IndexError):
                while len(numbers) < layout.MAX_TENSORS:
                    numbers.append(dropped.popleft())
            plan = Plan(
                self, self._kept_statistics, KEPT_OP, [torch.empty(spec.shape, dtype=spec.dtype)] * len(numbers), Outputs((), False), b"",
                [layout.Space.KEPT] * len(numbers),
            )  # fmt: skip
            call = Call(plan, (), (), clock_ns(), 0)
            with self._submit_lock:
                sent = False
                if self._lost is None and len(self._outstanding) < self._lane.depth:
                    self._last_call_id = call.call_id = call_id = self._last_call_id + 1
                    call.submitted_ns = now = clock_ns()
                    self._outstanding[call_id] = call
                    sent = self._lane.submit(plan.template, call_id, 0, now, numbers, [1] * len(numbers))
                    if not sent:
                        del self._outstanding[call_id]
            if not sent:
                dropped.extend(numbers)
                return

    def kept_op(self) -> RemoteOp:
        """The op that copies kept tensors to where the client reads them."""

        def same(inputs: Sequence[TensorSpec], arguments: dict[str, Any]) -> Outputs:
            return Outputs(tuple(inputs), len(inputs) == 1)

        statistics = OpStatistics("fetch")
        self._statistics.append(statistics)
        return RemoteOp(self, "fetch", KEPT_OP, same, statistics)

    def _wait_for_slot(self, call: Call) -> None:
        left = (call.deadline_ns - clock_ns()) / 1e9 if call.deadline_ns else RECHECK_SECONDS
        if left <= 0:
            raise CallTimeout(
                f"op {call.statistics.name!r}: {len(self._outstanding)} calls are outstanding with {self.peer_text()} and none was "
                "completed before the deadline"
            )
        self.completions.wait_any(left)

    def wait(self, call: Call, timeout: float | None = None) -> None:
        """Wait until ``call`` is done. Its own deadline fails it; an earlier ``timeout`` (seconds) only ends the waiting."""
        deadline_ns = call.deadline_ns
        if timeout is not None:
            patience_ns = clock_ns() + max(1, int(timeout * 1e9))
            if not deadline_ns or patience_ns < deadline_ns:
                if not self.completions.wait(call, patience_ns):
                    raise TimeoutError(f"op {call.statistics.name!r}, call {call.call_id} is not done after {timeout:g} s")
                return
        if not self.completions.wait(call, deadline_ns):
            self.expire(call)

    def expire(self, call: Call) -> None:
        """The deadline of ``call`` has passed: it fails, for a better reason where there is one."""
        self.completions.check_peers()
        call.expire()

    def drain(self) -> None:
        """Take all completions there are and finish their calls. Called by the leader of the waiters only."""
        take = self._lane.take
        outstanding = self._outstanding
        for _ in range(self._lane.depth):  # as many as there can be: who sends more must not hold up a caller's deadline
            completion = take()
            if completion is None:
                return
            taken_ns = clock_ns()
            call = outstanding.pop(completion[0], None)
            if call is None:
                self._unknown_completions += 1
                if self._unknown_completions in (1, 1000):  # a peer must not fill the log
                    log.warning("%s completed call %d, which is not outstanding: ignored, as all such", self.peer_text(), completion[0])
            else:
                call.finish(completion, taken_ns)
            if not outstanding:
                return  # whatever else there is answers nothing

    def check_peer(self) -> None:
        """Fail what is outstanding when the worker has died. Called by the leader of the waiters only."""
        if self._lost is None and not self._watch.alive():
            self.drain()  # what it answered before it died is answered
            self.lose(f"{self.peer_text()} died")

    def peer_gone(self) -> None:
        """The broker says that the worker is gone."""

        def end() -> None:
            if self._lost is None:
                self.check_peer()
                self.drain()
                self.lose(f"{self.peer_text()} left")

        self.completions.alone(end)

    def lose(self, why: str) -> None:
        """No call on this channel will be answered any more: fail those outstanding."""
        with self._submit_lock:
            if self._lost is not None:
                return
            self._lost = WorkerLost(f"{why}; open a new channel once a worker offers {self.service!r} again")
            lost, self._outstanding = self._outstanding, {}
        for call in lost.values():
            call.fail(WorkerLost(f"op {call.statistics.name!r}, call {call.call_id}: {why} before it answered"))

    def loss(self) -> ShmBrokerError | None:
        """Why no call on this channel will be answered any more; None while its worker lives."""
        if self._lost is None and not self._watch.alive():
            self.completions.alone(self.check_peer)
        return self._lost

    def _check_open(self) -> None:
        if self._lost is not None:
            raise self._lost

    def peer_text(self) -> str:
        """The worker, for messages."""
        state = "running" if self._watch.alive() else "dead"
        return f"worker {self.worker_name!r} (pid {self.worker_pid}, {state})"

    # --- tensors, for RemoteOp --------------------------------------------------------------------------------------------------------

    def place(self, room: Room, timeout: float | None) -> tuple[torch.Tensor, int, int]:
        """A fresh block as a tensor, its offset and generation. While the arena is full, completions are taken, since they may free blocks."""
        arena = self.arena
        limit = self.client.place_timeout
        if timeout is not None and timeout < limit:
            limit = timeout
        arena.check_size(room)
        until = time.monotonic() + limit
        waited = False
        while True:
            left = max(0.0, until - time.monotonic())
            if not self._outstanding or not left:
                return arena.place(room, left, counted=waited)
            placed = arena.place_now(room)
            if placed is not None:
                return placed
            if not waited:
                waited = True
                arena.count_wait()
            self.completions.wait_any(left)

    def place_elsewhere(self, plan: Plan, timeout: float | None, outputs: list[Any], offsets: list[int], generations: list[int]) -> None:
        """Room for the outputs of a call that has them kept on the worker, or in the client's device arena."""
        if plan.output_space == layout.Space.KEPT:
            for spec in plan.specs:
                kept = self.kept.new(spec)
                outputs.append(kept)
                offsets.append(kept.number)
                generations.append(1)
            return
        arena = self.client.device
        assert arena is not None
        limit = self.client.place_timeout if timeout is None else min(timeout, self.client.place_timeout)
        for room in plan.rooms:
            output, offset, generation = arena.place(room, limit)
            outputs.append(output)
            offsets.append(offset)
            generations.append(generation)

    def find_on_device(self, tensor: torch.Tensor) -> Place | None:
        """Where ``tensor`` lies in the client's device arena, once the worker has opened it; else None, and the tensor is copied."""
        arena = self.client.device
        place = None if arena is None else arena.find(tensor)
        if place is None or arena is None:
            return None
        if self._device_opened is None:
            try:
                self._ask(m.OpenDeviceArena(self._opened.channel, arena.handle, arena.nbytes), m.Done)
                self._device_opened = True
            except (PeerRefused, CudaRefused, BadInput) as error:
                self._device_opened = False
                log.warning("%s cannot use the device arena: its tensors are copied through shared memory (%s)", self.peer_text(), error)
        return place if self._device_opened else None

    # --- the rest -----------------------------------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """Calls, times and bytes of this channel so far, per op and in all."""
        return Report.of(self._statistics, self.lane, self.doorbell, self.control, self._lane.socket_bytes, device=self.device)

    def forget_statistics(self) -> None:
        """Let the report begin anew from here. Not while calls are outstanding."""
        for one in self._statistics:
            one.reset()
        self.buckets[:] = no_calls()
        self._counted_before = (0,) * len(_COUNTED)

    def counted(self) -> tuple[int, ...]:
        """For the segment's header, in its order: calls, errors, bytes sent and received, call ns, bytes copied, outstanding, histogram."""
        buckets = published(self.buckets)
        totals = [sum([getattr(one, field) for one in self._statistics]) for field in _COUNTED]
        counted = [total - before for total, before in zip(totals, self._counted_before, strict=True)]
        return (sum(buckets), *counted, len(self._outstanding), *buckets)

    def info(self) -> m.ChannelInfo:
        """For ``shmbroker status``."""
        return m.ChannelInfo(
            service=self.service,
            worker=self.worker_id,
            lane=self.lane,
            doorbell=self.doorbell,
            control=self.control,
            calls=sum(s.calls for s in self._statistics),
            sent_bytes=sum(s.bytes_out for s in self._statistics),
            received_bytes=sum(s.bytes_in for s in self._statistics),
            socket_bytes=self._lane.socket_bytes,
        )

    @property
    def outstanding(self) -> int:
        """Calls that were submitted and not yet answered."""
        return len(self._outstanding)

    def disown(self, error: ShmBrokerError) -> None:
        """In a forked child: the channel is the parent's."""
        self._submit_lock = threading.Lock()  # which some thread of the parent may have had
        self._lost = error

    def close(self) -> None:
        """Fail what is outstanding, and tell the worker. A second time does nothing."""
        if self._closed:
            return
        self._closed = True
        alive = self._lost is None and self._watch.alive()
        self.completions.remove(self)
        self.completions.alone(lambda: self.lose("the channel was closed"))
        if alive:
            try:
                with self._control_lock:
                    self._requester.ask(m.CloseChannel(self._opened.channel), m.Done, timeout=1.0)
            except (ShmBrokerError, TimeoutError) as error:
                log.debug("closing channel %d: %s", self._opened.channel, error)
        self.has_frames = bool  # never
        self.receivers = ()
        self.nudge = _nothing
        self._requester.close()
        self._lane.close()
        self._watch.close()
        self.client.forget(self)


_COUNTED = ("errors", "bytes_out", "bytes_in", "rpc_ns", "copied_bytes")


def _nothing() -> None:
    """Who is nudged on a closed channel."""
