"""The transport that is really in use: a channel to each service through the running broker, and calls that do nothing on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shmbroker.commands.doctor.check import Check, fail, ok, warn
from shmbroker.commands.round_trip import measure
from shmbroker.control import messages as m
from shmbroker.errors import BadInput, ShmBrokerError
from shmbroker.lane.ends import shm_lane_needs

if TYPE_CHECKING:
    from shmbroker.client.channel import Channel

CALLS = 200
CALL_SECONDS = 5.0
"""A worker that computes for its clients meanwhile answers between two calls."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Lane and doorbell that the probe asks for, and who said so."""

    lane: str
    lane_origin: str
    doorbell: str
    doorbell_origin: str

    def why_lane(self) -> str:
        """Why the lane is the slow one."""
        if self.lane == "zmq":
            return f"lane zmq is asked for by {self.lane_origin}"
        needs = shm_lane_needs()
        return f"lane shm needs {needs}" if needs else "the worker agreed to no other"


def checks(report: m.StatusReport, asked: Asked) -> Iterator[Check]:
    """One for each service that is offered. ``asked``: what the probe is to ask for."""
    services = sorted({service for peer in report.peers for service in peer.services})
    if not services:
        return
    from shmbroker.client.client import connect

    try:
        client = connect(report.instance, arena="1M", name="shmbroker-doctor", timeout=CALL_SECONDS, channels=1, depth=4)
    except (ShmBrokerError, OSError) as error:
        yield fail("transport", f"no client can join: {error}", "see /dev/shm and namespaces above, and docs/troubleshooting.md")
        return
    with client:
        for service in services:
            try:
                channel = client.channel(service, lane=asked.lane, doorbell=asked.doorbell, wait=0.0)
            except (ShmBrokerError, OSError) as error:
                yield fail("transport", f"no channel to service {service!r}: {error}", "see namespaces above, and docs/troubleshooting.md")
                continue
            try:
                yield _measured(channel, asked)
            except (ShmBrokerError, OSError) as error:
                yield fail("transport", f"service {service!r}: {error}", "start that worker again; its log tells more")
            finally:
                channel.close()


def _measured(channel: Channel, asked: Asked) -> Check:
    from shmbroker.worker.built_in_ops import ECHO

    text = f"service {channel.service!r}, worker {channel.worker_name}: lane {channel.lane}, doorbell {channel.doorbell}, control {channel.control}"
    figures: dict[str, Any] = {
        "service": channel.service,
        "worker": channel.worker_name,
        "lane": channel.lane,
        "doorbell": channel.doorbell,
        "control": channel.control,
    }
    try:
        trip = measure(channel, CALLS)
    except BadInput:
        return warn(
            "transport",
            f"{text}; it has no op {ECHO}, so its round trip cannot be measured",
            "run the same release of shmbroker there",
            **figures,
        )
    figures |= {"calls": trip.calls, "median_us": trip.median_us, "p99_us": trip.p99_us}
    text += f"; round trip {trip.median_us:.1f} us (median of {trip.calls} calls, p99 {trip.p99_us:.1f} us)"
    if channel.lane == "zmq":
        return warn("transport", f"{text}; {asked.why_lane()}", "use lane auto or shm, with compiled parts or on x86-64", **figures)
    if channel.control == "tcp":
        return warn("transport", f"{text}; control is TCP", "see control above; calls do not go that way", **figures)
    if channel.doorbell == "poll":
        return warn(
            "transport",
            f"{text}; doorbell poll is asked for by {asked.doorbell_origin}: waking takes up to 1 ms",
            "use doorbell auto or sem, except in Gramine",
            **figures,
        )
    return ok("transport", text, **figures)
