"""The broker and those who take part: whether they answer, and which version they are."""

from __future__ import annotations

from collections.abc import Iterator

from shmbroker.commands.doctor.check import Check, fail, ok, warn
from shmbroker.control import messages as m
from shmbroker.control.endpoint import transport_of
from shmbroker.control.outdated import in_words
from shmbroker.control.status import ask
from shmbroker.errors import BadInput, BrokerUnreachable, ShmBrokerError
from shmbroker.settings.load import Loaded
from shmbroker.version import __version__

_SAME = "install the same release everywhere, and start that process again"


def ask_broker(instance: str) -> tuple[m.StatusReport | None, Check]:
    """What the broker says of itself, if it answers."""
    try:
        report = ask(instance)
    except BrokerUnreachable as error:
        remedy = "start one and run the doctor again: transport and versions were not checked; --offline checks this machine alone"
        return None, fail("broker", str(error), remedy)
    except (ShmBrokerError, OSError) as error:
        remedy = "see the message" if isinstance(error, BadInput) else _SAME
        return None, fail("broker", str(error), remedy)
    text = f"pid {report.pid}, version {report.version}, up {report.uptime_seconds:.0f} s, instance {report.instance!r}"
    if report.version != __version__:
        return report, warn("broker", f"{text}: this program is version {__version__}", _SAME, version=report.version)
    return report, ok("broker", text, version=report.version)


def not_asked() -> tuple[None, Check]:
    """What stands for the broker where only the machine is looked at."""
    return None, ok("broker", "not asked, as --offline says: transport and versions were not checked")


def checks(report: m.StatusReport, loaded: Loaded) -> Iterator[Check]:
    """All of this family but the broker itself."""
    yield _control(report, loaded)
    yield from _versions(report)
    yield from _channels(report)


def _control(report: m.StatusReport, loaded: Loaded) -> Check:
    transport = transport_of(report.endpoint)
    if transport == "tcp":
        why = f"control is {loaded.settings.control!r}, by {loaded.origins['control']}"
        return warn(
            "control",
            f"over TCP ({report.endpoint}), not a unix socket: {why}; tensors and frames of lane shm do not go that way",
            "unset it, and start broker and workers without it, unless the TEE runtime has no unix sockets",
            control=transport,
        )
    return ok("control", f"over a unix socket, {report.endpoint}", control=transport)


def _versions(report: m.StatusReport) -> Iterator[Check]:
    workers = [peer for peer in report.peers if peer.role == "worker"]
    if not workers:
        yield warn("workers", "none", "start one, e.g. 'gpu-worker serve --model DIR': the transport was not checked")
    for outdated in report.outdated:
        yield warn(outdated.role or "peer", in_words(outdated), _SAME, peer=outdated.peer, pid=outdated.pid, protocol=outdated.version)
    for peer in report.peers:
        name = "worker" if peer.role == "worker" else "client"
        told = f"{peer.name}, pid {peer.pid}"
        if peer.version != __version__:
            yield warn(
                name,
                f"{told}: version {peer.version or 'unknown'}, this program is version {__version__}",
                _SAME,
                peer=peer.name,
                version=peer.version,
            )
        elif peer.role == "worker":
            yield ok(
                name,
                f"{told}: {', '.join(peer.services)} on {peer.device}, version {peer.version}, {peer.stats.calls} calls, {peer.stats.errors} errors",
                peer=peer.name,
                version=peer.version,
            )


def _channels(report: m.StatusReport) -> Iterator[Check]:
    """Of the clients that are there: those that go the slow way. Why, only they know."""
    for peer in report.peers:
        for channel in peer.stats.channels:
            if channel.lane == "zmq":
                yield warn(
                    "channel",
                    f"client {peer.name} (pid {peer.pid}) uses lane zmq for {channel.service!r}: every frame goes through a socket",
                    "its --lane, its SHMBROKER_LANE or its configuration file asks for it, or it has no compiled parts on another processor than x86-64: use lane auto",
                    client=peer.name,
                    lane=channel.lane,
                )
