"""``--local``: a broker and a GPU worker of a run's own, which end with it however it ends."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmbroker.memory.reaper import objects, reap
from tests.processes import run, running, wait_until
from tests.tee_worker.test_serve import Server, ask_chat, chat_prompt, expected, serving


@pytest.fixture(autouse=True)
def _no_broker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """None runs where these commands look."""
    monkeypatch.setenv("SHMBROKER_INSTANCE", "nobody")
    monkeypatch.setenv("SHMBROKER_RUNTIME_DIR", str(tmp_path))


def environment_of(pid: int) -> dict[str, str]:
    words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


def children(pid: int) -> Iterator[int]:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                yield int(entry.name)
        except (OSError, IndexError):
            continue


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_generate_starts_what_it_needs_and_leaves_nothing(talking: Path) -> None:
    before = set(objects(None))
    options = ["--model", str(talking), "--prompt", "Why is the sky blue?", "--chat", "--max-new-tokens", "8"]
    done = run(sys.executable, "-m", "tee_worker", "generate", "--local", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected(talking, chat_prompt("Why is the sky blue?"), 8) + "\n"
    assert "starting a broker and a GPU worker" in done.stderr
    assert "equal to what was counted" in done.stderr
    assert not [name for name in set(objects(None)) - before if name.instance == "nobody"]


def test_a_worker_that_does_not_start_is_told_at_once(talking: Path) -> None:
    options = ["--model", str(talking), "--prompt", "x", "--max-new-tokens", "2"]
    done = run(sys.executable, "-m", "tee_worker", "generate", "--local", "--quiet", *options, SHMBROKER_DEVICE="tpu")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "error: device 'tpu' is not known; there are: cpu, cuda, cuda:N",
        "error: the GPU worker of this run ended with status 1; its own words are above",
    ]


@pytest.mark.parametrize("command", ["generate", "prefill", "serve"])
def test_a_broker_of_its_own_and_one_that_is_named_are_refused_together(talking: Path, command: str) -> None:
    prompt = ["--prompt", "x"] if command == "generate" else []
    done = run(sys.executable, "-m", "tee_worker", command, "--model", str(talking), *prompt, "--local", "--instance", "other")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == ("error: --local starts a broker of its own, and --instance other names another: leave one of them out\n")


@pytest.fixture
def server(talking: Path) -> Iterator[Server]:
    with serving(talking, "own", "--local", "--failover", "0") as server:
        yield server


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_serve_starts_what_it_needs_which_ends_with_it(talking: Path, server: Server, number: signal.Signals) -> None:
    assert ask_chat(server, "x") == expected(talking, chat_prompt("x"))
    broker_and_worker = list(children(server.process.pid))
    [instance] = {environment_of(pid)["SHMBROKER_INSTANCE"] for pid in broker_and_worker}
    assert instance.startswith(f"local-{server.process.pid}-")
    assert len(broker_and_worker) == 2
    server.process.send_signal(number)
    assert server.process.wait(300) == (-number if number is signal.SIGKILL else 0)
    wait_until(lambda: not any(map(lives, broker_and_worker)))
    if number is signal.SIGKILL:
        reap(instance)
    assert not list(objects(instance))


@pytest.mark.parametrize("tokens", ["180", "2"], ids=["amid its text", "while it gives back what it made"])
def test_generate_that_is_ended_leaves_nothing(talking: Path, tokens: str) -> None:
    options = ["--model", str(talking), "--prompt", "x", "--max-new-tokens", tokens, "--split", "linear", "--local"]
    with running(sys.executable, "-m", "tee_worker", "generate", *options) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert os.read(process.stdout.fileno(), 1), process.stderr.read().decode()
        begun = list(children(process.pid))
        instance = environment_of(begun[0])["SHMBROKER_INSTANCE"]
        process.send_signal(signal.SIGTERM)
        assert process.wait() in (128 + signal.SIGTERM, 0), "0: it was done before the signal came"
        wait_until(lambda: not any(map(lives, begun)))
    assert not list(objects(instance))
