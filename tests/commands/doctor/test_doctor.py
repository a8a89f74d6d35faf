"""The doctor against real faults: what it finds, what it tells to do, and its exit status."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import shmbroker
from shmbroker.control.keys import make_keys
from shmbroker.memory import names
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.segment import make_segment, unlink_segment
from tests.conftest import INSTANCE_PREFIX
from tests.control.test_tcp import free_port
from tests.namespaces import enter_small_shm, possible
from tests.processes import PROGRAMS, broker_process, freeze, run, running, wait_until, worker_process

COMMAND = (sys.executable, "-m", "shmbroker", "--log-level", "error", "doctor")
SMALL = 64 << 20
Checks = list[dict[str, Any]]


def doctor(*options: str, status: int = 0, **environment: str) -> Checks:
    """What it found, as told to programs. ``status``: the exit status that it must have."""
    done = run(*COMMAND, "--json", *options, **environment)
    assert done.returncode == status, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["ok"] == (status == 0)
    assert all(check["remedy"] for check in told["checks"] if check["state"] != "ok")
    return list(told["checks"])


def named(checks: Checks, name: str) -> Checks:
    return [check for check in checks if check["name"] == name]


def only(checks: Checks, name: str) -> dict[str, Any]:
    (check,) = named(checks, name)
    return check


@pytest.fixture(scope="module")
def broker() -> Iterator[shmbroker.LocalBroker]:
    with shmbroker.local_broker() as broker:
        yield broker


# --- the transport in use -----------------------------------------------------------------------------------------------------------------


def test_with_broker_and_worker_all_is_well_and_the_round_trip_is_measured(broker: shmbroker.LocalBroker) -> None:
    with worker_process("any"):
        checks = doctor()
    transport = only(checks, "transport")
    assert transport["state"] == "ok"
    assert {key: transport["figures"][key] for key in ("service", "worker", "lane", "doorbell", "control", "calls")} == {
        "service": "any",
        "worker": "test-worker",
        "lane": "shm",
        "doorbell": "sem",
        "control": "ipc",
        "calls": 200,
    }
    assert 0 < transport["figures"]["median_us"] <= transport["figures"]["p99_us"]
    assert only(checks, "control")["state"] == "ok"
    assert only(checks, "worker")["state"] == "ok"
    assert only(checks, "namespaces")["text"].endswith("has the same /dev/shm")


def test_every_service_is_probed_and_one_that_does_not_answer_is_a_failure(broker: shmbroker.LocalBroker) -> None:
    with worker_process("good"), worker_process("stuck") as stuck:
        freeze(stuck.pid)
        checks = doctor(status=1)
        os.kill(stuck.pid, signal.SIGCONT)
    assert sorted(check["state"] for check in named(checks, "transport")) == ["fail", "ok"]
    assert any("'stuck'" in check["text"] and "does not answer" in check["text"] for check in named(checks, "transport"))


@pytest.mark.parametrize(
    ("options", "environment", "origin"),
    [(["--lane", "zmq"], {}, "flag --lane"), ([], {"SHMBROKER_LANE": "zmq"}, "variable SHMBROKER_LANE")],
)
def test_the_slow_lane_is_told_with_who_asked_for_it(
    broker: shmbroker.LocalBroker, options: list[str], environment: dict[str, str], origin: str
) -> None:
    with worker_process():
        transport = only(doctor(*options, **environment), "transport")
    assert transport["state"] == "warn"
    assert transport["text"].endswith(f"lane zmq is asked for by {origin}")
    assert transport["figures"]["lane"] == "zmq"


def test_the_polling_doorbell_is_told(broker: shmbroker.LocalBroker) -> None:
    with worker_process():
        transport = only(doctor("--doorbell", "poll"), "transport")
    assert transport["state"] == "warn"
    assert "doorbell poll is asked for by flag --doorbell" in transport["text"]


def test_a_client_on_the_slow_lane_is_told(broker: shmbroker.LocalBroker) -> None:
    with worker_process(), shmbroker.connect(arena="1M", name="slow") as client:
        client.channel("test", lane="zmq")

        def seen() -> Checks:
            return named(doctor(), "channel")

        wait_until(lambda: bool(seen()))  # the client tells of its channels with its next heartbeat
        found = seen()
    assert [(check["state"], check["figures"]) for check in found] == [("warn", {"client": "slow", "lane": "zmq"})]


def test_control_over_tcp_is_told_with_the_variable_that_forces_it(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    environment = {
        "SHMBROKER_INSTANCE": f"{INSTANCE_PREFIX}tcp-doctor",
        "SHMBROKER_CONTROL": endpoint,
        "SHMBROKER_KEYS": str(tmp_path / "keys"),
        "SHMBROKER_RUNTIME_DIR": str(tmp_path / "run"),
    }
    with broker_process(environment["SHMBROKER_INSTANCE"], **environment), worker_process(**environment):
        checks = doctor(**environment)
    control = only(checks, "control")
    assert control["state"] == "warn"
    assert f"control is '{endpoint}', by variable SHMBROKER_CONTROL" in control["text"]
    assert only(checks, "transport")["figures"]["control"] == "tcp"


# --- who takes part -------------------------------------------------------------------------------------------------------------------------


def test_that_no_broker_answers_is_a_failure_and_the_rest_is_checked(instance: str) -> None:
    checks = doctor("--instance", instance, status=1)
    assert [check["name"] for check in checks if check["state"] == "fail"] == ["broker"]
    broker = only(checks, "broker")
    assert f"shmbroker serve --instance {instance}" in broker["text"]
    assert "--offline" in broker["remedy"]
    assert only(checks, "/dev/shm")["figures"]["total_bytes"] > 0
    assert named(checks, "transport") == []


def test_offline_asks_no_broker(broker: shmbroker.LocalBroker, instance: str) -> None:
    for options in (["--instance", instance], []):
        checks = doctor("--offline", *options)
        assert only(checks, "broker")["text"].startswith("not asked")
        assert named(checks, "transport") == named(checks, "workers") == []


def test_a_broker_without_workers_is_told(broker: shmbroker.LocalBroker) -> None:
    checks = doctor()
    assert only(checks, "workers")["state"] == "warn"
    assert named(checks, "transport") == []


def test_a_worker_of_another_version_is_told(broker: shmbroker.LocalBroker) -> None:
    words = (
        "import runpy, sys, shmbroker.version; shmbroker.version.__version__ = '9.9.9'; "
        f"sys.argv = ['worker', 'newer']; runpy.run_path({str(PROGRAMS / 'worker.py')!r}, run_name='__main__')"
    )
    with running(sys.executable, "-c", words) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"ready\n"
        check = only(doctor(), "worker")
    assert check["state"] == "warn"
    assert f"version 9.9.9, this program is version {shmbroker.__version__}" in check["text"]


def test_both_sides_log_peer_lane_doorbell_and_control_of_a_connection(broker: shmbroker.LocalBroker, tmp_path: Path) -> None:
    words = "import logging, runpy, sys; logging.basicConfig(level='INFO', filename=sys.argv[2]); sys.argv[1:] = ['test']; "
    words += f"runpy.run_path({str(PROGRAMS / 'worker.py')!r}, run_name='__main__')"
    with running(sys.executable, "-c", words, "test", str(tmp_path / "log")) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"ready\n"
        client = run(*COMMAND[:3], "--log-level", "info", "doctor").stderr
    line = r"channel {} \(pid \d+\){}: lane shm, doorbell sem, control ipc"
    assert re.search(line.format("to test-worker", " for 'test'"), client)
    assert re.search(line.format(r"area \d opened by shmbroker-doctor", ""), (tmp_path / "log").read_text())


# --- shared memory --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not possible(enter_small_shm, SMALL), reason="a /dev/shm of one's own needs root: run as root, or in 'unshare -Urm'")
def test_a_small_shared_memory_fails_with_the_remedy(instance: str) -> None:
    words = (
        f"import os, sys; from tests.namespaces import enter_small_shm; enter_small_shm({SMALL}); "
        f"os.execv(sys.executable, {[*COMMAND, '--instance', instance, '--json']!r})"
    )
    done = run(sys.executable, "-c", words)
    assert done.returncode == 1, done.stderr
    check = only(json.loads(done.stdout)["checks"], "/dev/shm")
    assert check["state"] == "fail"
    assert check["text"] == "64.0 MiB, 64.0 MiB free: less than one client's arena of 256.0 MiB"
    assert "--shm-size" in check["remedy"]
    assert "mount -o remount,size=" in check["remedy"]


@pytest.mark.skipif(not possible(enter_small_shm, SMALL), reason="a /dev/shm of one's own needs root: run as root, or in 'unshare -Urm'")
def test_a_broker_with_another_shared_memory_is_a_failure(broker: shmbroker.LocalBroker) -> None:
    words = (
        "import os, sys; from tests.namespaces import enter_small_shm; enter_small_shm(1 << 30); "
        f"os.execv(sys.executable, {[*COMMAND, '--json']!r})"
    )
    with worker_process():
        done = run(sys.executable, "-c", words)
    assert done.returncode == 1, done.stderr
    checks = json.loads(done.stdout)["checks"]
    check = only(checks, "namespaces")
    assert check["state"] == "fail"
    assert f"the broker (pid {broker.pid}) has another /dev/shm" in check["text"]
    assert only(checks, "transport")["state"] == "fail"


def test_an_orphaned_segment_is_told_with_the_command_that_removes_it(instance: str) -> None:
    name = names.segment_name(instance, names.new_id())
    make_segment(name, Geometry(1 << 20, 1, 1), instance=instance, owner="dead", owner_pid=os.getpid()).release()
    try:
        check = only(doctor("--offline"), "orphans")
        assert check["state"] == "warn"
        assert name[1:] in check["figures"]["orphans"]
        assert check["remedy"].startswith("shmbroker gc --")
        assert run(sys.executable, "-m", "shmbroker", "gc", "--instance", instance).returncode == 0
        assert name[1:] not in only(doctor("--offline"), "orphans")["figures"]["orphans"]
    finally:
        if os.path.exists(names.SHM_DIR + name):
            unlink_segment(name)


def test_a_socket_that_is_open_to_all_is_a_failure(broker: shmbroker.LocalBroker) -> None:
    socket = Path(os.environ["SHMBROKER_RUNTIME_DIR"]) / f"{broker.instance}.sock"
    mode = socket.stat().st_mode & 0o777
    socket.chmod(0o666)
    try:
        check = only(doctor(status=1), "permissions")
    finally:
        socket.chmod(mode)
    assert check["state"] == "fail"
    assert str(socket) in check["text"]


# --- settings and what surrounds ------------------------------------------------------------------------------------------------------------


def test_settings_that_override_are_told_with_where_they_come_from(instance: str, tmp_path: Path) -> None:
    file = tmp_path / "shmbroker.toml"
    file.write_text('arena = "1M"\n')
    file.chmod(0o666)
    checks = doctor("--offline", "--instance", instance, SHMBROKER_CONFIG=str(file), SHMBROKER_PURE_PYTHON="1", OMP_WAIT_POLICY="active")
    texts = [check["text"] for check in named(checks, "settings")]
    assert f"arena by file {file}" in texts[0]
    assert "pure_python by variable SHMBROKER_PURE_PYTHON" in texts[0]
    assert any("can be written by others" in text for text in texts)
    assert any("OMP_WAIT_POLICY" in text for text in texts)
    assert only(checks, "compiled parts")["state"] == "warn"


def test_a_wrong_setting_ends_it_in_one_line() -> None:
    done = run(*COMMAND, SHMBROKER_SPIN="fast")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


def test_more_spinning_processes_than_cpus_are_told(instance: str) -> None:
    one = str(min(os.sched_getaffinity(0)))
    words = (sys.executable, "-c", f"import os, sys; os.sched_setaffinity(0, [{one}]); os.execv(sys.executable, {list(COMMAND)!r})")
    assert re.search(r"^warn CPUs: 1 CPUs; .* -> .*SHMBROKER_SPIN=0", run(*words).stdout, re.MULTILINE)
    assert re.search(r"^ok   CPUs: 1 CPUs", run(*words, SHMBROKER_SPIN="0").stdout, re.MULTILINE)


def test_for_people_each_check_is_one_line_and_the_last_one_counts(instance: str) -> None:
    done = subprocess.run([*COMMAND, "--offline", "--instance", instance], capture_output=True, text=True, timeout=120, check=True)
    *lines, last = done.stdout.splitlines()
    assert all(re.match(r"(ok  |warn|fail) \S", line) for line in lines)
    assert last == f"{sum(line.startswith('ok') for line in lines)} ok, {sum(line.startswith('warn') for line in lines)} warn, 0 fail"


def test_an_op_of_a_reserved_name_is_refused() -> None:
    with pytest.raises(shmbroker.BadInput, match=r"names that begin with 'shmbroker\.' are every worker's own"):
        shmbroker.Worker("x").op("shmbroker.mine")(lambda x: x)
