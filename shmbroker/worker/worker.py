"""A worker: what a program registers its ops with, to serve them to clients.

Threads: the caller of :meth:`Worker.serve` waits for frames and runs ops (the frame thread); one answers control requests (the control thread); one
keeps the worker known to the broker (the link); one more serves the zmq lane once a channel uses it; where a device still works when an op has
returned, one completes its calls; one sees to it that a signal ends the worker in time. Calls never run at the same time. (An op without an ``out_spec``
is tried out for its shapes, on tensors without values, by the control thread.)
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import torch

from shmbroker.control import endpoint as endpoints
from shmbroker.control import messages as m
from shmbroker.control.access import Access
from shmbroker.control.broker_link import BrokerLink
from shmbroker.control.curve import ANY_PORT
from shmbroker.control.joining import ask_broker, peer_name, resolve_instance
from shmbroker.control.liveness import process_of, this_process
from shmbroker.control.sockets import Requester
from shmbroker.control.unix_responder import responder_at
from shmbroker.errors import BadInput
from shmbroker.lane.outputs import OutSpec
from shmbroker.lane.own_bell import OwnBell
from shmbroker.lane.zmq_lane import ZmqWorkerSocket
from shmbroker.memory import names
from shmbroker.memory.open_files import require_files, telling_exhaustion
from shmbroker.settings.arguments import seconds, whole
from shmbroker.settings.load import current
from shmbroker.systemd import notify
from shmbroker.trace.writer import Trace
from shmbroker.version import __version__
from shmbroker.worker.backlog import Backlog
from shmbroker.worker.batching import Among, Batching
from shmbroker.worker.built_in_ops import RESERVED
from shmbroker.worker.control_server import ControlServer, Offer
from shmbroker.worker.device_memory import DeviceMemory
from shmbroker.worker.draining import Stop, drained_by_signals
from shmbroker.worker.frame_loop import FrameLoop
from shmbroker.worker.kept_tensors import DEFAULT_KEPT_BYTES
from shmbroker.worker.open_channels import OpenChannels
from shmbroker.worker.ops import OpDefinition, warm_up
from shmbroker.worker.own_log import told_on_stderr
from shmbroker.worker.shares import Shares, checked_weights

log = logging.getLogger(__name__)

SERVING_FILES = 40
"""Open files that a worker takes at most before its first channel, most of them libzmq's."""

Function = TypeVar("Function", bound=Callable[..., Any])

MOST_CHARACTERS = 100
"""Of what a worker tells of itself in one line: less than its broker passes on."""


class Worker:
    """Offers ``service`` on ``instance``. Register ops, then :meth:`serve`.

    ::

        worker = shmbroker.Worker("gpu")

        @worker.op
        def double(x):
            return x * 2

        worker.serve()

    ``service`` and ``instance``: as the settings say where not given (docs/configuration.md).
    ``spin``: seconds to look for the next frame before sleeping; 0 for 5 us. ``device``: a word for ``shmbroker status``.
    ``until_exit``: stop when the process with this pid ends. ``identity``: a word for what the answers depend on beside the inputs (weights,
    say); only a worker of the same identity takes over from another. ``trace``: a file that tells of every call (docs/traces.md). ``memory``: of the
    device that ops compute on, where that is not the CPU. ``kept_bytes``: what each channel may have kept here.

    Clients share its time (docs/architecture.md). ``client_weights``: by a client's name, how much of it that has, where others have 1. ``max_channels``:
    more are refused with :class:`Busy`. ``max_waiting_rows``: so are the calls of a client that has one waiting already, while more rows than that wait.

    ``batch``: have calls of at most 8 rows of ``row_wise`` ops computed together with those of other clients, where that takes less time: of clients of
    one ``"user"``, or of ``"all"``, who then can tell by the time that their calls are held that others call too. Their results may differ in the
    last bit from those of calls by themselves. Refused (:class:`BadInput`) on a device that works on when an op has returned.
    """

    def __init__(
        self,
        service: str | None = None,
        *,
        instance: str | None = None,
        name: str | None = None,
        spin: float | None = None,
        device: str | torch.device = "cpu",
        until_exit: int = 0,
        identity: str = "",
        trace: str | os.PathLike[str] | None = None,
        memory: DeviceMemory | None = None,
        kept_bytes: int = DEFAULT_KEPT_BYTES,
        max_channels: int | None = None,
        max_waiting_rows: int | None = None,
        client_weights: Mapping[str, float] | None = None,
        batch: Among | None = None,
    ) -> None:
        settings = current()
        self.service = service = settings.service if service is None else service
        spin = settings.spin * 1e-6 if spin is None else seconds("spin", spin)
        self.instance = resolve_instance(instance)
        self.name = peer_name(name)
        if not isinstance(service, str) or not service.isprintable() or not 0 < len(service) <= MOST_CHARACTERS:
            raise BadInput(f"service {service!r} cannot be offered: give it a name of 1 to {MOST_CHARACTERS} printable characters")
        device = str(device)
        if not device.isprintable() or len(device) > MOST_CHARACTERS:
            raise BadInput(
                f"device {device!r} cannot be told: give a word of at most {MOST_CHARACTERS} printable characters, e.g. 'cuda:0'"
            )
        self.id = names.new_id()
        self.device = device
        self.identity = identity
        self._spin = spin
        self._parent = process_of(until_exit) if until_exit else None
        self._trace_path = trace
        self._memory = memory
        self._kept_bytes = kept_bytes
        self._max_channels = None if max_channels is None else whole("max_channels", max_channels)
        self._backlog = None if max_waiting_rows is None else Backlog(whole("max_waiting_rows", max_waiting_rows))
        self._client_weights = checked_weights(client_weights or {})
        if batch not in (None, "user", "all"):
            raise BadInput(f"batch {batch!r} is not known: give 'user' for calls of clients of one user, 'all', or None")
        if batch is not None and memory is not None and memory.asynchronous:
            raise BadInput(
                f"calls are not computed together on {device}, which works on when an op has returned: leave batch (--batch) out"
            )
        self._batching = None if batch is None else Batching(batch)
        self._tracebacks = settings.tracebacks
        """Whether errors of ops carry their tracebacks to the clients."""
        self._ops: dict[str, OpDefinition] = {}
        """Only added to, by whoever registers; the control thread looks them up."""
        self._stop = Stop()
        """Set by any thread and by signal handlers, looked at by all loops."""
        self._watchdog = notify.Watchdog.of_environment()
        """Fed while all threads that serve clients turn; None where nobody watches."""

    def __repr__(self) -> str:
        ops = ", ".join(self._ops) or "no ops yet"
        return f"<Worker {self.name!r}: service {self.service!r} of instance {self.instance!r} on {self.device}: {ops}>"

    # --- ops ------------------------------------------------------------------------------------------------------------------------

    @overload
    def op(self, function: Function, /) -> Function: ...
    @overload
    def op(
        self,
        name: str | None = None,
        /,
        *,
        out_spec: OutSpec | None = None,
        copies_inputs: bool = False,
        in_place: bool = False,
        row_wise: bool = False,
    ) -> Callable[[Function], Function]: ...
    def op(
        self,
        name: Any = None,
        /,
        *,
        out_spec: OutSpec | None = None,
        copies_inputs: bool = False,
        in_place: bool = False,
        row_wise: bool = False,
    ) -> Any:
        """Register a function as an op, by its own name or ``name``.

        The function takes the call's tensors, the arguments fixed at bind and those of the call. With a parameter ``out`` it writes its
        results there (one tensor, or a tuple) and needs ``out_spec``, which maps the inputs' :class:`TensorSpec` and the static arguments to
        the outputs' specs. Without ``out`` what it returns is copied to the client's block; shapes are then found by trying it out once on torch's
        ``meta`` device, which has shapes and no values. It must not change the shape of ``out`` in place.

        Gradients are not recorded while it runs; an op that trains uses ``torch.enable_grad()``.

        Inputs are their caller's: to be read, and only until the function returns. One that writes into an input, or keeps one or a view of it, fails
        with an error that says so. ``copies_inputs``: each call is given copies, to keep or to write into. ``in_place``: what is written into inputs is
        for the caller, whose tensors have it when the call is done, wherever they lie.

        ``row_wise``: each row of the outputs (all their dimensions but the last) depends on the same row of each input alone. A long call is then run
        in pieces where another client waits: the function is called with some of the rows at a time, as ``[1, rows, width]``, and must not mind.
        """
        if callable(name):
            self._register(OpDefinition(name.__name__, name))
            return name
        return self._decorator(name, out_spec, per_bind=False, copies_inputs=copies_inputs, in_place=in_place, row_wise=row_wise)

    def bound_op(
        self,
        name: str | None = None,
        *,
        out_spec: OutSpec,
        copies_inputs: bool = False,
        in_place: bool = False,
        row_wise: bool = False,
    ) -> Callable[[Function], Function]:
        """Register a function that is called once for each bind, with the static arguments, and returns the function to run.

        What it returns may have a method ``tiles``, with the same parameters: a sequence of callables that compute the call's outputs, each a part of its
        own, to be run one after the other in place of the whole where another client waits.

        For ops that look something up by their static arguments (weights, say) and must not do so in every call. A parameter ``channel_state`` is
        a dict that all ops of one channel share, for what they keep from call to call; it ends with the channel. ``copies_inputs``, ``in_place``
        and ``row_wise`` are as in :meth:`op`.
        """
        return self._decorator(name, out_spec, per_bind=True, copies_inputs=copies_inputs, in_place=in_place, row_wise=row_wise)

    def _decorator(
        self, name: str | None, out_spec: OutSpec | None, *, per_bind: bool, copies_inputs: bool, in_place: bool, row_wise: bool
    ) -> Callable[[Function], Function]:
        def register(function: Function) -> Function:
            self._register(OpDefinition(name or function.__name__, function, out_spec, per_bind, copies_inputs, in_place, row_wise))
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

        That it is ready, and each call that fails, is logged; on standard error where the program has not set up logging (``log_level`` of the settings).
        Raises :class:`BrokerUnreachable` when there is no broker, :class:`TooManyOpenFiles`. ``ready`` is called once clients can come.
        """
        require_files(SERVING_FILES, "Worker.serve()")
        with (
            telling_exhaustion("Worker.serve()"),
            told_on_stderr(current().log_level),
            drained_by_signals(self._stop, self.name),
            self._joined() as frames,
        ):
            log.info(
                "%s is ready: service %r on instance %r, ops %s", self.name, self.service, self.instance, ", ".join(self._ops) or "none"
            )
            ready()
            notify.ready(f"service {self.service!r} on {self.device}")
            frames.serve_shm()
            notify.stopping()

    def stop(self) -> None:
        """Make :meth:`serve` return soon. Callable from any thread and from signal handlers."""
        self._stop.request()

    @contextlib.contextmanager
    def _joined(self) -> Iterator[FrameLoop]:
        """Known to the broker and answering control requests; the caller runs the frames. All is given back in reverse order."""
        if any(definition.out_spec is None for definition in self._ops.values()):
            warm_up()  # before anybody can wait for it
        with contextlib.ExitStack() as stack:
            trace = None
            if self._trace_path is not None:
                trace = Trace(self._trace_path, f"worker {self.name}")
                stack.callback(trace.close)
            access = Access.of(self.instance)
            context = access.context()
            stack.callback(context.term)
            broker = Requester(context, access.endpoint)
            stack.callback(broker.close)
            own_bell = OwnBell(lambda: ask_broker(broker, m.MakeBell(self.id, this_process()), m.Made, self.instance).name)
            stack.callback(own_bell.close)
            folder = None if access.tcp else endpoints.socket_path(self.instance).parent
            with endpoints.private_sockets(folder) if folder else contextlib.nullcontext():
                responder = responder_at(context, self._own_socket(folder, "worker", stack))
                stack.callback(responder.close)
                socket = ZmqWorkerSocket(context, self._own_socket(folder, "lane", stack))
                stack.callback(socket.close)
            frames = FrameLoop(
                own_bell.bell,
                socket,
                self._stop,
                spin=self._spin,
                asynchronous=self._memory is not None and self._memory.asynchronous,
                shares=Shares(self._client_weights),
                backlog=self._backlog,
                batching=self._batching,
                watchdog=self._watchdog,
            )
            channels = OpenChannels(
                self.instance,
                frames,
                memory=self._memory,
                kept_bytes=self._kept_bytes,
                trace=trace,
                tracebacks=self._tracebacks,
                most=self._max_channels,
            )
            offer = Offer(
                self.service,
                self.name,
                self.identity,
                self._ops,
                own_bell.name,
                socket.endpoint,
                tracebacks=self._tracebacks,
                ensure_named=own_bell.ensure_named,
            )
            server = ControlServer(offer, responder, channels, self._stop, parent=self._parent, watchdog=self._watchdog)
            control = threading.Thread(target=server.serve, name="shmbroker-control", daemon=True)
            hello = functools.partial(self._hello, responder.endpoint)
            link = BrokerLink(context, access.endpoint, hello, lambda: m.PeerStats(*channels.totals()), server.client_gone)
            stack.callback(channels.close)
            link.start()
            # Last in, first out: the broker is told before clients find nobody at home.
            stack.callback(frames.join)
            stack.callback(control.join)
            stack.callback(link.stop)
            # And clients, which then place other tensors in the blocks of calls that were not answered, after the last of them has run.
            stack.callback(frames.join)
            stack.callback(self.stop)
            control.start()
            log.debug("%s (%s) answers on %s", self.name, self.id, responder.endpoint)
            yield frames

    def _own_socket(self, folder: Path | None, kind: str, stack: contextlib.ExitStack) -> str:
        """An endpoint of this worker's alone: a unix socket in ``folder``, else a TCP port."""
        if folder is None:
            return ANY_PORT
        path = endpoints.worker_socket(folder, self.instance, kind, self.id)
        stack.callback(path.unlink, missing_ok=True)
        return endpoints.ipc_endpoint(path)

    def _hello(self, endpoint: str) -> m.Hello:
        return m.Hello(
            role="worker",
            peer=self.id,
            process=this_process(),
            name=self.name,
            version=__version__,
            services=(self.service,),
            endpoint=endpoint,
            device=self.device,
        )
