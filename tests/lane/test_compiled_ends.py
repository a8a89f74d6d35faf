"""The compiled parts and those in Python do the same, and a channel may have one kind at each end."""

from __future__ import annotations

import sys

import pytest

import shmbroker
from shmbroker.memory import compiled
from tests.processes import run, worker_process

CLIENT = """
import sys, gc, torch, shmbroker
from shmbroker.lane.ends import COMPILED
assert COMPILED == (sys.argv[1] == "compiled"), "the wrong kind is used"
with shmbroker.connect(arena="8M", depth=4) as client:
    channel = client.channel("test")
    double, fail = channel.bind("double"), channel.bind("fail", out_spec=lambda x: x)
    for spin in (50e-6, 0.0):
        for number in range(300):
            x = client.empty((1000,)).fill_(number)
            assert torch.equal(double(x), x * 2)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.bool):
        x = torch.ones(33).to(dtype)
        y = channel.bind("contiguous", out_spec=lambda x: x)(x)
        assert y.dtype is dtype and torch.equal(y.view(torch.uint8), x.view(torch.uint8))
    captured = double.capture(client.empty((1000,)).fill_(3))
    for _ in range(300):
        assert captured.replay()[0] == 6
    futures = [double.submit(torch.full((10,), float(i))) for i in range(100)]
    assert [future.result()[0].item() for future in futures] == [2.0 * i for i in range(100)]
    try:
        fail(torch.ones(1))
    except shmbroker.RemoteOpError as error:
        assert "worker" in str(error)
    else:
        raise AssertionError("no error came")
    del x, y, captured, futures
    gc.collect()
    assert client.arena.occupancy().blocks == 0
print("all well")
"""

PURE = {"python": "1", "compiled": ""}


@pytest.mark.parametrize("client_kind", PURE)
@pytest.mark.parametrize("worker_kind", PURE)
def test_a_channel_may_have_compiled_parts_at_either_end(broker: shmbroker.LocalBroker, worker_kind: str, client_kind: str) -> None:
    if "compiled" in (worker_kind, client_kind):
        pytest.importorskip("shmbroker.lane._ends", reason="built without a C compiler")
    with worker_process(SHMBROKER_PURE_PYTHON=PURE[worker_kind]):
        done = run(sys.executable, "-c", CLIENT, client_kind, SHMBROKER_PURE_PYTHON=PURE[client_kind])
    assert (done.returncode, done.stdout) == (0, "all well\n"), done.stderr


def test_these_tests_run_with_the_compiled_parts_where_there_are_any() -> None:
    """Else a build that fails silently would go unnoticed."""
    from shmbroker.lane import ends

    pytest.importorskip("shmbroker.lane._ends", reason="built without a C compiler")
    assert ends.COMPILED == compiled.WANTED
