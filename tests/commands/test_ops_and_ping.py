"""``shmbroker ops`` and ``shmbroker ping``: what a service can be asked for, and how long a call to it takes."""

from __future__ import annotations

import json
import os
import re
import sys

import pytest

import shmbroker
from tests.processes import run, running, wait_until, worker_process

COMMAND = (sys.executable, "-m", "shmbroker", "--log-level", "warning")


def test_ops_are_those_that_can_be_bound(broker: shmbroker.LocalBroker, worker: int, client: shmbroker.Client) -> None:
    told = json.loads(run(*COMMAND, "ops", "test", "--json").stdout)
    channel = client.channel("test")
    assert told["ops"] == list(channel.ops)
    assert told["worker"]["pid"] == worker
    assert told["built_in"] == ["shmbroker.echo"]
    assert told["others"] == []
    for op in ("double", "add", *told["built_in"]):
        channel.bind(op)
    lines = run(*COMMAND, "ops", "test").stdout.splitlines()
    assert lines == [f"'test': worker test-worker (pid {worker}) on cpu", *(f"  {op}" for op in (*told["ops"], *told["built_in"]))]


def test_workers_that_offer_the_same_are_named(broker: shmbroker.LocalBroker) -> None:
    with worker_process("twice") as first, worker_process("twice") as second:
        lines = run(*COMMAND, "ops", "twice").stdout.splitlines()
        assert lines[0] == f"'twice': worker test-worker (pid {first.pid}) on cpu"
        assert lines[-1] == f"also offered by test-worker (pid {second.pid})"


@pytest.mark.parametrize(("lane", "doorbell"), [("shm", "sem"), ("shm", "poll"), ("zmq", "socket")])
def test_ping_measures_so_many_calls_of_such_a_size(broker: shmbroker.LocalBroker, worker: int, lane: str, doorbell: str) -> None:
    options = ["--lane", lane, *(["--doorbell", doorbell] if lane == "shm" else []), "--count", "50", "--size", "64K"]
    done = run(*COMMAND, "ping", "test", "--json", *options)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert {key: told[key] for key in ("service", "worker", "pid", "lane", "doorbell", "control", "calls", "nbytes")} == {
        "service": "test",
        "worker": "test-worker",
        "pid": worker,
        "lane": lane,
        "doorbell": doorbell,
        "control": "ipc",
        "calls": 50,
        "nbytes": 65536,
    }
    assert 0 < told["min_us"] <= told["median_us"] <= told["p99_us"] <= told["max_us"]


def test_ping_tells_people_in_three_lines(broker: shmbroker.LocalBroker, worker: int) -> None:
    done = run(*COMMAND, "ping", "test", "--count", "20")
    who, how, times = done.stdout.splitlines()
    assert who == f"'test': worker test-worker (pid {worker}) on cpu"
    assert how == "lane shm, doorbell sem, control ipc; 20 calls, 256 bytes each way"
    assert re.fullmatch(r"round trip: min [\d.]+ us, median [\d.]+ us, p99 [\d.]+ us, max [\d.]+ us", times)


@pytest.mark.parametrize("command", ["ops", "ping"])
def test_a_service_that_nobody_offers_is_told_at_once(broker: shmbroker.LocalBroker, worker: int, command: str) -> None:
    done = run(*COMMAND, command, "nobody")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.match(r"error: no worker offers service 'nobody' .* \(offered: 'test'\)", done.stderr)


@pytest.mark.parametrize("size", ["3", "5G", "much"])
def test_a_size_that_cannot_be_is_refused(broker: shmbroker.LocalBroker, worker: int, size: str) -> None:
    done = run(*COMMAND, "ping", "test", "--size", size)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert "size" in done.stderr


def test_a_worker_that_dies_meanwhile_is_told(broker: shmbroker.LocalBroker) -> None:
    with worker_process("dying") as process, running(*COMMAND, "ping", "dying", "--count", "1000000") as ping:

        def called() -> bool:
            status = json.loads(run(*COMMAND, "status", "--json").stdout)
            return any(client["name"] == "shmbroker-ping" and client["stats"]["channels"] for client in status["clients"])

        wait_until(lambda: ping.poll() is not None or called())
        os.kill(process.pid, 9)
        assert ping.wait(300) == 1
        assert ping.stderr is not None
        assert re.match(rf"error: .*\(pid {process.pid}, dead\)", ping.stderr.read().decode())


# --- completion by a shell --------------------------------------------------------------------------------------------------------------


def completed(program: str, module: str, words: str, count: int) -> list[str]:
    """What bash would be given, as the README has it set up."""
    start = f"import sys; sys.argv = [{program!r}]; from {module} import main; main()"
    variable = f"_{program.upper().replace('-', '_')}_COMPLETE"
    done = run(sys.executable, "-c", start, COMP_WORDS=words, COMP_CWORD=str(count), **{variable: "bash_complete"})
    assert done.returncode == 0, done.stderr
    return [line.partition(",")[2] for line in done.stdout.split()]


def test_a_shell_completes_commands_and_options() -> None:
    assert {"status", "serve"} <= set(completed("shmbroker", "shmbroker.commands.cli", "shmbroker s", 1))
    assert "--local" in completed("tee-worker", "tee_worker.cli", "tee-worker generate --lo", 2)
    assert "--device" in completed("gpu-worker", "gpu_worker.cli", "gpu-worker serve --de", 2)


def test_a_shell_completes_services_and_hears_of_no_error(broker: shmbroker.LocalBroker, worker: int, instance: str) -> None:
    assert completed("shmbroker", "shmbroker.commands.cli", "shmbroker ping te", 2) == ["test"]
    assert completed("shmbroker", "shmbroker.commands.cli", f"shmbroker ops --instance {instance} ", 4) == []
