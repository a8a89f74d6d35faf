"""A worker: offers a service, runs ops for its clients on their tensors, in place.

Threads: the caller of :meth:`Worker.serve` waits for frames and runs ops; one thread answers control requests; one keeps the worker known to
the broker; one more serves the zmq lane once a channel uses it. Calls never run at the same time. (An op without an ``out_spec`` is tried out for
its shapes, on tensors without values, by the thread that answers control requests.)
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import queue
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, overload

import msgspec

from shmbroker.arena.spec import NAME_OF, TensorSpec, dtype_named
from shmbroker.control import endpoint as endpoints
from shmbroker.control import messages as m
from shmbroker.control.access import Access
from shmbroker.control.broker_link import BrokerLink
from shmbroker.control.curve import ANY_PORT
from shmbroker.control.joining import ask_broker, peer_name, resolve_instance
from shmbroker.control.liveness import Watch, process_of, this_process
from shmbroker.control.sockets import Requester, Responder
from shmbroker.errors import BadInput, ChannelError, ProtocolMismatch, describe
from shmbroker.lane.completion_frames import CompletionFields
from shmbroker.lane.doorbell import PollingBell, SemaphoreBell, shm_lane_supported
from shmbroker.lane.outputs import OutSpec
from shmbroker.lane.python_ends import Receiver
from shmbroker.lane.shm_lane import ShmWorkerLane
from shmbroker.lane.waiter import Waiter
from shmbroker.lane.zmq_lane import ZmqWorkerSocket, new_token
from shmbroker.memory import layout, names
from shmbroker.memory.hold import Hold, unlink_own
from shmbroker.memory.segment import Segment
from shmbroker.settings.kinds import Doorbell, Lane
from shmbroker.settings.load import current
from shmbroker.systemd import notify
from shmbroker.trace.writer import Trace
from shmbroker.version import __version__
from shmbroker.worker.built_in_ops import BUILT_IN_OPS, RESERVED
from shmbroker.worker.channel import ChannelCounters, WorkerChannel
from shmbroker.worker.device_completions import Landing, landed
from shmbroker.worker.device_memory import DeviceMemory
from shmbroker.worker.kept_tensors import DEFAULT_KEPT_BYTES, KeptTensors
from shmbroker.worker.mapped_segment import MappedSegment
from shmbroker.worker.ops import BoundOp, OpDefinition

log = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])

DRAIN_SECONDS = 10.0
"""How long what runs may take to finish after SIGTERM or SIGINT; systemd would send SIGKILL after 90 s."""

CONTROL_TICK_SECONDS = 0.5
"""How often the control thread looks whether clients live; the broker tells of their deaths earlier."""

_MESSAGES_AT_ONCE = 256
"""Frames taken from the zmq lane before anything else is looked at: a client that never stops sending must not keep the worker from stopping."""


class Worker:
    """Offers ``service`` on ``instance``. Register ops, then :meth:`serve`.

    ::

        worker = shmbroker.Worker("gpu")

        @worker.op
        def double(x):
            return x * 2

        worker.serve()

    ``service`` and ``instance``: as the settings say where not given (docs/configuration.md).
    ``spin``: seconds to look for the next frame before sleeping; 0 to sleep at once. ``device``: a word for ``shmbroker status``.
    ``until_exit``: stop when the process with this pid ends. ``identity``: a word for what the answers depend on beside the inputs (weights,
    say); only a worker of the same identity takes over from another. ``trace``: a file that tells of every call (docs/traces.md). ``memory``: of the
    device that ops compute on, where that is not the CPU. ``kept_bytes``: what each channel may have kept here.
    """

    def __init__(
        self,
        service: str | None = None,
        *,
        instance: str | None = None,
        name: str | None = None,
        spin: float | None = None,
        device: str = "cpu",
        until_exit: int = 0,
        identity: str = "",
        trace: str | os.PathLike[str] | None = None,
        memory: DeviceMemory | None = None,
        kept_bytes: int = DEFAULT_KEPT_BYTES,
    ) -> None:
        settings = current()
        self.service = service = settings.service if service is None else service
        spin = settings.spin * 1e-6 if spin is None else spin
        self.instance = resolve_instance(instance)
        self.name = peer_name(name)
        if not service or not service.isprintable():
            raise BadInput(f"service {service!r} cannot be offered: give it a name of printable characters")
        if not spin >= 0:
            raise BadInput(f"spin {spin!r} must be a number of seconds, 0 or more")
        self.id = names.new_id()
        self.device = device
        self.identity = identity
        self._trace_path = trace
        self._trace: Trace | None = None
        self._spin = spin
        self._parent = process_of(until_exit) if until_exit else None
        self._ops: dict[str, OpDefinition] = {}
        self._channels: dict[int, WorkerChannel] = {}
        """By number, which is random and told only to the client: whoever knows it may bind on the channel and close it."""
        self._mapped: dict[str, MappedSegment] = {}
        """Like the channels, changed by the thread that answers control requests alone."""
        self._changes: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._gone: queue.SimpleQueue[str] = queue.SimpleQueue()
        """Clients that the broker says are gone."""
        self._broken: queue.SimpleQueue[WorkerChannel] = queue.SimpleQueue()
        """Channels whose client does not keep the rules."""
        self._shm_lanes: list[tuple[WorkerChannel, ShmWorkerLane]] = []
        """Served by the thread in :meth:`serve`, and changed by it alone."""
        self._done = ChannelCounters()
        """Of channels that are closed."""
        self._stopping = False
        self._watchdog = notify.Watchdog.of_environment()
        """Fed while all threads that serve clients turn; None where nobody watches."""
        self._memory = memory
        self._kept_bytes = kept_bytes
        self._landing: Landing | None = None
        """For a device that still works when an op has returned."""
        self._running = threading.Lock()
        """Held while an op runs: the device does one thing at a time, whichever lane asks."""

    # --- ops ------------------------------------------------------------------------------------------------------------------------

    @overload
    def op(self, function: Function, /) -> Function: ...
    @overload
    def op(self, name: str | None = None, /, *, out_spec: OutSpec | None = None) -> Callable[[Function], Function]: ...
    def op(self, name: Any = None, /, *, out_spec: OutSpec | None = None) -> Any:
        """Register a function as an op, by its own name or ``name``.

        The function takes the call's tensors, the arguments fixed at bind and those of the call. With a parameter ``out`` it writes its
        results there (one tensor, or a tuple) and needs ``out_spec``, which maps the inputs' :class:`TensorSpec` and the static arguments to
        the outputs' specs. Without ``out`` what it returns is copied to the client's block; shapes are then found by trying it out once on torch's
        ``meta`` device, which has shapes and no values. It must not change the shape of ``out`` in place.
        """
        if callable(name):
            self._register(OpDefinition(name.__name__, name))
            return name
        return self._decorator(name, out_spec, per_bind=False)

    def bound_op(self, name: str | None = None, *, out_spec: OutSpec) -> Callable[[Function], Function]:
        """Register a function that is called once for each bind, with the static arguments, and returns the function to run.

        For ops that look something up by their static arguments (weights, say) and must not do so in every call. A parameter ``channel_state`` is
        a dict that all ops of one channel share, for what they keep from call to call; it ends with the channel.
        """
        return self._decorator(name, out_spec, per_bind=True)

    def _decorator(self, name: str | None, out_spec: OutSpec | None, *, per_bind: bool) -> Callable[[Function], Function]:
        def register(function: Function) -> Function:
            self._register(OpDefinition(name or function.__name__, function, out_spec, per_bind))
            return function

        return register

    def _register(self, definition: OpDefinition) -> None:
        if definition.name.startswith(RESERVED):
            raise BadInput(f"op {definition.name!r} cannot be registered: names that begin with {RESERVED!r} are every worker's own")
        if definition.name in self._ops:
            raise BadInput(f"op {definition.name!r} is registered already")
        self._ops[definition.name] = definition

    # --- running --------------------------------------------------------------------------------------------------------------------

    def serve(self, ready: Callable[[], None] = lambda: None) -> None:
        """Join the broker and serve until SIGTERM, SIGINT or :meth:`stop`; what is running then is finished first, calls that wait are refused.

        After a signal an op has :data:`DRAIN_SECONDS` to finish; then the process ends without it, status 0.

        Raises :class:`BrokerUnreachable` when there is no broker. ``ready`` is called once clients can come.
        """
        with self._signals(), self._joined():
            if self._memory is not None and self._memory.asynchronous:
                self._landing = Landing()
            ready()
            notify.ready(f"service {self.service!r} on {self.device}")
            try:
                self._serve_shm()
            finally:
                if self._landing is not None:
                    self._landing.stop()
                    self._landing = None
            notify.stopping()

    def stop(self) -> None:
        """Make :meth:`serve` return soon. Callable from any thread and from signal handlers."""
        self._stopping = True

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def on_signal(number: int, frame: FrameType | None) -> None:
            self.stop()

        # Python runs a handler between two lines of Python only: an op that computes for a minute is to be seen by another thread meanwhile.
        told_fd, tell_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(told_fd, True)
        ended = threading.Event()
        watcher = threading.Thread(target=self._end_in_time, args=(told_fd, ended), name="shmbroker-drain", daemon=True)
        previous_fd = signal.set_wakeup_fd(tell_fd, warn_on_full_buffer=False)
        previous = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        watcher.start()
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous_fd)
            ended.set()
            os.close(tell_fd)
            watcher.join()
            os.close(told_fd)

    def _end_in_time(self, told_fd: int, ended: threading.Event) -> None:
        """After a signal, an op that takes longer than :data:`DRAIN_SECONDS` is not waited for: the process's end tells its client."""
        while number := os.read(told_fd, 1):
            if number[0] in (signal.SIGTERM, signal.SIGINT):
                self.stop()
                if not ended.wait(DRAIN_SECONDS):
                    log.warning("%s: an op still runs %g s after the signal to stop: ending without it", self.name, DRAIN_SECONDS)
                    logging.shutdown()
                    os._exit(0)

    @contextlib.contextmanager
    def _joined(self) -> Iterator[None]:
        """Everything that a serving worker needs, given back in reverse order."""
        with contextlib.ExitStack() as stack:
            if self._trace_path is not None:
                self._trace = Trace(self._trace_path, f"worker {self.name}")
                stack.callback(self._trace.close)
            access = Access.of(self.instance)
            self._context = access.context()
            stack.callback(self._context.term)
            requester = Requester(self._context, access.endpoint)
            stack.callback(requester.close)
            made = ask_broker(requester, m.MakeBell(self.id, this_process()), m.Made, self.instance)
            self._bell_name = made.name
            # fault: before bell held
            bell_hold = Hold.on(names.bell_path(made.name))
            # fault: after bell held
            stack.callback(unlink_own, names.bell_path(made.name))
            stack.callback(bell_hold.release)
            self._bell = SemaphoreBell(made.name)
            stack.callback(self._bell.close)
            folder = None if access.tcp else endpoints.socket_path(self.instance).parent
            with endpoints.private_sockets(folder) if folder else contextlib.nullcontext():
                self._responder = Responder(self._context, self._own_socket(folder, "worker", stack))
                stack.callback(self._responder.close)
                self._zmq = ZmqWorkerSocket(self._context, self._own_socket(folder, "lane", stack))
                stack.callback(self._zmq.close)
            self._zmq_thread: threading.Thread | None = None
            control = threading.Thread(target=self._serve_control, name="shmbroker-control", daemon=True)
            link = BrokerLink(self._context, access.endpoint, self._hello, self._stats, self._gone.put)
            stack.callback(self._close_channels)
            link.start()
            # Last in, first out: the broker is told before clients find nobody at home.
            stack.callback(self._join_threads, control)
            stack.callback(link.stop)
            stack.callback(self.stop)
            control.start()
            log.info("%s (%s): service %r on %s, ops %s", self.name, self.id, self.service, self._responder.endpoint, ", ".join(self._ops))
            yield

    def _own_socket(self, folder: Path | None, kind: str, stack: contextlib.ExitStack) -> str:
        if folder is None:
            return ANY_PORT
        path = endpoints.worker_socket(folder, self.instance, kind, self.id)
        stack.callback(path.unlink, missing_ok=True)
        return endpoints.ipc_endpoint(path)

    def _join_threads(self, control: threading.Thread) -> None:
        control.join()
        if self._zmq_thread is not None:
            self._zmq_thread.join()

    def _hello(self) -> m.Hello:
        return m.Hello(
            role="worker",
            peer=self.id,
            process=this_process(),
            name=self.name,
            version=__version__,
            services=(self.service,),
            endpoint=self._responder.endpoint,
            device=self.device,
        )

    def _stats(self) -> m.PeerStats:
        channels = list(self._channels.values())
        return m.PeerStats(
            calls=self._done.calls + sum(channel.counters.calls for channel in channels),
            errors=self._done.errors + sum(channel.counters.errors for channel in channels),
        )

    # --- frames -----------------------------------------------------------------------------------------------------------------------

    def _serve_shm(self) -> None:
        """Wait for frames in shared memory and run them, until told to stop and all that had come is answered."""
        lanes = self._shm_lanes
        bell_waiter = Waiter(self._bell, self._spin)
        poll_waiter = Waiter(PollingBell(), self._spin)
        changes = self._changes

        def something() -> bool:
            if not changes.empty():
                return True
            for _, lane in lanes:
                if lane.ready():
                    return True
            return False

        waiter = bell_waiter
        receivers: tuple[Receiver, ...] = ()
        watchdog = self._watchdog
        while not self._stopping:
            if watchdog is not None:
                watchdog.turning("frames")
            if not changes.empty():
                if self._landing is not None:
                    self._landing.drain()  # nothing is unmapped that a device still copies to
                while not changes.empty():
                    changes.get()()
                receivers = tuple([lane.receiver for _, lane in lanes])
                waiter = poll_waiter if any(lane.doorbell is Doorbell.POLL for _, lane in lanes) else bell_waiter
                waiter.sleeping = [lane.sleeping for _, lane in lanes]
            if not self._run_one_each(lanes, False):
                waiter.wait(something, receivers, 1.0)
        # What had come, not what comes meanwhile: a client that never stops sending must not keep the worker from stopping.
        for _ in range(max([channel.mapped.segment.geometry.depth for channel, _ in lanes], default=0)):
            if not self._run_one_each(lanes, True):
                return

    def _run_one_each(self, lanes: list[tuple[WorkerChannel, ShmWorkerLane]], stopping: bool) -> bool:
        """Run one frame of each lane that has one; returns whether any had.

        A function of its own, so that no variable here keeps a channel, and its client's memory, when it is gone.
        """
        busy = False
        for channel, lane in lanes:
            taken = lane.take()
            if taken is not None:
                busy = True
                with self._running:
                    completion = channel.run(taken, stopping)
                if self._landing is not None:
                    self._landing.put(completion, functools.partial(self._complete, channel, lane))
                elif not lane.complete(completion):  # type: ignore[arg-type]  # nothing is in flight without a device
                    self._overfull(channel)
        return busy

    def _complete(self, channel: WorkerChannel, lane: ShmWorkerLane, completion: CompletionFields) -> None:
        if not lane.complete(completion):
            self._overfull(channel)

    def _overfull(self, channel: WorkerChannel) -> None:
        log.warning("client %s left its completion queue full: its channel is closed", channel.opened.client_name)
        self._broken.put(channel)
        self._changes.put(functools.partial(self._stop_serving, channel))

    def _stop_serving(self, channel: WorkerChannel) -> None:
        """Look at its queues no more. In the thread that serves them."""
        for pair in [pair for pair in self._shm_lanes if pair[0] is channel]:
            self._shm_lanes.remove(pair)
            pair[1].close()

    def _serve_zmq(self) -> None:
        """The same for the zmq lane, in a thread of its own."""
        while True:
            stopping = self._stopping
            if self._watchdog is not None:
                self._watchdog.turning("zmq lane")
            self._zmq.wait(0.1)
            for _ in range(_MESSAGES_AT_ONCE):
                taken = self._zmq.take()
                if taken is None:
                    break
                self._run_message(*taken, stopping)
                taken = None
            if stopping:
                return

    def _run_message(self, token: bytes, frame: bytes, stopping: bool) -> None:
        channel = next((c for c in list(self._channels.values()) if c.token and c.token == token), None)
        if channel is None:
            log.warning("a frame with a token that no channel has was dropped")
            return
        with self._running:
            completion = landed(channel.run_frame(frame, stopping))
        self._zmq.complete(token, completion)

    # --- control ------------------------------------------------------------------------------------------------------------------------

    def _serve_control(self) -> None:
        handlers: dict[type, Callable[[Any], m.Message]] = {
            m.OpenChannel: self._open_channel,
            m.CloseChannel: self._close_channel,
            m.OpenDeviceArena: self._open_device_arena,
            m.Bind: self._bind,
            m.AskOutSpec: self._ask_out_spec,
        }

        def handle(sender: bytes, message: m.AnyMessage) -> m.Message:
            handler = handlers.get(type(message))
            if handler is None:
                raise ProtocolMismatch(f"a worker takes no {type(message).__name__}")
            return handler(message)

        parent = Watch(self._parent) if self._parent is not None else None
        next_look = time.monotonic() + CONTROL_TICK_SECONDS
        while not self._stopping:
            if self._watchdog is not None:
                self._watchdog.turning("control")
            self._responder.socket.poll(int(CONTROL_TICK_SECONDS * 200))
            self._responder.answer_waiting(handle)
            while not self._gone.empty():
                self._forget_client(self._gone.get())
            while not self._broken.empty():
                self._drop(self._broken.get())
            for channel in self._channels.values():
                channel.publish()
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + CONTROL_TICK_SECONDS
                if parent is not None and not parent.alive():
                    self.stop()
                for channel in list(self._channels.values()):
                    if not channel.watch.alive():
                        self._drop(channel)

    def _change(self, change: Callable[[], None]) -> None:
        """Have the thread that serves frames do ``change`` between two calls."""
        self._changes.put(change)
        self._bell.ring()

    def _open_channel(self, opening: m.OpenChannel) -> m.ChannelOpened:
        if opening.service != self.service:
            raise ChannelError(f"this worker offers {self.service!r}, not {opening.service!r}")
        # fault: before channel opened
        lane, doorbell = _agree(opening.lane, opening.doorbell)
        mapped = self._segment_of(opening)
        end: ShmWorkerLane | None = None
        if lane is Lane.SHM:
            client_bell = SemaphoreBell(opening.bell) if doorbell is Doorbell.SEM else PollingBell()
            end = ShmWorkerLane(mapped.segment, opening.index, client_bell)
        # Nothing fails from here on: what is counted now is counted back when the channel is dropped.
        mapped.users += 1
        self._end_of(opening)
        self._mapped[opening.segment] = mapped
        channel = self._new_channel(opening, mapped)
        self._channels[channel.number] = channel
        if end is not None:
            served = channel, end
            self._change(lambda: self._shm_lanes.append(served))
        else:
            channel.token = new_token()
            if self._zmq_thread is None:
                self._zmq_thread = threading.Thread(target=self._serve_zmq, name="shmbroker-zmq-lane", daemon=True)
                self._zmq_thread.start()
        log.info(
            "channel area %d opened by %s (pid %d): lane %s, doorbell %s, control %s",
            opening.index,
            opening.client_name,
            opening.process.pid,
            lane.value,
            doorbell.value,
            endpoints.transport_of(self._responder.endpoint),
        )
        # fault: after channel opened
        return m.ChannelOpened(
            channel=channel.number,
            lane=lane.value,
            doorbell=doorbell.value,
            bell=self._bell_name,
            endpoint=self._zmq.endpoint,
            token=channel.token,
            ops=tuple(self._ops),
            identity=self.identity,
        )

    def _new_channel(self, opening: m.OpenChannel, mapped: MappedSegment) -> WorkerChannel:
        number, watch = secrets.randbits(63), Watch(opening.process)
        if self._trace is not None:
            from shmbroker.worker.traced_channel import TracedWorkerChannel

            return TracedWorkerChannel(number, opening, mapped, watch, kept=KeptTensors(self._kept_bytes), trace=self._trace)
        return WorkerChannel(number, opening, mapped, watch, kept=KeptTensors(self._kept_bytes))

    def _segment_of(self, opening: m.OpenChannel) -> MappedSegment:
        """The client's segment, mapped. Names follow from the client's id: nobody may have anything else opened here."""
        client = opening.client
        named = names.segment_name(self.instance, client), names.bell_name(self.instance, client)
        if names.parse(named[0][1:]) is None or (opening.segment, opening.bell) != named:
            raise ChannelError(f"segment {opening.segment!r} and doorbell {opening.bell!r} are not those of client {client!r}")
        mapped = self._mapped.get(opening.segment) or MappedSegment(Segment.attach(opening.segment, hold=False), self._memory)
        if mapped.segment.owner != client:
            raise ChannelError(f"segment {opening.segment} belongs to {mapped.segment.owner!r}, not to {client!r}")
        if not 0 <= opening.index < mapped.segment.geometry.channel_count:
            raise ChannelError(f"channel area {opening.index} of {mapped.segment.geometry.channel_count} does not exist")
        open_before = self._open_on(opening)
        if open_before is not None and open_before.opened.process != opening.process:
            raise ChannelError(f"channel area {opening.index} of {opening.segment} is open for process {open_before.opened.process.pid}")
        return mapped

    def _open_on(self, opening: m.OpenChannel) -> WorkerChannel | None:
        """The channel that is open on the same area."""
        area = opening.segment, opening.index
        return next((c for c in self._channels.values() if (c.opened.segment, c.opened.index) == area), None)

    def _end_of(self, opening: m.OpenChannel) -> None:
        """A client opens an area again when it gave up closing the channel there: that one is over, and an area never has two."""
        open_before = self._open_on(opening)
        if open_before is not None:
            self._drop(open_before)

    def _channel(self, number: int) -> WorkerChannel:
        channel = self._channels.get(number)
        if channel is None:
            raise ChannelError(f"channel {number} is not open on this worker")
        return channel

    def _bind(self, request: m.Bind) -> m.Bound:
        channel = self._channel(request.channel)
        definition = self._ops.get(request.op) or BUILT_IN_OPS.get(request.op)
        if definition is None:
            raise BadInput(f"worker {self.name!r} has no op {request.op!r}; it has: {', '.join(self._ops) or 'none'}")
        try:
            op: BoundOp = definition.bind(request.static, channel.state)
        except TypeError as error:  # wrong names of static arguments, most often
            raise BadInput(f"op {request.op!r} cannot be bound with {sorted(request.static)}: {error}") from None
        return m.Bound(channel.bind(op), op.has_out_spec)

    def _ask_out_spec(self, request: m.AskOutSpec) -> m.OutSpecs:
        op = self._channel(request.channel).ops.get(request.op_id)
        if op is None:
            raise ChannelError(f"op id {request.op_id} is not bound on channel {request.channel}")
        arguments_bytes = len(msgspec.msgpack.encode(request.arguments))
        if len(request.inputs) > layout.MAX_TENSORS or arguments_bytes > layout.METADATA_BYTES:
            # Answers are remembered: what no call can ask for must not fill the memory.
            raise BadInput(f"{len(request.inputs)} inputs and {arguments_bytes} bytes of arguments are more than a frame carries")
        inputs = [TensorSpec(spec.shape, dtype_named(spec.dtype)) for spec in request.inputs]
        try:
            outputs = op.outputs(inputs, request.arguments)
        except BadInput:
            raise
        except Exception as error:  # the out_spec's own complaint about these inputs, for the caller to read
            raise BadInput(f"op {op.name!r} cannot take {', '.join(map(str, inputs))}: {describe(error)}") from None
        return m.OutSpecs(tuple(m.SpecInfo(spec.shape, NAME_OF[spec.dtype]) for spec in outputs.specs), outputs.single)

    def _open_device_arena(self, request: m.OpenDeviceArena) -> m.Done:
        self._channel(request.channel).mapped.open_device(request.handle, request.nbytes)
        return m.Done()

    def _close_channel(self, request: m.CloseChannel) -> m.Done:
        self._drop(self._channel(request.channel))
        return m.Done()

    def _forget_client(self, client: str) -> None:
        for channel in [c for c in self._channels.values() if c.opened.client == client]:
            self._drop(channel)

    def _drop(self, channel: WorkerChannel) -> None:
        if self._channels.pop(channel.number, None) is None:
            return
        opened = channel.opened
        log.info("channel area %d of %s closed after %d calls", opened.index, opened.client_name, channel.counters.calls)
        self._done.calls += channel.counters.calls
        self._done.errors += channel.counters.errors
        mapped = channel.mapped
        mapped.users -= 1
        unused = mapped.users == 0
        if unused:
            del self._mapped[opened.segment]  # now, not in a moment: who opens a channel meanwhile must not get what is being closed

        def drop() -> None:
            self._stop_serving(channel)
            channel.close()
            if unused:
                with self._running:  # the zmq lane has a thread of its own
                    mapped.close()

        self._change(drop)

    def _close_channels(self) -> None:
        for channel in list(self._channels.values()):
            self._drop(channel)
        while not self._changes.empty():
            self._changes.get()()


def _agree(lane: str, doorbell: str) -> tuple[Lane, Doorbell]:
    """What the client asked for, where this side can do it too."""
    try:
        wanted = Lane(lane), Doorbell(doorbell)
    except ValueError as error:
        raise ChannelError(f"{error}; lanes: shm, zmq; doorbells: sem, poll") from None
    if wanted[0] is Lane.ZMQ:
        return Lane.ZMQ, Doorbell.SOCKET
    if not shm_lane_supported():
        raise ChannelError("the shm lane needs x86-64 at both ends: use lane zmq")
    if wanted[1] is Doorbell.SOCKET:
        raise ChannelError("doorbell socket belongs to lane zmq; lane shm takes sem or poll")
    return wanted
