"""Which lane a channel uses on which processor: shm wherever the compiled ends are there, or plain stores are seen in order; else zmq.

The processor is what ``platform.machine()`` says, which is substituted: what the compiled ends do on another one, test_c_core.py and test_weak_memory.py tell.
"""

from __future__ import annotations

import contextlib
import platform
import sys
from collections.abc import Iterator

import pytest
import torch

import shmbroker
from shmbroker.commands.doctor import host
from shmbroker.commands.doctor.check import Check, State
from shmbroker.lane import choice, ends
from shmbroker.settings.kinds import Doorbell, Lane
from shmbroker.settings.schema import Settings
from tests.processes import PROGRAMS, running

SHM, ZMQ = (Lane.SHM, Doorbell.SEM), (Lane.ZMQ, Doorbell.SOCKET)
ARM = "aarch64"

ON = f"import platform, runpy, sys; platform.machine = lambda: {ARM!r}; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
"""A program that runs another on a processor that says so of itself."""


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    machine, compiled = request.param
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(ends, "COMPILED", compiled)


def processors(*machines: tuple[str, bool]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("on", machines, indirect=True, ids=lambda on: f"{on[0]}-{'compiled' if on[1] else 'python'}")


WITH_SHM = [("x86_64", True), ("x86_64", False), ("AMD64", False), (ARM, True), ("riscv64", True)]
WITHOUT = [(ARM, False), ("riscv64", False)]


@processors(*WITH_SHM)
@pytest.mark.usefixtures("on")
def test_lane_shm_is_chosen_where_stores_are_seen_in_order() -> None:
    assert ends.shm_lane_needs() == ""
    assert choice.asked("auto", "auto") == choice.asked("shm", "sem") == choice.agreed("shm", "sem") == SHM
    assert choice.asked("zmq", "auto") == ZMQ


@processors(*WITHOUT)
@pytest.mark.usefixtures("on")
def test_lane_zmq_is_chosen_where_they_are_not_and_lane_shm_refused() -> None:
    assert choice.asked("auto", "auto") == ZMQ
    told = r"needs.* the compiled parts on \w+: plain stores from Python are seen in order on x86-64 only; use lane zmq"
    with pytest.raises(shmbroker.BadInput, match=f"lane shm {told}, or see what 'shmbroker doctor' says of the compiled parts"):
        choice.asked("shm", "auto")
    with pytest.raises(shmbroker.ChannelError, match=r"this worker has not what lane shm needs: the compiled parts on \w+"):
        choice.agreed("shm", "sem")
    assert choice.agreed("zmq", "socket") == ZMQ


@pytest.mark.parametrize("compiled", [True, False])
def test_a_big_endian_processor_has_lane_zmq_alone(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends, "COMPILED", compiled)
    monkeypatch.setattr(platform, "machine", lambda: "s390x")
    monkeypatch.setattr(sys, "byteorder", "big")
    assert choice.asked("auto", "auto") == ZMQ
    assert ends.shm_lane_needs() == "a little-endian processor, as the layout of a segment is; s390x is none"


def processor() -> Check:
    (check,) = [check for check in host.checks(Settings(), None) if check.name == "processor"]
    return check


@processors((ARM, True), ("x86_64", False))
@pytest.mark.usefixtures("on")
def test_doctor_tells_whose_stores_they_are() -> None:
    assert processor().state is State.OK
    assert ("compiled, in the orders that they state" in processor().text) == ends.COMPILED
    assert platform.machine() in processor().text


@processors((ARM, False))
@pytest.mark.usefixtures("on")
def test_doctor_tells_what_lane_shm_needs_there() -> None:
    assert processor().state is State.WARN
    assert (
        "aarch64: lane shm needs the compiled parts on aarch64: plain stores from Python are seen in order on x86-64 only"
        in processor().text
    )
    assert "compiled parts" in processor().remedy


# --- real channels --------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def worker_on_arm(service: str, **environment: str) -> Iterator[None]:
    with running(sys.executable, "-c", ON, str(PROGRAMS / "worker.py"), service, **environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield


def test_a_client_and_a_worker_with_compiled_ends_talk_on_lane_shm_on_another_processor(
    broker: shmbroker.LocalBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not ends.COMPILED:
        pytest.skip("built without a C compiler")
    monkeypatch.setattr(platform, "machine", lambda: ARM)
    with worker_on_arm("arm"), shmbroker.connect(arena="8M") as client:
        channel = client.channel("arm")
        assert (channel.lane, channel.doorbell) == ("shm", "sem")
        double = channel.bind("double")
        for number in range(100):
            x = client.empty((1000,)).fill_(number)
            assert torch.equal(double(x), x * 2)


def test_a_worker_whose_ends_are_in_python_is_reached_on_lane_zmq_there(
    broker: shmbroker.LocalBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: ARM)
    with worker_on_arm("plain", SHMBROKER_PURE_PYTHON="1"), shmbroker.connect(arena="8M") as client:
        if ends.COMPILED:
            with pytest.raises(shmbroker.ChannelError, match="this worker has not what lane shm needs"):
                client.channel("plain")
        channel = client.channel("plain", lane="zmq")
        assert channel.lane == "zmq"
        assert torch.equal(channel.bind("double")(torch.ones(3)), torch.full((3,), 2.0))
