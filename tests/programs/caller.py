"""A client for tests of what looks: calls without end, and tells its own report when its standard input says so."""

from __future__ import annotations

import json
import sys
import threading

import msgspec

import shmbroker
from shmbroker import TensorSpec

with shmbroker.connect(arena="16M", name="caller") as client:
    channel = client.channel("test")
    op = channel.bind("add", out_spec=lambda x: TensorSpec(x.shape, x.dtype))
    kept = client.empty((1 << 18,)), client.empty((1 << 16,))
    x = client.empty((256,))
    x.fill_(1)
    op(x)
    stopped = threading.Event()

    def call() -> None:
        """One thread calls, the other listens."""
        while not stopped.is_set():
            op(x)

    calling = threading.Thread(target=call)
    calling.start()
    print("ready", flush=True)
    for line in sys.stdin:
        if line == "stop\n":
            stopped.set()
            calling.join()
            print(json.dumps(msgspec.to_builtins(channel.report().total)), flush=True)
    stopped.set()
    calling.join()
