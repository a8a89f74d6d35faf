"""Client and worker in a process that may open few files: whatever it lacks, the error says what to do, and the process lives."""

from __future__ import annotations

import os
import resource
import sys

import pytest
import torch

import shmbroker
from tests.processes import run, worker_process

STEPS = """
import resource, sys, torch, shmbroker
from shmbroker.memory.open_files import open_files
torch.empty(1, device="meta") * 2
what = sys.argv[1]
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
outcomes = []

def limited(free, action):
    before = open_files()
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + free, hard))
    try:
        action()
        outcomes.append("done")
    except shmbroker.TooManyOpenFiles as error:
        assert "raise the limit" in str(error), error
        outcomes.append("told")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

def private():
    with shmbroker.local_broker():
        pass

def join():
    shmbroker.connect(arena="1M").close()

if what == "local_broker":
    for free in (0, 1, 2, 3, 5, 20):
        limited(free, private)
elif what == "serve":
    for free in [*range(0, 60, 8), 41, 80]:
        worker = shmbroker.Worker("other")
        limited(free, lambda: worker.serve(ready=worker.stop))
elif what == "connect":
    for free in [*range(0, 60, 4), 33, 80]:
        limited(free, join)
else:
    client = shmbroker.connect(arena="1M")
    lane, doorbell = sys.argv[2:]
    if what == "channel":
        for free in [*range(0, 40, 3), 60]:
            limited(free, lambda: client.channel("test", lane=lane, doorbell=doorbell).close())
    else:
        channel = client.channel("test", lane=lane, doorbell=doorbell)
        for free in range(0, 4):
            limited(free, lambda: client.copy_in(torch.ones(4)))
            limited(free, lambda: client.empty((4,)))
            limited(free, lambda: channel.bind("double")(torch.ones(4)))
        assert set(outcomes) == {"done"}, outcomes
    assert client.channel("test", lane=lane, doorbell=doorbell).bind("double")(torch.ones(2)).tolist() == [2.0] * 2
    client.close()
print(" ".join(outcomes))
"""


def outcomes(*arguments: str) -> list[str]:
    done = run(sys.executable, "-c", STEPS, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("what", ["connect", "serve", "local_broker"])
def test_what_begins_with_too_few_files_is_refused_and_with_enough_is_done(worker: int, what: str) -> None:
    """No number of free files in between leads to anything else: not to an error of the system's, nor to the end of the process."""
    told = outcomes(what)
    assert set(told) == {"told", "done"}
    assert told[0] == "told"
    assert told[-1] == "done"


@pytest.mark.parametrize(("lane", "doorbell"), [("shm", "sem"), ("zmq", "auto")])
def test_a_channel_that_lacks_files_is_refused_and_the_client_goes_on(worker: int, lane: str, doorbell: str) -> None:
    told = outcomes("channel", lane, doorbell)
    assert set(told) == {"told", "done"}
    assert told[-1] == "done"


@pytest.mark.parametrize(("lane", "doorbell"), [("shm", "sem"), ("zmq", "auto")])
def test_an_open_channel_needs_no_files_to_bind_to_place_and_to_call(worker: int, lane: str, doorbell: str) -> None:
    outcomes("call", lane, doorbell)


def test_a_worker_that_lacks_files_refuses_a_channel_with_the_reason_and_serves_those_it_has(broker: shmbroker.LocalBroker) -> None:
    with worker_process("narrow") as process, shmbroker.connect(arena="1M") as client:
        first = client.channel("narrow").bind("double")
        opened = len(os.listdir(f"/proc/{process.pid}/fd"))
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (opened + 16, opened + 16))
        with pytest.raises(shmbroker.TooManyOpenFiles, match=f"process {process.pid}, which was asked"):
            client.channel("narrow")
        assert first(torch.ones(2)).tolist() == [2.0] * 2
        assert process.poll() is None
