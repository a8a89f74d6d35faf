"""``tee-worker ray`` on a cluster of two nodes: real Ray, real SIGKILL, one fleet for all of this file."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.cycling_model import expected
from tests.faults.fleet import kill_at_random
from tests.fleet import Fleet, end_of, events_of, stream, text_of
from tests.processes import running, wait_until

pytestmark = pytest.mark.ray

LONG = 400
"""Tokens of a stream that is to be disturbed."""

KILLS = 4
SEED = 7


def both_whole(fleet: Fleet) -> dict[str, tuple[int, int]]:
    """The replicas, once both are there and requests go to both."""
    wait_until(lambda: len(fleet.whole()) == 2 and len(fleet.answering()) == 2)
    return fleet.whole()


def test_requests_through_ray_and_directly_give_the_same(fleet: Fleet, cycling: Path) -> None:
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("completions", {"prompt": "Once upon", "max_tokens": 30, "temperature": 0}),
        ("completions", {"prompt": ["ab", "xy"], "max_tokens": 9, "temperature": 0, "n": 2, "echo": True}),
        ("completions", {"prompt": "seeded", "max_tokens": 20, "temperature": 2.0, "seed": 5}),
        ("chat/completions", {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 30, "temperature": 0, "stop": "a"}),
        ("responses", {"input": "Why?", "max_output_tokens": 12, "temperature": 0}),
    ]
    command = [sys.executable, "-m", "tee_worker", "serve", "--local", "--model", str(cycling), "--port", "0", "--threads", "1"]
    with running(*command) as direct:
        assert direct.stdout is not None
        url = direct.stdout.readline().decode().split()[1]
        for path, body in bodies:
            for streamed in (False, True):
                whole = {**body, "stream": streamed}
                mine = fleet.post(path, whole)
                own = requests.post(f"{url}/{path}", json=whole, timeout=300)
                assert mine.status_code == own.status_code == 200, mine.text
                assert told(mine) == told(own)
        refused = {"prompt": "x", "best_of": 3}
        mine, own = fleet.post("completions", refused), requests.post(f"{url}/completions", json=refused, timeout=300)
        assert (mine.status_code, mine.json()) == (own.status_code, own.json())


def told(response: requests.Response) -> list[str]:
    """All texts in an answer, of choices in their order."""
    if response.headers["content-type"].startswith("text/event-stream"):
        found: Counter[int] = Counter()
        texts: dict[int, str] = {}
        for event in events_of(response):
            for choice in event.get("choices", []):
                texts[choice["index"]] = texts.get(choice["index"], "") + (
                    choice.get("text") or choice.get("delta", {}).get("content") or ""
                )
                found[choice["index"]] += 1
            if event.get("type") == "response.output_text.delta":
                texts[0] = texts.get(0, "") + event["delta"]
        return [texts[index] for index in sorted(texts)]
    body = response.json()
    if "output" in body:
        return [body["output"][0]["content"][0]["text"]]
    return [choice.get("text") or choice["message"]["content"] for choice in body["choices"]]


def calls_of(fleet: Fleet) -> dict[str, int]:
    """Processor ticks of each replica's GPU worker: what it has computed."""
    ticks = {}
    for instance, (_, worker) in both_whole(fleet).items():
        fields = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()
        ticks[instance] = int(fields[11]) + int(fields[12])
    return ticks


@pytest.mark.parametrize("clients", [8, 1], ids=["together", "one-after-the-other"])
def test_every_replica_has_its_share(fleet: Fleet, clients: int) -> None:
    """Told by the processor time of the GPU workers, which is of the tokens that they computed."""
    text_of(fleet, "warm", 5)
    before = calls_of(fleet)
    with ThreadPoolExecutor(clients) as pool:
        texts = list(pool.map(lambda number: text_of(fleet, f"{number}", 100), range(8)))
    assert texts == [expected(f"{number}", 100) for number in range(8)]
    after = calls_of(fleet)
    shares = [after[instance] - before[instance] for instance in before]
    assert min(shares) >= 0.3 * sum(shares), shares


def test_the_added_time_to_the_first_token(fleet: Fleet, cycling: Path) -> None:
    """Printed, not asserted: of a quiet machine only."""
    command = [sys.executable, "-m", "tee_worker", "serve", "--local", "--model", str(cycling), "--port", "0", "--threads", "1"]
    with running(*command) as direct:
        assert direct.stdout is not None
        alone = Fleet(direct, direct.stdout.readline().decode().split()[1], fleet.runtime)
        times: dict[str, list[float]] = {"through Ray": [], "directly": []}
        for turn in range(30):
            for name, one in (("through Ray", fleet), ("directly", alone)):
                begun = time.perf_counter()
                with contextlib.closing(stream(one, f"{turn}", 3)) as pieces:
                    next(pieces)
                    times[name].append(time.perf_counter() - begun)
                    list(pieces)
    medians = {name: 1e3 * statistics.median(found) for name, found in times.items()}
    print(", ".join(f"{name} {value:.1f} ms" for name, value in medians.items()), "to the first token")


def test_nothing_listens_beyond_loopback(fleet: Fleet) -> None:
    inodes: dict[str, str] = {}
    for file in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{file}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                inodes[fields[9]] = fields[1]
    found: dict[str, str] = {}
    for pid, command in fleet.processes().items():
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inode = os.readlink(link).removeprefix("socket:[").removesuffix("]")
                    if inode in inodes:
                        found[inodes[inode]] = command
    assert found
    loopback = ("0100007F:", "0000000000000000FFFF00000100007F:", "00000000000000000000000001000000:")
    assert not {address: command for address, command in found.items() if not address.startswith(loopback)}


def test_a_stream_whose_gpu_worker_is_killed_keeps_its_text_and_its_replica(fleet: Fleet) -> None:
    """Health says nothing while another worker is started: the same replica is there afterwards."""
    before = both_whole(fleet)
    streams = [stream(fleet, letter, LONG) for letter in "ab"]
    begun = [next(one) for one in streams]
    for _, worker in before.values():
        os.kill(worker, signal.SIGKILL)
    assert [first + "".join(rest) for first, rest in zip(begun, streams, strict=True)] == [expected(letter, LONG) for letter in "ab"]
    after = both_whole(fleet)
    assert {replica for replica, _ in after.values()} == {replica for replica, _ in before.values()}
    assert not {worker for _, worker in after.values()} & {worker for _, worker in before.values()}


def kill_a_replica(fleet: Fleet) -> None:
    os.kill(next(iter(fleet.whole().values()))[0], signal.SIGKILL)


def test_a_greedy_stream_whose_replica_is_killed_goes_on_at_another_with_the_same_text(fleet: Fleet) -> None:
    both_whole(fleet)
    resumed = fleet.counted("resumed")
    streams = [stream(fleet, letter, LONG) for letter in "cdef"]  # some at each replica
    begun = [next(one) for one in streams]
    kill_a_replica(fleet)
    assert [first + "".join(rest) for first, rest in zip(begun, streams, strict=True)] == [expected(letter, LONG) for letter in "cdef"]
    assert fleet.counted("resumed") > resumed


def test_a_sampled_stream_whose_replica_is_killed_ends_with_an_error_object(fleet: Fleet) -> None:
    both_whole(fleet)
    streams = [stream(fleet, letter, LONG, temperature=1.0) for letter in "cdef"]
    for one in streams:
        next(one)
    kill_a_replica(fleet)
    errors = [error for _, error in map(end_of, streams) if error]
    assert 0 < len(errors) < len(streams)
    assert all("ask again" in error for error in errors)


def test_whole_answers_are_asked_anew_when_their_replica_is_killed(fleet: Fleet) -> None:
    both_whole(fleet)
    with ThreadPoolExecutor(4) as pool:
        body = {"prompt": "g", "max_tokens": LONG, "temperature": 0}
        answers = [pool.submit(fleet.post, "completions", body) for _ in range(4)]
        streams = [stream(fleet, letter, LONG) for letter in "hi"]  # once they are under way, the others are
        begun = [next(one) for one in streams]
        kill_a_replica(fleet)
        assert [one.result().json()["choices"][0]["text"] for one in answers] == [expected("g", LONG)] * 4
        assert [first + "".join(rest) for first, rest in zip(begun, streams, strict=True)] == [expected(letter, LONG) for letter in "hi"]


def test_a_client_that_hangs_up_ends_its_generation(fleet: Fleet) -> None:
    both_whole(fleet)

    def calls() -> int:
        return sum(channel.calls for channel in fleet.channels())

    def calls_in_the_end() -> int:
        """Once no more come: what a client tells of its calls is some seconds old."""
        seen = [calls()]

        def at_rest() -> bool:
            time.sleep(2)
            seen.append(calls())
            return len(seen) > 3 and len(set(seen[-4:])) == 1

        wait_until(at_rest)
        return seen[-1]

    before = calls_in_the_end()
    assert text_of(fleet, "j", LONG) == expected("j", LONG)
    whole = calls_in_the_end()
    pieces = stream(fleet, "j", LONG)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert calls_in_the_end() - whole < whole - before


def test_kills_at_random_leave_no_request_without_an_answer_or_a_clear_error(fleet: Fleet) -> None:
    """``make fleet-kills`` does more of them."""
    both_whole(fleet)
    outcomes = kill_at_random(fleet, KILLS, SEED)
    assert outcomes["answer"] > outcomes["error"]
    assert text_of(fleet, "z", 20) == expected("z", 20)


def test_ctrl_c_leaves_no_process_and_nothing_in_memory(fleet: Fleet) -> None:
    assert len(fleet.processes()) > 10
    assert fleet.end() in (0, 130)
    wait_until(lambda: not fleet.processes())
    assert not fleet.left()


def test_a_model_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tee_worker", "ray", "--model", str(tmp_path / "none"), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "none" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--trust", "verify", "--split", "fused"], "needs --model-digest"),
        (["--trust", "verify", "--split", "layer", "--model-digest", "d"], "split 'layer' is not possible"),
        (["--split", "none"], "split"),
        (["--dtype", "none"], "dtype"),
    ],
)
def test_what_no_replica_could_be_started_with_is_told_before_a_cluster_is(cycling: Path, options: list[str], told: str) -> None:
    command = [sys.executable, "-m", "tee_worker", "ray", "--model", str(cycling), "--port", "0", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert told in done.stderr


def test_an_address_where_no_cluster_listens_is_told_at_once(cycling: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        command = [sys.executable, "-m", "tee_worker", "ray", "--model", str(cycling), "--port", "0", "--address", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert f"no Ray cluster answers at {address}: Connection refused" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_address_beyond_loopback_is_refused_before_it_is_reached(cycling: Path) -> None:
    command = [sys.executable, "-m", "tee_worker", "ray", "--model", str(cycling), "--port", "0", "--address", "192.0.2.1:6379"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "RAY_USE_TLS": "1"})
    assert done.returncode == 1
    assert done.stderr.startswith("error: this cluster is not on loopback and lacks token authentication (RAY_AUTH_MODE=token)")
