"""Ops as a worker runs them, whatever they do: to their inputs, to their room, to the worker."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import shmbroker
from shmbroker import TensorSpec
from shmbroker.client.channel import Channel
from shmbroker.client.local_broker import stop_process
from tests.peers import LANES
from tests.processes import PROGRAMS, START_SECONDS, run, wait_until, worker_process


@pytest.fixture(scope="module")
def calling() -> Iterator[shmbroker.Client]:
    """A client, and a worker in a process of its own."""
    with shmbroker.local_broker(), worker_process(), shmbroker.connect(arena="64M", place_timeout=1.0) as client:
        yield client


@pytest.fixture(params=LANES, ids=["shm-sem", "shm-poll", "zmq"])
def channel(request: pytest.FixtureRequest, calling: shmbroker.Client) -> Iterator[Channel]:
    lane, doorbell = request.param
    channel = calling.channel("test", lane=lane, doorbell=doorbell)
    yield channel
    channel.close()


def same(x: TensorSpec) -> TensorSpec:
    return x


def test_an_error_of_the_op_comes_back_with_its_type_and_text(channel: Channel) -> None:
    with pytest.raises(shmbroker.RemoteOpError, match="op 'fail' failed on worker 'test-worker': ValueError: no such luck") as caught:
        channel.bind("fail", out_spec=same)(torch.ones(1))
    assert caught.value.type_name == "ValueError"
    assert channel.bind("double")(torch.ones(1)).item() == 2.0, "the channel goes on"


def test_room_that_does_not_fit_what_the_op_writes_is_rejected_by_the_worker(channel: Channel) -> None:
    wrong = channel.bind("scale", out_spec=lambda x, factor: TensorSpec((1,), x.dtype), factor=2.0)
    with pytest.raises(shmbroker.BadFrame, match=r"writes float32\[4\], the frame has room for float32\[1\]"):
        wrong(torch.ones(4))


def test_an_op_that_changes_its_input_is_given_the_true_one_each_time(channel: Channel, calling: shmbroker.Client) -> None:
    """A worker recognises a frame that it has checked before, and keeps its tensors: not those that an op has turned round."""
    turned = channel.bind("turn_in_place", out_spec=lambda x: TensorSpec((2,), torch.int64))
    x = calling.empty((3, 4)).fill_(1.0)
    for _ in range(3):
        assert turned(x).tolist() == [4, 3]


def test_an_op_that_tries_to_end_the_worker_or_cannot_tell_its_error_fails_its_call_alone(channel: Channel) -> None:
    x = torch.ones(1)
    with pytest.raises(shmbroker.RemoteOpError, match="SystemExit: 3"):
        channel.bind("leave", out_spec=same)(x)
    with pytest.raises(shmbroker.RemoteOpError, match="SystemExit: 3"):
        channel.bind("leave_untried")(x)
    with pytest.raises(shmbroker.RemoteOpError, match=r"Unspeakable: \(its text cannot be told\)"):
        channel.bind("unspeakable", out_spec=same)(x)
    with pytest.raises(
        shmbroker.RemoteOpError, match="TypeError: op 'nothing' returned NoneType: an op returns a tensor or a tuple of tensors"
    ):
        channel.bind("nothing")(x)
    assert channel.bind("double")(x).item() == 2.0


def test_an_op_without_an_out_spec_runs_once_a_call_and_takes_arguments(channel: Channel) -> None:
    count = channel.bind("count_runs")
    first = count(torch.zeros(1)).item()
    assert count(torch.zeros(1)).item() == first + 1
    assert count(torch.zeros(1), step=10).item() == first + 11
    assert count(torch.zeros(1)).item() == first + 12


# --- an error of the op's own code is a RemoteOpError, however it came about ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["BadInput", "BadFrame", "CallTimeout", "WorkerLost", "WorkerDraining", "ArenaFull"])
@pytest.mark.parametrize("op", ["raise_ours", "raise_ours_untried"])
def test_an_error_of_ours_that_an_op_raises_is_the_ops(channel: Channel, op: str, kind: str) -> None:
    """In the call, and when it is tried out: whoever catches BadInput does not catch what went wrong on the worker."""
    with pytest.raises(shmbroker.RemoteOpError, match=f"op '{op}' failed on worker 'test-worker'.*: {kind}: by the op") as caught:
        channel.bind(op, kind=kind)(torch.ones(1))
    assert caught.value.type_name == kind
    assert type(caught.value) is shmbroker.RemoteOpError


def test_an_error_of_an_out_spec_or_of_binding_is_the_ops(channel: Channel) -> None:
    with pytest.raises(shmbroker.RemoteOpError, match=r"in its out_spec for float32\[1\]: BadInput: not these shapes") as caught:
        channel.bind("choosy")(torch.ones(1))
    assert caught.value.type_name == "BadInput"
    with pytest.raises(shmbroker.RemoteOpError, match="BadInput: not these shapes") as caught:
        channel.bind("choosy", out_spec=same)(torch.ones(1))
    assert "in particular" in caught.value.worker_traceback
    with pytest.raises(shmbroker.RemoteOpError, match=r"when it was bound with \['rows'\]: ValueError: 2000 rows are too many") as caught:
        channel.bind("table", rows=2000)
    assert "in table" in caught.value.worker_traceback
    with pytest.raises(shmbroker.BadInput, match="missing a required argument: 'rows'"):
        channel.bind("table")


@pytest.mark.parametrize("op", ["fail", "raise_ours_untried"])
def test_an_ops_error_carries_the_workers_traceback_below_its_one_line(channel: Channel, op: str) -> None:
    with pytest.raises(shmbroker.RemoteOpError) as caught:
        channel.bind(op, **({} if op == "fail" else {"kind": "BadInput"}))(torch.ones(1))
    told = caught.value.worker_traceback
    assert told.splitlines()[0].endswith(f", in {op}"), "its own calls alone, not ours that led to it"
    assert "raise " in told.splitlines()[1]
    shown = "".join(traceback.format_exception(caught.value))
    assert f"On the worker (most recent call last):\n{told.rstrip()}" in shown
    assert len(str(caught.value).splitlines()) == 1 or sys.version_info < (3, 11)


def test_of_a_long_traceback_the_innermost_calls_are_carried(channel: Channel) -> None:
    with pytest.raises(shmbroker.RemoteOpError, match=r"ValueError: at the bottom \\0") as caught:
        channel.bind("fail_deeply")(torch.ones(1))
    lines = caught.value.worker_traceback.splitlines()
    left_out = re.fullmatch(r"  \.\.\. (\d+) calls further out", lines[0])
    assert left_out is not None
    assert int(left_out[1]) + sum(", in at_depth" in line for line in lines) == 52, "51 of itself, and the op's"
    assert "raise ValueError" in lines[-1]


def test_a_setting_of_the_worker_keeps_tracebacks_there_and_its_log_has_them(calling: shmbroker.Client, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        command = [sys.executable, str(PROGRAMS / "worker.py"), "discreet"]
        worker = subprocess.Popen(command, env={**os.environ, "SHMBROKER_TRACEBACKS": "0"}, stdout=subprocess.PIPE, stderr=stderr)
    try:
        channel = calling.channel("discreet", wait=START_SECONDS)
        for op, static in (("fail", {}), ("raise_ours_untried", {"kind": "BadInput"})):
            with pytest.raises(shmbroker.RemoteOpError, match=r"ValueError: no such luck|BadInput: by the op") as caught:
                channel.bind(op, **static)(torch.ones(1))
            assert caught.value.worker_traceback == ""
            wait_until(lambda op=op: f", in {op}\n" in log.read_text())
        channel.close()
    finally:
        stop_process(worker)


# --- trying an op out for its shapes ----------------------------------------------------------------------------------------------------


def test_an_op_is_tried_out_once_for_a_form_whoever_binds_it(channel: Channel, calling: shmbroker.Client) -> None:
    form = f"{channel.lane} {channel.doorbell}"  # not tried out by another case yet
    other = calling.channel("test")
    counts = [opened.bind("tried_slowly", seconds=0.0, form=form)(torch.zeros(1)).item() for opened in (channel, channel, other)]
    assert len(set(counts)) == 1
    assert other.bind("tried_slowly", seconds=0.0, form=form)(torch.zeros(2))[0].item() == counts[0] + 1, "another form"
    other.close()


def test_trying_out_has_the_time_of_the_call_that_it_is_for(channel: Channel) -> None:
    slow = channel.bind("tried_slowly", seconds=1.5, form=f"slow {channel.lane} {channel.doorbell}")
    with pytest.raises(
        shmbroker.CallTimeout, match=r"op 'tried_slowly': worker 'test-worker' .* had not found the shapes of its outputs after 0\.2 s"
    ):
        slow(torch.ones(1), timeout=0.2)
    with pytest.raises(shmbroker.CallTimeout, match="an op without out_spec is tried out"):
        slow.submit(torch.ones(1), timeout=0.2)
    first = slow(torch.zeros(1), timeout=60.0).item()
    assert slow(torch.zeros(1), timeout=60.0).item() == first, "what was found after the deadline is known all the same"


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_a_timeout_that_is_none_is_refused_before_anything_is_tried_out(channel: Channel, timeout: float) -> None:
    with pytest.raises(shmbroker.BadInput, match="must be a positive number of seconds"):
        channel.bind("tried_slowly", seconds=0.0, form="never")(torch.ones(1), timeout=timeout)


def test_an_op_is_not_tried_out_when_the_client_gives_an_out_spec(channel: Channel) -> None:
    grown = channel.bind("grows_by_value", out_spec=lambda x: TensorSpec((6,), x.dtype))
    assert grown(torch.tensor([3.0, 1.0])).tolist() == [3.0, 1.0] * 3
    assert torch.equal(grown(torch.tensor([2.0, 1.0, 0.0])), torch.tensor([2.0, 1.0, 0.0] * 2))
    with pytest.raises(shmbroker.RemoteOpError, match=r"returned float32\[4\] where float32\[6\] was foretold"):
        grown(torch.tensor([2.0, 1.0]))
    with pytest.raises(shmbroker.RemoteOpError, match=r"tried out for .*if it needs values, give it an out_spec"):
        channel.bind("grows_by_value")(torch.tensor([3.0, 1.0]))


WARM = """
import sys, torch, shmbroker

worker = shmbroker.Worker("warm")
same = lambda x: shmbroker.TensorSpec(x.shape, x.dtype)
worker.op("op", out_spec=same if sys.argv[1] == "True" else None)(lambda x: x)
before = len(sys.modules)


def ready():
    loaded = len(sys.modules) - before
    torch.empty(1, device="meta") * 2
    print(loaded > 100, len(sys.modules) - before - loaded > 100, flush=True)
    worker.stop()


worker.serve(ready)
"""
"""Tells whether what the first op on the meta device needs was loaded before the worker was ready, and whether it had to be afterwards."""


@pytest.mark.usefixtures("calling")
@pytest.mark.parametrize(("with_out_spec", "told"), [(False, "True False"), (True, "False True")], ids=["tried out", "out_spec"])
def test_a_worker_that_may_try_out_an_op_has_loaded_what_that_takes_when_it_is_ready(with_out_spec: bool, told: str) -> None:
    assert run(sys.executable, "-c", WARM, str(with_out_spec)).stdout.strip() == told
