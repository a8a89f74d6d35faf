"""The client that prefills: for each number on its standard input so many passes over the layer, and then the seconds they took. A peer."""

from __future__ import annotations

import sys
import time

import shmbroker
from benchmarks.machine import PEER_CPU, pin
from benchmarks.peer import ready
from benchmarks.sharing.layer import SERVICE, bind


def serve(tokens: str) -> None:
    """``tokens``: of one pass."""
    pin(1 - PEER_CPU)  # the worker's core is its own
    with shmbroker.connect(arena="128M", name="prefill") as client:
        calls = bind(client.channel(SERVICE), client, int(tokens))
        for call in calls:
            call()
        ready()
        for line in sys.stdin:
            begun = time.perf_counter()
            for _ in range(int(line)):
                for call in calls:
                    call()
            print(time.perf_counter() - begun, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
