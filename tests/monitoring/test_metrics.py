"""``/metrics``: true to what the channels count, bounded whatever clients claim, and in nobody's way."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import shmbroker
from shmbroker import TensorSpec
from shmbroker.memory import layout, names
from shmbroker.monitoring.figures import read_figures
from shmbroker.monitoring.metrics import MOST_OF_A_CLIENT
from tests.monitoring.conftest import Metered, MeteredBroker
from tests.processes import check_is_small_and_light, freeze, run, running, wait_until, worker_process

DASHBOARD = Path(shmbroker.__file__).parent / "monitoring" / "dashboard.json"


def stop_and_count(caller: subprocess.Popen[bytes]) -> dict[str, Any]:
    """What the client's own report says, once it calls no more."""
    assert caller.stdin is not None
    assert caller.stdout is not None
    caller.stdin.write(b"stop\n")
    caller.stdin.flush()
    report: dict[str, Any] = json.loads(caller.stdout.readline())
    return report


def segment_paths(metered: Metered) -> list[str]:
    """The files of the segments."""
    prefix = f"shmbroker.{metered.environment['SHMBROKER_INSTANCE']}.segment."
    return [f"{names.SHM_DIR}/{file}" for file in os.listdir(names.SHM_DIR) if file.startswith(prefix)]


def test_counters_equal_the_report_of_the_channel(metered: Metered, caller: subprocess.Popen[bytes]) -> None:
    wait_until(lambda: (metered.value("shmbroker_calls_total", client="caller") or 0) > 100)
    report = stop_and_count(caller)
    wait_until(lambda: metered.value("shmbroker_calls_total", client="caller") == report["calls"])
    labels = {"client": "caller", "worker": "test-worker", "service": "test", "lane": "shm"}
    assert metered.value("shmbroker_call_seconds_count", **labels) == report["calls"]
    assert metered.value("shmbroker_call_seconds_sum", **labels) == pytest.approx(report["rpc_ms"] / 1e3)
    assert metered.value("shmbroker_bytes_total", **labels, direction="sent") == report["sent_bytes"]
    assert metered.value("shmbroker_bytes_total", **labels, direction="received") == report["received_bytes"]
    assert metered.value("shmbroker_call_errors_total", **labels) == report["errors"] == 0
    assert metered.value("shmbroker_calls_outstanding", **labels) == 0
    wait_until(lambda: metered.value("shmbroker_worker_calls_total", **labels) == report["calls"])
    compute = metered.value("shmbroker_worker_compute_seconds_total", **labels)
    assert compute is not None
    assert compute == pytest.approx(report["compute_ms"] / 1e3)
    held = metered.value("shmbroker_arena_held_bytes", client="caller")
    assert held is not None
    assert held >= 4 * ((1 << 18) + (1 << 16) + 256)
    assert metered.value("shmbroker_arena_bytes", client="caller") == 16 << 20


def test_waiting_calls_and_the_share_of_each_client_are_told(metered: Metered) -> None:
    """One that calls all the time has some of the worker's time, one that does nothing has none; what comes behind a long call waits."""
    with shmbroker.connect(arena="1M", name="busy") as busy, shmbroker.connect(arena="1M", name="idle") as idle:
        sleep = busy.channel("test").bind("sleep", seconds=0.1)
        idle.channel("test")
        futures = [sleep.submit(torch.ones(1)) for _ in range(20)]
        wait_until(lambda: metered.value("shmbroker_worker_share", client="busy") == 1)
        assert metered.value("shmbroker_worker_share", client="idle") == 0
        futures += [sleep.submit(torch.ones(1)) for _ in range(20)]
        wait_until(lambda: (metered.value("shmbroker_worker_waiting_calls", client="busy") or 0) > 1)
        for future in futures:
            future.result()
        wait_until(lambda: metered.value("shmbroker_worker_waiting_calls", client="busy") == 0)
        wait_until(lambda: metered.value("shmbroker_worker_share", client="busy") == 0)


def test_errors_copies_and_waits_are_counted(metered: Metered) -> None:
    with shmbroker.connect(arena="1M", name="unlucky", place_timeout=0.05) as client:
        channel = client.channel("test")
        fail = channel.bind("fail", out_spec=lambda x: TensorSpec(x.shape, x.dtype))
        outside = client.copy_in(torch.ones(64))
        for _ in range(3):
            with pytest.raises(shmbroker.RemoteOpError):
                fail(outside)
        kept = client.empty((200 << 10,))
        with pytest.raises(shmbroker.ArenaFull):
            client.empty((200 << 10,))
        wait_until(lambda: metered.value("shmbroker_arena_full_total", client="unlucky") == 1)
        assert metered.value("shmbroker_arena_waits_total", client="unlucky") == 1
        assert metered.value("shmbroker_arena_copied_bytes_total", client="unlucky") == 256
        wait_until(lambda: metered.value("shmbroker_call_errors_total", client="unlucky") == 3)
        wait_until(lambda: metered.value("shmbroker_worker_errors_total", client="unlucky") == 3)
        assert metered.value("shmbroker_arena_high_water_bytes", client="unlucky") >= kept.nbytes  # type: ignore[operator]
        assert metered.value("shmbroker_call_seconds_count", client="unlucky") == 3
        channel.close()
        assert metered.value("shmbroker_calls_total", client="unlucky") is None, "a closed channel has no series"
        again = client.channel("test")
        wait_until(lambda: metered.value("shmbroker_calls_total", client="unlucky") == 0)
        again.close()


def test_the_sums_of_histograms_equal_their_counts_at_any_moment(metered: Metered, caller: subprocess.Popen[bytes]) -> None:
    [path] = segment_paths(metered)
    wait_until(lambda: metered.value("shmbroker_calls_total", client="caller") is not None)
    last = 0
    for _ in range(1000):
        for channel in read_figures(path.rpartition("/")[2]).channels:
            assert sum(channel.buckets) == channel.calls >= last
            last = channel.calls
    for _ in range(10):
        samples = metered.families()["shmbroker_call_seconds"].samples
        buckets = [sample.value for sample in samples if sample.name.endswith("_bucket")]
        assert buckets == sorted(buckets)
        count = next(sample.value for sample in samples if sample.name.endswith("_count"))
        assert buckets[-1] == count


def test_looking_stops_nobody(metered: Metered, caller: subprocess.Popen[bytes]) -> None:
    seen = [metered.value("shmbroker_calls_total", client="caller") or 0.0 for _ in range(30)]
    wait_until(lambda: (metered.value("shmbroker_calls_total", client="caller") or 0.0) > seen[-1])
    assert caller.poll() is None
    assert stop_and_count(caller)["errors"] == 0


def test_a_killed_client_leaves_no_series(metered: Metered, caller: subprocess.Popen[bytes]) -> None:
    wait_until(lambda: metered.value("shmbroker_calls_total", client="caller") is not None)
    caller.kill()
    wait_until(lambda: metered.value("shmbroker_calls_total", client="caller") is None)
    wait_until(lambda: metered.value("shmbroker_arena_bytes", client="caller") is None)
    wait_until(lambda: (metered.value("shmbroker_reaped_objects_total") or 0) >= 2)
    assert metered.value("shmbroker_peers", role="client") == 0


@pytest.mark.parametrize("kind", ["ones", "random", "header"])
def test_a_client_that_writes_rubbish_harms_neither_broker_nor_top(metered: Metered, kind: str) -> None:
    with (
        shmbroker.connect(arena="1M", name="rubbish", channels=1024, depth=1) as client,
        shmbroker.connect(arena="1M", name="honest") as honest,
    ):
        client.channel("test")
        honest.channel("test")
        segment = client.segment
        wait_until(lambda: bool(read_figures(segment.name).channels))
        start, end = layout.offset_of(layout.SegmentHeader, "arena"), segment.geometry.channels_offset
        if kind == "header":
            segment.map[16:80] = os.urandom(64)
        else:
            segment.map[start:end] = b"\xff" * (end - start) if kind == "ones" else os.urandom(end - start)
        looked_at_safely(metered, spoilt=kind == "header")
        told = [sample for sample in metered.families()["shmbroker_calls"].samples if sample.labels["client"] == "rubbish"]
        assert len(told) == (0 if kind == "header" else MOST_OF_A_CLIENT)
        assert metered.value("shmbroker_calls_total", client="honest") == 0, "who claims a thousand channels hides nobody else's"


CLIENT = """
import signal, shmbroker
with shmbroker.connect(arena="1M", name="rubbish"):
    print("ready", flush=True)
    signal.pause()
"""


def test_a_segment_that_is_cut_short_harms_neither_broker_nor_top(metered: Metered) -> None:
    with running(sys.executable, "-c", CLIENT) as client, shmbroker.connect(arena="1M", name="honest") as honest:
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"
        freeze(client.pid)  # it could not live on without its memory
        try:
            for path in segment_paths(metered):
                if not path.endswith(honest.id):
                    os.truncate(path, layout.PAGE)
            looked_at_safely(metered, spoilt=True)
        finally:
            client.kill()


def looked_at_safely(metered: Metered, *, spoilt: bool) -> None:
    """Every way to look shows what is whole, and says what is not."""
    for _ in range(3):
        status, text = metered.get("/metrics")
        assert status == 200
        assert len(text) < 8 << 20
    assert metered.value("shmbroker_arena_bytes", client="honest") == 1 << 20
    assert metered.value("shmbroker_segments_unreadable") == spoilt
    for command in (("top", "--once", "--interval", "0.1"), ("top", "--json", "--interval", "0.1")):
        done = run(sys.executable, "-m", "shmbroker", *command)
        assert done.returncode == 0, done.stderr
        assert done.stdout.replace("\n", "").isprintable()
        assert "honest" in done.stdout
    mapped = run(sys.executable, "-m", "shmbroker", "map", "rubbish")
    if spoilt:
        assert mapped.returncode == 1
        assert re.search("^error: segment .* has a spoilt header", mapped.stderr)
    else:
        assert mapped.returncode == 0, mapped.stderr
        assert mapped.stdout.replace("\n", "").isprintable()
    assert metered.process.poll() is None


def test_resident_memory_stays_below_40_mib_under_scrapes(metered: Metered, caller: subprocess.Popen[bytes]) -> None:
    with shmbroker.connect(arena="1M", name="many", channels=1024, depth=1) as client:
        segment = client.segment
        start, end = segment.geometry.statistics_offset, segment.geometry.channels_offset
        for _ in range(10):
            segment.map[start:end] = b"\x41" * (end - start)
            assert metered.get("/metrics")[0] == 200
    maps = check_is_small_and_light(metered.process.pid)
    assert "/dev/shm/shmbroker" not in maps, "nothing of a client's is mapped"


def test_healthz_and_unknown_paths(metered: Metered) -> None:
    assert metered.get("/healthz") == (200, "ok\n")
    assert metered.get("/")[0] == 404
    assert metered.value("shmbroker_broker_info", version=shmbroker.__version__) == 1


def test_it_listens_on_loopback_only(metered: Metered) -> None:
    listening = [line.split() for line in Path(f"/proc/{metered.process.pid}/net/tcp").read_text().splitlines()[1:]]
    ours = [fields[1] for fields in listening if fields[3] == "0A" and fields[1].endswith(f":{metered.port:04X}")]
    assert ours == [f"0100007F:{metered.port:04X}"]


def test_a_taken_port_is_a_warning_and_the_broker_serves(metered_broker: MeteredBroker) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with metered_broker(port) as metered:
            assert f"no metrics: port {port}" in metered.environment["first_line"]
            with worker_process(), shmbroker.connect(arena="1M") as client:
                assert client.channel("test").ops


def test_who_says_nothing_keeps_nobody_waiting(metered: Metered) -> None:
    silent = [socket.create_connection(("127.0.0.1", metered.port)) for _ in range(3)]
    try:
        assert metered.get("/healthz")[0] == 200
    finally:
        for one in silent:
            one.close()


def test_every_metric_of_the_dashboard_is_in_a_scrape(metered: Metered, caller: subprocess.Popen[bytes]) -> None:
    wait_until(lambda: metered.value("shmbroker_calls_total", client="caller") is not None)
    there: dict[str, set[str]] = {}
    for family in metered.families().values():
        for sample in family.samples:
            there.setdefault(sample.name, set()).update(sample.labels)
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    assert len(queries) > 15
    for query in queries:
        asked = re.findall(r"shmbroker_\w+", query)
        assert asked, query
        for name in asked:
            assert name in there, query
            for labels in re.findall(rf"{name}\{{([^}}]*)\}}", query):
                assert set(re.findall(r"(\w+)\s*=~?", labels)) <= there[name], query
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            known = set().union(*(there[name] for name in re.findall(r"shmbroker_\w+", target["expr"])))
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= known, target
