"""``shmbroker top`` and ``shmbroker map``, as their user runs them."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import shmbroker
from shmbroker.arena.arena import Arena
from shmbroker.call.statistics import no_calls, published
from shmbroker.memory import layout
from shmbroker.monitoring.figures import quantile_ns, read_figures, upper_bound_ns
from tests.monitoring.conftest import Metered
from tests.processes import run, wait_until

COMMAND = (sys.executable, "-m", "shmbroker")


def top() -> dict[str, Any]:
    """The picture for programs."""
    done = run(*COMMAND, "top", "--json", "--interval", "0.5")
    assert done.returncode == 0, done.stderr
    picture: dict[str, Any] = json.loads(done.stdout)
    return picture


def test_top_tells_rates_and_times_of_a_client_under_load(metered: Metered, caller: subprocess.Popen[bytes]) -> None:
    wait_until(lambda: bool(top()["channels"]))
    picture = top()
    [channel] = picture["channels"]
    assert (channel["client"], channel["worker"], channel["service"], channel["lane"]) == ("caller", "test-worker", "test", "shm")
    assert channel["calls_per_second"] > 0
    assert channel["sent_bytes_per_second"] == pytest.approx(1024 * channel["calls_per_second"])
    assert 0 < channel["p50_us"] <= channel["p99_us"]
    [client] = picture["clients"]
    assert client["held_blocks"] >= 3
    assert set(client["ring"][0]) <= set("#+.")
    assert client["cpu_percent"] > 0
    assert [block["nbytes"] for block in client["oldest"]][:2] == [4 << 18, 4 << 16]
    [worker] = picture["workers"]
    assert worker["pid"] > 0
    assert picture["broker_cpu_percent"] is not None
    assert caller.poll() is None


def test_idle_seconds_count_from_the_last_change(metered: Metered) -> None:
    with shmbroker.connect(arena="1M", name="idler") as client:
        double = client.channel("test").bind("double", out_spec=lambda x: x)
        double(client.empty((4,)).fill_(1.0))

        def idle() -> tuple[float, float]:
            figures = read_figures(client.segment.name)
            return figures.arena.idle_seconds, figures.channels[0].idle_seconds

        wait_until(lambda: [one.calls for one in read_figures(client.segment.name).channels] == [1])
        before = time.monotonic()
        wait_until(lambda: min(idle()) > 0.5)
        double(client.empty((4,)).fill_(1.0))
        wait_until(lambda: max(idle()) < time.monotonic() - before)


def test_top_once_is_plain_text_where_there_is_no_terminal(metered: Metered, caller: subprocess.Popen[bytes]) -> None:
    done = run(*COMMAND, "top", "--once", "--interval", "0.2")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert re.search(r"^caller \(pid \d+, [\d.]+ % CPU\): arena ", done.stdout, re.MULTILINE)
    assert re.search(r"^[#+.]{64}$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("key", [b"q", b"\x03"], ids=["q", "ctrl-c"])
def test_top_lives_in_a_terminal_until_a_key(metered: Metered, key: bytes) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "top", "--interval", "0.2"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    shown = b""
    try:
        until = time.monotonic() + 60
        while shown.count(b"instance") < 3 and time.monotonic() < until:
            if select.select([ours], [], [], 1.0)[0]:
                shown += os.read(ours, 65536)
        os.write(ours, key)
        while time.monotonic() < until and process.poll() is None:
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    shown += os.read(ours, 65536)
                except OSError:
                    break
        assert process.wait(300) == 0, shown.decode()
        assert shown.count(b"instance") >= 3
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(ours)


def test_map_draws_text_and_svg(metered: Metered, caller: subprocess.Popen[bytes], tmp_path: Path) -> None:
    wait_until(lambda: bool(top()["channels"]))
    [client] = top()["clients"]
    for target in ("caller", client["id"], str(client["pid"]), client["segment"], client["segment"].lstrip("/")):
        done = run(*COMMAND, "map", target)
        assert done.returncode == 0, done.stderr
        assert re.search(
            rf"^made \d+ s ago for process {caller.pid} by process {metered.process.pid}, the broker$", done.stdout, re.MULTILINE
        )
        assert re.search(r"channel \d+: 'test' on worker [0-9a-f]{16}, shm/sem, \d+ calls", done.stdout)
        assert re.search(r"^ +\d+ +1048576  held for", done.stdout, re.MULTILINE)
    file = tmp_path / "map.svg"
    done = run(*COMMAND, "map", "caller", "--svg", str(file))
    assert done.returncode == 0, done.stderr
    drawn = ElementTree.fromstring(file.read_text())
    titles = [title.text or "" for title in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert any(title.startswith("1048576 bytes at") for title in titles)
    assert any("cursor at" in title for title in titles)


def test_map_says_what_there_is_when_it_finds_nothing(metered: Metered) -> None:
    with shmbroker.connect(arena="1M", name="here"):
        done = run(*COMMAND, "map", "nobody")
        assert done.returncode == 1
        assert re.fullmatch(r"error: no client is called 'nobody'; there are: here \([0-9a-f]{16}\); or give .*\n", done.stderr)
        with shmbroker.connect(arena="1M", name="here"):
            done = run(*COMMAND, "map", "here")
            assert done.returncode == 1
            assert "2 clients are called 'here'" in done.stderr
    gone = run(*COMMAND, "map", "/shmbroker.x.segment.0123456789abcdef")
    assert gone.returncode == 1
    assert "cannot be opened (No such file or directory)" in gone.stderr


def test_the_picture_is_true_to_the_blocks(metered: Metered) -> None:
    with shmbroker.connect(arena="1M", name="blocks") as client:
        kept = [client.empty((1 << 10,)) for _ in range(100)]
        del kept[::2]

        def told() -> list[int]:
            return [block.offset for block in read_figures(client.segment.name).arena.blocks]

        held = sorted(client.arena.find(tensor).offset for tensor in kept)  # type: ignore[union-attr]
        wait_until(lambda: told() == held)
        arena = read_figures(client.segment.name).arena
        assert (arena.held_blocks, arena.held_bytes) == (50, 50 << 12)
        kept += [client.empty((1 << 8,)) for _ in range(100)]
        wait_until(lambda: read_figures(client.segment.name).arena.held_blocks == 150)
        arena = read_figures(client.segment.name).arena
        assert len(arena.blocks) == layout.PICTURED_BLOCKS
        assert arena.held_bytes == (50 << 12) + (100 << 10)
        picture: Arena = client.arena
        before = picture.occupancy().placed
        assert read_figures(client.segment.name).arena.placed_blocks == before


def test_buckets_and_quantiles() -> None:
    for nanoseconds in (0, 1, 700, 724, 1000, 1024, 6_600, 10**9, 1 << 40, 1 << 50):
        histogram = no_calls()
        histogram[(nanoseconds * nanoseconds).bit_length()] += 1
        told = published(histogram)
        assert len(told) == layout.BUCKETS
        assert sum(told) == 1
        bucket = told.index(1)
        assert nanoseconds <= upper_bound_ns(bucket)
        assert bucket == 0 or nanoseconds >= upper_bound_ns(bucket - 1) * (1 - 1e-9)
    assert quantile_ns([0] * layout.BUCKETS, 0.5) == 0
    histogram = no_calls()
    for nanoseconds in range(10_000, 20_000):
        histogram[(nanoseconds * nanoseconds).bit_length()] += 1
    assert 15_000 / 1.42 < quantile_ns(published(histogram), 0.5) < 15_000 * 1.42
    assert 19_900 / 1.42 < quantile_ns(published(histogram), 0.99) < 19_900 * 1.42
