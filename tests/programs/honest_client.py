"""A client that keeps the rules while others do not: checked calls on every lane. For each line it is sent it says how they went so far."""

from __future__ import annotations

import queue
import sys
import threading

import torch

import shmbroker

PAUSE_SECONDS = 0.002
"""Between two rounds: this client is to be disturbed, not to keep the worker busy."""

asked: queue.SimpleQueue[bool] = queue.SimpleQueue()


def read_requests() -> None:
    for _ in sys.stdin:
        asked.put(True)
    asked.put(False)


torch.set_num_threads(1)
calls = failed = wrong = 0
first = ""
generator = torch.Generator().manual_seed(0)
with shmbroker.connect(arena="4M", name="honest", timeout=300.0) as client:
    service = sys.argv[1]
    lanes = [("shm", "sem"), ("shm", "poll"), ("zmq", "auto")]
    channels = [client.channel(service, lane=lane, doorbell=doorbell) for lane, doorbell in lanes]
    ops = [(channel.bind("double"), channel.bind("scale", factor=3.0)) for channel in channels]
    print("ready", flush=True)
    threading.Thread(target=read_requests, daemon=True).start()
    told = None
    while told is not False:
        for double, scale in ops:
            x = client.empty((1 + calls % 300,)).copy_(torch.rand(1 + calls % 300, generator=generator))
            calls += 2
            try:
                wrong += not torch.equal(double(x), x * 2)
                wrong += not torch.equal(scale(x), x * 3)
            except shmbroker.ShmBrokerError as error:
                failed += 1
                first = first or f"{type(error).__name__}: {error}"
        if told:
            print(f"{calls} {failed} {wrong} {first}", flush=True)
        try:
            told = asked.get(timeout=PAUSE_SECONDS)
        except queue.Empty:
            told = None
