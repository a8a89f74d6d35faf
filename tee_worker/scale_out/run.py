"""Running a fleet until SIGTERM or Ctrl-C: a cluster of its own or one that is there, the application on it, and what is told of it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from shmbroker.errors import BadInput, ShmBrokerError
from shmbroker.models import Checkpoint
from tee_worker.held_signals import HeldSignals
from tee_worker.ray import Autoscale, Options, deployment
from tee_worker.run_options import LOOPBACK
from tee_worker.scale_out.local_cluster import ENVIRONMENT, local_cluster, own_environment
from tee_worker.scale_out.options import address_of, check_fleet
from tee_worker.scale_out.secrecy import check_own_cluster, check_secrecy, is_loopback
from tee_worker.split_run import check

APPLICATION = "shmbroker"
"""The name of ours among Ray Serve's applications."""

READY = "ready: "
"""Begins the line that tells the endpoint's address."""

_ANSWER_SECONDS = 10.0
"""How long a cluster may take to take a connection."""

_LOOK_SECONDS = 0.5
_PROGRESS_SECONDS = 10.0
"""Between two words of what takes long."""

_LONGEST_REASON = 600
"""Characters of Ray's words, at their end, that are passed on."""

Note = Callable[[str], None]


def run(options: Options, replicas: int, autoscale: Autoscale | None, address: str | None, local_nodes: int | None, on_note: Note) -> None:
    """Serve until SystemExit or KeyboardInterrupt. Raises :class:`ShmBrokerError`."""
    _check(options, address, local_nodes)
    if options.direct is None:
        options = msgspec.structs.replace(options, port=_free_port(options))
    if Path(options.model).exists():  # Ray's processes have another working folder
        options = msgspec.structs.replace(options, model=str(Path(options.model).resolve()))
    most = max(replicas, autoscale.most if autoscale else 0)
    with HeldSignals() as signals, contextlib.ExitStack() as stack:
        try:
            if address is None:
                stack.enter_context(own_environment())
            elif _is_on_loopback(address):
                os.environ.update(ENVIRONMENT)
            application = deployment(options, replicas=replicas, autoscale=autoscale)
            if address is None:
                nodes = local_nodes or 1
                on_note(f"starting a Ray cluster of {nodes} {'node' if nodes == 1 else 'nodes'} on this machine alone ...")
                address = stack.enter_context(local_cluster(nodes, math.ceil(most / nodes) * math.ceil(options.cpus)))
                signals.take_back()
            stack.enter_context(_connected(address, options.trust_cluster))
            signals.take_back()  # Ray ends the process at SIGTERM, and leaves what is here to be given back
            check_own_cluster(trusted=options.trust_cluster)
            stack.enter_context(_served(application, options))
            _until_ready(on_note)
            print(
                f"{READY}{_where(options)} serves {replicas} replicas of {options.model}, split {options.split}, trust {options.trust}",
                flush=True,
            )
            _watch(on_note)
        finally:
            signals.hold()  # a second Ctrl-C would leave half of it behind


def _where(options: Options) -> str:
    """What the endpoint's address is."""
    if options.direct is not None:
        host, port = address_of(options.direct)
        return f"https://{host}:{port}/v1 (and the ports after it where a host has several replicas)"
    return f"http://[{options.host}]:{options.port}/v1" if ":" in options.host else f"http://{options.host}:{options.port}/v1"


def _check(options: Options, address: str | None, local_nodes: int | None) -> None:
    check_fleet(options)
    if address is not None and local_nodes is not None:
        raise BadInput(f"--local-nodes starts a cluster on this machine, and --address {address} names another: leave one of them out")
    if options.host not in LOOPBACK:
        raise BadInput(
            f"--host {options.host!r} is not loopback: prompts and answers would cross the network as they are; put a proxy with TLS and authentication "
            "before the endpoint, or go the way of docs/scale-out.md"
        )
    check(options)
    if address is None:
        Checkpoint.at(options.model)


def _free_port(options: Options) -> int:
    """The port, or any one that is free. Ray tells of one that is taken only in its logs: here it raises :class:`BadInput`."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        with socket.create_server((options.host, options.port), family=family) as listening:
            return int(listening.getsockname()[1])
    except OSError as error:
        raise BadInput(f"cannot listen on {options.host} port {options.port}: {error.strerror or error}; choose another --port") from None


def _is_on_loopback(address: str) -> bool:
    """Whether a cluster is. ``auto`` is where $RAY_ADDRESS says, else the one that was started last on this machine."""
    if address == "auto":
        pointer = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"
        address = os.environ.get("RAY_ADDRESS") or (pointer.read_text().strip() if pointer.is_file() else "")
    return is_loopback(address.rpartition(":")[0].strip("[]"))


def _no_cluster(address: str, why: str) -> BadInput:
    return BadInput(f"no Ray cluster answers at {address}: {why}; --local-nodes N starts one on this machine")


def _check_address(address: str, trusted: bool) -> None:
    """Raise :class:`BadInput` for a HOST:PORT that would be refused once it is reached, or where nobody listens.

    Ray itself tries again for minutes, also where the other side asks for TLS and this one has none. Other forms of addresses are left to it.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdecimal() or "/" in host:
        return
    host = host.strip("[]")
    check_secrecy([host], trusted=trusted)
    try:
        socket.create_connection((host, int(port)), _ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, getattr(error, "strerror", None) or str(error)) from None


@contextlib.contextmanager
def _connected(address: str, trusted: bool) -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    _check_address(address, trusted)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        why = f"{str(error).splitlines()[0]} (one with TLS or a token needs the same variables here, docs/scale-out.md)"
        raise _no_cluster(address, why) from None
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _served(application: Any, options: Options) -> Iterator[None]:
    from ray import serve

    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    others = serve.status().applications
    if APPLICATION in others:
        raise BadInput(f"this cluster serves {APPLICATION!r} already: end the 'tee-worker ray' that does, or 'serve shutdown'")
    try:
        if options.direct is None:
            serve.start(http_options={"host": options.host, "port": options.port})
        else:
            serve.start(proxy_location="Disabled")
        route = "/" if options.direct is None else None
        serve.run_many([serve.RunTarget(application, name=APPLICATION, route_prefix=route)], wait_for_applications_running=False)
        yield
    finally:
        if others:
            serve.delete(APPLICATION)
        else:
            serve.shutdown()  # type: ignore[no-untyped-call]


def _state() -> tuple[str, dict[str, int], str]:
    """The application's, how many replicas are in which state, and what Ray says of them."""
    from ray import serve

    from tee_worker.scale_out.fleet import REPLICA

    application = serve.status().applications.get(APPLICATION)
    if application is None:
        return "NOT_STARTED", {}, ""
    replicas = application.deployments.get(REPLICA)
    states = {} if replicas is None else {str(state): count for state, count in replicas.replica_states.items() if count}
    return application.status.value, states, (replicas.message if replicas is not None else "") or application.message


def _until_ready(on_note: Note) -> None:
    """Tell what goes on, until all replicas are there. Raises :class:`ShmBrokerError` where they do not start."""
    begun, said, last = time.monotonic(), -math.inf, ""
    while True:
        status, states, message = _state()
        if status == "RUNNING":
            return
        if status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ShmBrokerError(f"the replicas do not start: {_reason(message)}")
        now = time.monotonic()
        text = f"{states.get('RUNNING', 0)} replicas ready, {sum(states.values()) - states.get('RUNNING', 0)} loading"
        if text != last or now - said > _PROGRESS_SECONDS:
            on_note(f"{text} ({now - begun:.0f} s so far)")
            last, said = text, now
        time.sleep(_LOOK_SECONDS)


def _reason(message: str) -> str:
    """The last line of Ray's words that says something: an error's own."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "shmbroker.errors" in line or "error" in line.lower()]
    return (errors or lines or ["Ray gives no reason"])[-1][-_LONGEST_REASON:]


def _watch(on_note: Note) -> NoReturn:
    """Tell what changes, until somebody ends it."""
    last = ""
    while True:
        _, states, _ = _state()
        text = ", ".join(f"{count} {state.lower()}" for state, count in sorted(states.items())) or "none"
        if text != last and last:
            on_note(f"replicas: {text}")
        last = text
        time.sleep(2 * _LOOK_SECONDS)
