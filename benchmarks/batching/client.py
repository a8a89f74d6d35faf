"""A client that decodes: for each line on its standard input so many tokens, and then the seconds they took. A peer.

What a TEE worker computes itself is slept here: it stands for a core of the client's own, of which this machine has not as many.
"""

from __future__ import annotations

import random
import sys
import time

import shmbroker
from benchmarks.batching.layers import PRODUCTS, SERVICE, names
from benchmarks.machine import PEER_CPU, pin
from benchmarks.peer import ready


def serve(layers: str, number: str) -> None:
    """``number``: of this client."""
    pin(1 - PEER_CPU)  # the worker's core is its own
    own = random.Random(int(number))
    with shmbroker.connect(arena="8M", name=f"decode {number}") as client:
        channel = client.channel(SERVICE)
        calls = []
        for name, product in names(int(layers)):
            op = channel.bind("linear", module=name)
            calls.append((op, client.empty((1, 1, PRODUCTS[product][0])).fill_(0.5)))

        def token(step_seconds: float, token_seconds: float) -> None:
            time.sleep(token_seconds * own.uniform(0.8, 1.2))
            for op, x in calls:
                op(x)
                time.sleep(step_seconds)

        for _ in range(4):
            token(0.0, 0.0)
        ready()
        for line in sys.stdin:
            count, step_seconds, token_seconds = line.split()
            begun = time.perf_counter()
            for _ in range(int(count)):
                token(float(step_seconds), float(token_seconds))
            print(time.perf_counter() - begun, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
