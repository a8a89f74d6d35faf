"""Traces of two real processes: what they tell, that they fit together, and that they can be read whatever ends their writer."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

import shmbroker
from shmbroker.call.queue_pair import QueuePair
from shmbroker.client.channel import Channel
from shmbroker.errors import BadInput, RemoteOpError, WorkerLost
from shmbroker.trace import reader
from tests.processes import run, wait_until, worker_process

SECRET, SECRET_ARGUMENT = 31337.25, 8675309.5
LANES = [("shm", "sem"), ("zmq", "auto")]


def events(path: Path) -> list[dict[str, Any]]:
    """By Python's own reader of JSON, not ours."""
    whole = json.loads(path.read_text())
    assert isinstance(whole, list)
    return whole


def traced_calls(tmp_path: Path, service: str, lane: str, doorbell: str) -> tuple[Path, Path]:
    """Some calls between two processes with traces; the two files, after both have ended."""
    mine, its = tmp_path / "client.json", tmp_path / "worker.json"
    with worker_process(service, TRACE=str(its)) as worker:
        with shmbroker.connect(arena="16M", trace=mine) as client:
            channel = client.channel(service, lane=lane, doorbell=doorbell)
            scale, add = channel.bind("scale", factor=2.0), channel.bind("add")
            sleep = channel.bind("sleep", seconds=0.05)
            outside = torch.full((40, 50), SECRET)
            assert torch.equal(scale(outside), outside * 2)
            add(client.copy_in(outside), term=SECRET_ARGUMENT)
            futures = [sleep.submit(client.copy_in(outside)) for _ in range(4)]
            for future in futures:
                future.result(300)
            captured = scale.capture(outside)
            captured.replay()
            called = channel.report().total.calls
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(300) == 0
    assert called == 7
    return mine, its


@pytest.fixture(params=LANES, ids=["shm", "zmq"])
def pair(request: pytest.FixtureRequest, broker: shmbroker.LocalBroker, tmp_path: Path) -> tuple[Path, Path]:
    return traced_calls(tmp_path, f"traced-{request.param[0]}", *request.param)


def test_spans_nest_flows_pair_up_and_pipelined_calls_overlap(pair: tuple[Path, Path]) -> None:
    mine, its = map(events, pair)
    assert {event["pid"] for event in mine} == {os.getpid()}
    assert {event["pid"] for event in its} - {os.getpid()}
    for names, whose in (
        (("place", "copy", "submit", "wait", "complete"), mine),
        (("run", "compute"), its),
    ):
        spans = [event["name"] for event in whose if event["ph"] == "X"]
        for name in names:
            assert any(span.startswith(f"{name} ") for span in spans), (name, spans)
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for event in (*mine, *its):
        if event["ph"] == "X":
            tracks[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert len(tracks) >= 2
    for spans in tracks.values():
        check_nesting(spans)
    check_flows(mine, its)
    begun = {event["id"]: event for event in mine if event["ph"] == "b"}
    ended = {event["id"]: event["ts"] for event in mine if event["ph"] == "e"}
    assert len(begun) == len(ended) == 7
    sleeps = [(event["ts"], ended[number]) for number, event in begun.items() if event["name"] == "sleep"]
    assert max(start for start, _ in sleeps) < min(end for _, end in sleeps), "all four were on their way at once"
    queued = {event["id"]: event["ts"] for event in its if event["ph"] == "b"}
    taken = {event["id"]: event["ts"] for event in its if event["ph"] == "e"}
    waits = sorted(taken[number] - queued[number] for number, event in begun.items() if event["name"] == "sleep")
    assert waits[-1] > 100_000, "the last one waited at the worker for three others, of 50 ms each"
    assert begun[next(iter(begun))]["args"]["inputs"] == ["float32[40, 50]"]


def check_nesting(spans: list[tuple[float, float]]) -> None:
    """Any two lie apart, or one in the other; to the nanosecond that a float of microseconds can tell."""
    open_until: list[float] = []
    for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        while open_until and open_until[-1] <= start + 0.002:
            open_until.pop()
        assert not open_until or end <= open_until[-1] + 0.002
        open_until.append(end)


def check_flows(mine: list[dict[str, Any]], its: list[dict[str, Any]]) -> None:
    def steps(of: list[dict[str, Any]], step: str) -> dict[str, dict[str, Any]]:
        found = [event for event in of if event["ph"] == step]
        assert len({event["id"] for event in found}) == len(found)
        return {event["id"]: event for event in found}

    starts, middles, ends = steps(mine, "s"), steps(its, "t"), steps(mine, "f")
    assert len(starts) == 7
    assert set(starts) == set(middles) == set(ends)
    for number, start in starts.items():
        assert start["ts"] <= middles[number]["ts"] <= ends[number]["ts"]
    # Each point lies in a span of its thread, or the arrow would hang in the air.
    for event in (*starts.values(), *middles.values(), *ends.values()):
        around = [
            span
            for span in (*mine, *its)
            if span["ph"] == "X"
            and (span["pid"], span["tid"]) == (event["pid"], event["tid"])
            and span["ts"] - 0.002 <= event["ts"] <= span["ts"] + span["dur"] + 0.002
        ]
        assert around, event


TOLD = {
    "name", "call", "worker", "client", "lane", "status", "failed", "inputs", "outputs", "bytes", "sent_bytes", "received_bytes", "queued_us", "compute_us",
}  # fmt: skip


def test_no_value_is_told(pair: tuple[Path, Path]) -> None:
    for path in pair:
        assert path.stat().st_mode & 0o077 == 0
        for event in events(path):
            details = event.get("args", {})
            assert set(details) <= TOLD, "whatever is new here must tell no values"
            assert not {SECRET, 2 * SECRET, SECRET_ARGUMENT, 2.0} & {value for value in details.values() if isinstance(value, float)}
            for spec in (*details.get("inputs", ()), *details.get("outputs", ())):
                assert re.fullmatch(r"float32\[[\d, ]*\]", spec), spec


def test_merging_gives_one_file_in_order_of_time(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "both.json"
    done = run(sys.executable, "-m", "shmbroker", "trace", "merge", str(out), *map(str, pair))
    assert done.returncode == 0, done.stderr
    assert out.stat().st_mode & 0o777 == 0o600, "as the traces are"
    whole = events(out)
    assert len(whole) == sum(len(events(path)) for path in pair)
    times = [event.get("ts", 0.0) for event in whole]
    assert times == sorted(times)


def test_merging_over_an_earlier_result_closes_it_to_others_and_leaves_nothing_beside_it(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "both.json"
    out.write_text("earlier")
    out.chmod(0o644)
    assert reader.merge(out, pair) == len(events(out))
    assert out.stat().st_mode & 0o777 == 0o600
    assert not list(tmp_path.glob(".*"))


def test_a_result_that_is_one_of_the_traces_is_refused_and_the_trace_stays(pair: tuple[Path, Path], tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_bytes(pair[0].read_bytes())
    with pytest.raises(BadInput, match="is one of the traces to be merged: name another file for the result, first"):
        reader.merge(mine, [pair[1], mine])
    assert mine.read_bytes() == pair[0].read_bytes()


def test_a_result_that_cannot_be_written_takes_no_earlier_one(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "both.json"
    out.write_text("earlier")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(BadInput, match="No space left on device; what was there is as it was"):
        reader.merge(out, pair)
    assert out.read_text() == "earlier"
    assert not list(tmp_path.glob(".*"))


def test_after_kill_9_the_file_is_there_and_valid(broker: shmbroker.LocalBroker, tmp_path: Path) -> None:
    mine, its = tmp_path / "client.json", tmp_path / "worker.json"
    with worker_process("killed", TRACE=str(its)) as worker, shmbroker.connect(arena="16M", trace=mine) as client:
        scale = client.channel("killed").bind("scale", factor=2.0)
        x = torch.ones(8)
        for _ in range(200):
            scale(x)
        wait_until(lambda: its.read_text().count('"run scale"') == 200)
        scale(x)
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait(300)
        assert len([event for event in events(its) if event["name"] == "run scale"]) >= 200
        with pytest.raises(WorkerLost):
            scale(x)
    assert events(mine)
    # Cut as a machine that loses power would: still read, but for the last line.
    cut = tmp_path / "cut.json"
    cut.write_bytes(its.read_bytes()[:-40])
    assert len(events(its)) - 2 <= len(reader.read(cut)) < len(events(its))


def test_failed_calls_are_told_as_such(broker: shmbroker.LocalBroker, tmp_path: Path) -> None:
    mine, its = tmp_path / "client.json", tmp_path / "worker.json"
    with worker_process("failing", TRACE=str(its)), shmbroker.connect(arena="16M", trace=mine) as client:
        split = client.channel("failing").bind("scale", factor=2.0)
        with pytest.raises(RemoteOpError):
            split(torch.ones(4, dtype=torch.int32))
    assert [event["args"]["failed"] for event in events(mine) if event["ph"] == "e"] == [True]
    assert [event["args"]["status"] for event in events(its) if event["name"] == "run scale"] == ["op_error"]


def test_a_traced_worker_tells_of_every_call_also_where_its_client_has_no_trace(broker: shmbroker.LocalBroker, tmp_path: Path) -> None:
    its = tmp_path / "worker.json"
    with worker_process("traced-alone", TRACE=str(its)) as worker:
        with shmbroker.connect(arena="16M") as client:
            op, x = client.channel("traced-alone").bind("scale", factor=2.0), client.copy_in(torch.ones(4))
            for _ in range(30):
                op(x)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(300) == 0
    assert [event["name"] for event in events(its)].count("run scale") == 30


def test_without_a_trace_nothing_is_in_the_way(channel: Channel) -> None:
    assert type(channel.pair) is QueuePair


@pytest.mark.parametrize("place", ["/nowhere/at/all.json", "."])
def test_a_file_that_cannot_be_written_is_refused(broker: shmbroker.LocalBroker, place: str) -> None:
    with pytest.raises(BadInput, match="--trace"):
        shmbroker.connect(arena="1M", trace=place)


def test_a_file_that_another_writes_is_refused(broker: shmbroker.LocalBroker, tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    with shmbroker.connect(arena="1M", trace=path), pytest.raises(BadInput, match="another trace"):
        shmbroker.connect(arena="1M", trace=path)
    assert events(path)[0]["args"]["name"].startswith("client ")


@pytest.mark.parametrize("text", ["", "hello\n", '[\n{"ph": "X"}\nhello\n{"ph": "X"}\n]\n'])
def test_what_is_no_trace_is_not_merged(tmp_path: Path, text: str) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text(text)
    done = run(sys.executable, "-m", "shmbroker", "trace", "merge", str(tmp_path / "out.json"), str(bad))
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out.json").exists()
