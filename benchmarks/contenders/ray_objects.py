"""Ray: a tensor put into its object store and given to an actor's method; and the same method as a compiled graph, over a channel in shared memory.

The client is a process of its own, since Ray's is one with many threads; so are Ray's daemons, which are never quite idle: whoever measures others does so
before. They are at loopback alone, with a token and a folder of this run's own, and are gone at the end. Ray hands tensors over as it can without a copy at the
receiver (``RAY_ENABLE_ZERO_COPY_TORCH_TENSORS``); what is put is copied once.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import tempfile
import warnings
from collections.abc import Iterator

import torch

from benchmarks.driven import Driven, drive
from benchmarks.machine import PEER_CPU, pin
from benchmarks.measure import Call
from benchmarks.peer import peer

MODULE = "contenders.ray_objects"
ROOM_BYTES = 256 << 20
"""Of the object store, beside the tensors of some calls: Ray takes nothing much smaller."""

HEADER_BYTES = 1 << 16
"""Of a channel of a compiled graph, beside the tensor."""


@contextlib.contextmanager
def calls(nbytes: int, way: str) -> Iterator[Call]:
    """One tensor there and one back, as ``objects`` or by a compiled ``graph``."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment = {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # its processes look for each other at the machine's own address otherwise
            "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
            "RAY_TMPDIR": folder,  # in which Ray's sockets have paths that are short enough
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        with peer(MODULE, way, str(nbytes), environment=environment, leaves=True) as process:
            yield Driven(process)


def client(way: str, nbytes: str) -> None:
    """The client, until nothing more is asked."""
    import ray

    warnings.filterwarnings("ignore", message=".*(not writable|Zero-copy tensor serialization)")  # after Ray's own filters

    @ray.remote
    class Echo:
        """Answers with a tensor of its own."""

        def __init__(self) -> None:
            pin(PEER_CPU)
            torch.set_num_threads(1)
            self.answer = torch.zeros(int(nbytes), dtype=torch.uint8)

        def echo(self, tensor: torch.Tensor) -> torch.Tensor:
            """Of the same size."""
            return self.answer

    torch.set_num_threads(1)
    own_cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # for what is started now
    store_bytes = 8 * int(nbytes) + ROOM_BYTES
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        object_store_memory=store_bytes,
        _node_ip_address="127.0.0.1",
    )
    try:
        actor = Echo.remote()  # type: ignore[attr-defined]
        tensor = torch.ones(int(nbytes), dtype=torch.uint8)
        ray.get(actor.echo.remote(tensor))
        os.sched_setaffinity(0, own_cpus)
        if way == "objects":
            drive(lambda: ray.get(actor.echo.remote(ray.put(tensor))))
        else:
            drive_graph(actor, tensor)
    finally:
        ray.shutdown()


def drive_graph(actor: object, tensor: torch.Tensor) -> None:
    """Call the method as a compiled graph."""
    import ray
    from ray.dag import InputNode

    with InputNode() as given:
        node = actor.echo.bind(given)  # type: ignore[attr-defined]
    graph = node.experimental_compile(_buffer_size_bytes=tensor.nbytes + HEADER_BYTES)
    try:
        drive(lambda: ray.get(graph.execute(tensor)))
    finally:
        graph.teardown()


if __name__ == "__main__":
    client(*sys.argv[1:])
