"""A cluster of Ray nodes on this machine, for trying out: all of it on loopback, nothing of it left at the end."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

LOOPBACK_ADDRESS = "127.0.0.1"

OBJECT_STORE_BYTES = 80 << 20
"""Of each node: no tensor goes through it, and Ray takes nothing much smaller."""


ENVIRONMENT: Mapping[str, str] = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # A process looks for a cluster at "127.0.0.1" under the machine's own address, unless Ray takes the machine for one that has none.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
"""Variables of every process that starts or joins a cluster on loopback; to be set before Ray is imported."""


@contextlib.contextmanager
def own_environment() -> Iterator[None]:
    """What the processes of a cluster of this run's own inherit, for the length of a block that begins before Ray is imported.

    A token of its own: loopback is open to every user of the machine, and whoever may submit work to a cluster runs code as its user. A folder of its
    own, for logs, sockets and Ray's note of the running cluster, which stays another's.
    """
    folder = tempfile.mkdtemp(prefix="shmbroker-ray-", dir="/tmp")  # the paths of Ray's sockets are long enough
    environment = {**ENVIRONMENT, "RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def local_cluster(nodes: int, cpus: float) -> Iterator[str]:
    """So many nodes with ``cpus`` each, for the length of a block in :func:`own_environment`: the address."""
    from ray.cluster_utils import Cluster

    arguments: dict[str, Any] = {
        "node_ip_address": LOOPBACK_ADDRESS,
        "include_dashboard": False,
        "num_cpus": cpus,
        "object_store_memory": OBJECT_STORE_BYTES,
    }
    cluster = Cluster()
    try:
        for _ in range(nodes):
            cluster.add_node(**arguments)
        yield cluster.address
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]
