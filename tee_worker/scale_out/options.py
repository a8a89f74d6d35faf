"""What is asked of a fleet. Needs neither torch nor Ray."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from shmbroker.errors import BadInput
from shmbroker.settings import DEFAULTS, default_for
from tee_worker.run_options import ServeOptions


class Options(ServeOptions, frozen=True, kw_only=True):
    """Of each replica: as of ``tee-worker serve``, and what it needs of its node. The model's folder must be there on every node."""

    command: ClassVar[str] = "tee-worker ray"

    failover: float = default_for(command, "failover")
    """Seconds that a call, and the replica's health, wait for a GPU worker that is started anew; so long do requests wait for a replica."""
    timeout: float = default_for(command, "timeout")
    device: str = DEFAULTS.device
    """Of the GPU workers: cpu, cuda or cuda:N."""
    cpus: float = 1.0
    """That Ray counts for one replica; it computes with so many threads on either side, unless ``threads`` says otherwise."""
    gpus: float | None = None
    """That Ray counts for one replica; None: one on device cuda, else none."""
    trust_cluster: bool = False
    """Whether a cluster without TLS and authentication will do (docs/scale-out.md)."""

    direct: str | None = None
    """HOST:PORT where each replica listens itself, over TLS, in the place of an endpoint before all of them."""
    tls_cert: str | None = None
    tls_key: str | None = None

    def of_ray(self) -> dict[str, float]:
        """What Ray counts for one replica."""
        gpus = (1.0 if self.device.startswith("cuda") else 0.0) if self.gpus is None else self.gpus
        return {"num_cpus": self.cpus, "num_gpus": gpus}

    def services(self) -> list[str]:
        """Of the GPU workers that a replica has."""
        return [self.service, *(one for one in (self.second, self.pads_from) if one is not None)]


class Autoscale(msgspec.Struct, frozen=True):
    """Between how many replicas the fleet has, by its load."""

    least: int
    most: int

    @classmethod
    def parsed(cls, text: str) -> Autoscale:
        """``1:4``. Raises :class:`BadInput`."""
        least, _, most = text.partition(":")
        if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
            raise BadInput(f"--autoscale {text!r}: give the least and the most replicas, e.g. 1:4")
        return cls(int(least), int(most))


def address_of(text: str) -> tuple[str, int]:
    """``HOST:PORT``, an IPv6 address in brackets. Raises :class:`BadInput`."""
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise BadInput(f"--direct {text!r}: give HOST:PORT of the interface to listen on, e.g. 0.0.0.0:8443")
    return host.strip("[]"), int(port)


def check_fleet(options: Options) -> None:
    """Refuse what a replica cannot have. Raises :class:`BadInput`."""
    for name, value in (("local", options.local), ("instance", options.instance), ("trace", options.trace)):
        if value:
            raise BadInput(f"{name}: each replica has a broker and GPU workers of its own, on whichever node it is: leave it out")
    if not options.cpus > 0:
        raise BadInput(f"--cpus {options.cpus:g}: a replica computes: give more than 0")
    if options.direct is not None:
        address_of(options.direct)
        for name, value in (("--tls-cert", options.tls_cert), ("--tls-key", options.tls_key), ("an API key", options.api_key)):
            if not value:
                raise BadInput(f"--direct needs {name}: whoever reaches the node reaches the replica")
    elif options.tls_cert or options.tls_key:
        raise BadInput("--tls-cert and --tls-key are for --direct: before Ray's own proxies put one that has them")
    if not options.failover > 0:
        raise BadInput("--failover 0: a replica's GPU worker is started anew when it dies, and its requests wait for it: give seconds")
