"""What a cluster must have before a prompt goes through it.

Ray's proxies see prompts and answers; its transport is plain unless RAY_USE_TLS says otherwise; and whoever may join the cluster, or submits work to it,
can run code beside the TEE worker, as its user.
"""

from __future__ import annotations

import importlib
import ipaddress
import os
from collections.abc import Iterable, Mapping
from typing import Any

from shmbroker.errors import BadInput

TLS_VARIABLE = "RAY_USE_TLS"
AUTHENTICATION_VARIABLE = "RAY_AUTH_MODE"


def is_loopback(address: str) -> bool:
    """Whether a node's address leads nowhere else."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def missing(addresses: Iterable[str], environment: Mapping[str, str] = os.environ) -> list[str]:
    """What a cluster of nodes with these addresses lacks; nothing on loopback."""
    if all(is_loopback(one) for one in addresses):
        return []
    lacks = []
    if environment.get(TLS_VARIABLE, "0").lower() not in ("1", "true"):
        lacks.append(f"TLS ({TLS_VARIABLE}=1, with RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY and RAY_TLS_CA_CERT)")
    if environment.get(AUTHENTICATION_VARIABLE, "").lower() != "token":
        lacks.append(f"token authentication ({AUTHENTICATION_VARIABLE}=token)")
    return lacks


def check_secrecy(addresses: Iterable[str], *, trusted: bool, environment: Mapping[str, str] = os.environ) -> None:
    """Raise :class:`BadInput` where prompts would cross a network as they are, or anybody could join."""
    lacks = missing(addresses, environment)
    if lacks and not trusted:
        raise BadInput(
            f"this cluster is not on loopback and lacks {' and '.join(lacks)}: prompts would cross the network as they are, and whoever reaches it could "
            "run code beside the TEE worker; set both on all nodes (docs/scale-out.md), or say --i-trust-the-cluster"
        )


def check_own_cluster(*, trusted: bool) -> None:
    """:func:`check_secrecy` of the cluster that this process is connected to."""
    import ray

    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    check_secrecy([node["NodeManagerAddress"] for node in nodes if node["Alive"]], trusted=trusted)


def keep_to_loopback() -> None:
    """On a node that is on loopback, have Ray Serve's own server of this process listen there alone. Raises :class:`BadInput` where that cannot be.

    It is for calls between deployments, unpickles what it is sent and asks nobody who he is; Serve opens it on all interfaces whatever the node's
    address is. To be called in a deployment's constructor: Serve opens it after that.
    """
    import ray

    serve_replica: Any = importlib.import_module("ray.serve._private.replica")
    if not is_loopback(ray.util.get_node_ip_address()):  # type: ignore[no-untyped-call]
        return  # where TLS is asked for, it asks for a certificate too
    opened = getattr(serve_replica, "add_port_to_grpc_server", None)
    if opened is None:
        raise BadInput(f"Ray {ray.__version__} opens its servers elsewhere than Ray 2.60: install 'shmbroker[ray]', which pins it")
    if not getattr(opened, "loopback", False):

        def open_on_loopback(server: object, address: str) -> object:
            return opened(server, address.replace("[::]", "127.0.0.1"))

        vars(open_on_loopback)["loopback"] = True
        serve_replica.add_port_to_grpc_server = open_on_loopback
