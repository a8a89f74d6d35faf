"""The units under a real systemd: readiness, crashes, hangs, restarts, and what is left at the end."""

from __future__ import annotations

import json
import re
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from shmbroker.systemd.units import install, texts
from tee_worker.cli import cli as tee_worker_cli
from tests.processes import START_SECONDS, run, wait_until
from tests.systemd.machine import ROOT, Machine, machine
from tests.tiny_models import SIZES, save_random, tiny_llama

BROKER, GPU = "shmbroker.service", "gpu-worker@tiny.service"
METRICS = "shmbroker-metrics.socket"
ONCE, LONG, SERVED = "tee-worker@once.service", "tee-worker@long.service", "tee-worker@served.service"
PROMPT = "w5 w6 w7 w8"
TOKENS, LONG_TOKENS = 12, 400

ALL = f"""[Service]
Environment=PYTHONPATH={ROOT} OMP_NUM_THREADS=1
StandardOutput=append:/run/log/%n.log
StandardError=append:/run/log/%n.err
"""

GENERATION = """[Unit]
After=gpu-worker@tiny.service

[Service]
Type=oneshot
Restart=no
WatchdogSec=0
ExecStart=
ExecStart={tee_worker} generate --model /srv/tiny --prompt "{prompt}" --split op --max-new-tokens {tokens}
"""
"""Of the TEE worker's unit all but the command: one generation, under its user and in its sandbox."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has words."""
    folder = save_random(tiny_llama(max_position_embeddings=1024), tmp_path_factory.mktemp("served"))
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(SIZES["vocab_size"])}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[int]:
    """What the model generates in one process."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    ids = torch.tensor([[int(word[1:]) for word in PROMPT.split()]])
    return model.generate(ids, max_new_tokens=LONG_TOKENS, do_sample=False)[0, ids.shape[1] :].tolist()


def drop_in(units: Path, unit: str, text: str) -> None:
    folder = units / f"{unit}.d"
    folder.mkdir(exist_ok=True)
    (folder / f"test-{unit}.conf").write_text(text)  # of two with one name one would be hidden


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Machine]:
    """A machine on which the units were installed, and nothing started yet."""
    folder = tmp_path_factory.mktemp("systemd")
    units = folder / "units"
    made = texts()
    install(made, units, units)
    drop_in(units, "service", ALL)
    for unit in (BROKER, GPU, SERVED):
        drop_in(units, unit, "[Service]\nWatchdogSec=6\n")
    (tee_worker,) = [
        line.partition("=")[2].split()[0] for line in made["tee-worker@.service"].splitlines() if line.startswith("ExecStart=")
    ]
    for unit, tokens in ((ONCE, TOKENS), (LONG, LONG_TOKENS)):
        drop_in(units, unit, GENERATION.format(tee_worker=tee_worker, prompt=PROMPT, tokens=tokens))
    with socket.create_server(("127.0.0.1", 0)) as free:
        drop_in(
            units,
            METRICS,
            f"[Socket]\nListenStream=\nListenStream=127.0.0.1:{free.getsockname()[1]}\nListenStream=/run/shmbroker-metrics.sock\n",
        )
    wants = units / "shmbroker.target.wants"
    wants.mkdir()
    (wants / GPU).symlink_to("../gpu-worker@.service")
    with machine(folder, units) as found:
        done = found.run("systemd-sysusers", "/run/units/shmbroker-users.conf")
        assert done.returncode == 0, done.stderr
        done = found.run("cp", "-r", str(tiny), "/srv/tiny")
        assert done.returncode == 0, done.stderr
        found.run("chmod", "-R", "a+rX", "/srv/tiny")
        found.run("mkdir", "-p", "/etc/shmbroker")
        found.path("/etc/shmbroker/tiny.env").write_text("GPU_WORKER_ARGS=--model /srv/tiny --device cpu\n")
        yield found


@pytest.fixture
def running(booted: Machine) -> Machine:
    """The same with the target started: when that is done, so is the loading of the weights."""
    booted.systemctl("start", "shmbroker.target")
    assert booted.show(GPU, "ActiveState") == "active", booted.logs()
    return booted


def generated(running: Machine) -> list[int]:
    """Tokens of one generation."""
    begin(running, ONCE)
    wait_until(lambda: running.show(ONCE, "ActiveState") != "activating")
    return tokens_of(running, ONCE)


def begin(running: Machine, unit: str) -> None:
    running.path(f"/run/log/{unit}.log").unlink(missing_ok=True)
    running.systemctl("start", "--no-block", unit)


def tokens_of(running: Machine, unit: str) -> list[int]:
    """The tokens that were streamed so far."""
    text = running.said(unit).partition("\n\n")[0]
    return [int(word[1:]) for word in text.split()]


def half_way(running: Machine) -> None:
    """Start the long generation, and stop it where it is when it has begun."""
    begin(running, LONG)
    wait_until(lambda: len(tokens_of(running, LONG)) > 10)
    running.signal(LONG, "STOP")
    assert running.show(LONG, "ActiveState") == "activating", "over already"


def restarted(running: Machine, unit: str, pid: int) -> None:
    """Wait until the unit is active with another process."""

    def back() -> bool:
        return running.show(unit, "ActiveState") == "active" and running.main_pid(unit) not in (0, pid)

    wait_until(back)


def test_ready_means_ready_and_each_role_runs_as_its_own_user(running: Machine, expected: list[int]) -> None:
    assert generated(running) == expected[:TOKENS]
    assert "service 'gpu' on cpu" in running.show(GPU, "StatusText")
    assert "instance default on ipc:///run/shmbroker/default.sock" in running.show(BROKER, "StatusText")
    users = {unit: running.run("stat", "-c", "%U %G", f"/proc/{running.main_pid(unit)}").stdout.split() for unit in (BROKER, GPU)}
    assert users == {BROKER: ["shmbroker", "shmbroker"], GPU: ["shmbroker-gpu", "shmbroker"]}
    assert running.show(ONCE, "User") == "shmbroker-tee"
    assert running.run("stat", "-c", "%a %U %G", "/run/shmbroker").stdout.split() == ["3770", "shmbroker", "shmbroker"]


@pytest.mark.parametrize("unit", [BROKER, GPU])
def test_what_is_killed_comes_back_and_generation_goes_on(running: Machine, expected: list[int], unit: str) -> None:
    other = GPU if unit == BROKER else BROKER
    pid, others_pid = running.main_pid(unit), running.main_pid(other)
    running.signal(unit, "KILL")
    restarted(running, unit, pid)
    assert running.main_pid(other) == others_pid
    assert generated(running) == expected[:TOKENS]


@pytest.mark.parametrize("unit", [BROKER, GPU])
def test_what_hangs_is_ended_by_the_watchdog_and_comes_back(running: Machine, expected: list[int], unit: str) -> None:
    other = GPU if unit == BROKER else BROKER
    pid, others_pid = running.main_pid(unit), running.main_pid(other)
    before = int(running.show(unit, "NRestarts"))
    running.signal(unit, "STOP")
    restarted(running, unit, pid)
    assert int(running.show(unit, "NRestarts")) == before + 1
    assert "Fatal Python error: Aborted" in running.complained(unit), "the journal tells where it hung"
    assert running.main_pid(other) == others_pid
    assert generated(running) == expected[:TOKENS]


def test_a_generation_outlives_a_restart_of_the_broker_and_a_kill_of_its_gpu_worker(running: Machine, expected: list[int]) -> None:
    gpu_pid, broker_pid = running.main_pid(GPU), running.main_pid(BROKER)
    half_way(running)
    running.systemctl("restart", BROKER)
    assert running.main_pid(BROKER) not in (0, broker_pid)
    running.signal(LONG, "CONT")
    had = len(tokens_of(running, LONG))
    wait_until(lambda: len(tokens_of(running, LONG)) > had + 10)
    running.signal(LONG, "STOP")
    assert running.show(LONG, "ActiveState") == "activating", "over already"
    assert running.main_pid(GPU) == gpu_pid, "a restart of the broker takes no worker with it"
    running.signal(GPU, "KILL")
    running.signal(LONG, "CONT")
    wait_until(lambda: running.show(LONG, "ActiveState") in ("inactive", "failed"))
    assert running.show(LONG, "Result") == "success", running.logs()
    assert running.main_pid(GPU) not in (0, gpu_pid)
    assert tokens_of(running, LONG) == expected


def test_a_killed_tee_worker_leaves_nothing(running: Machine) -> None:
    wait_until(lambda: len(running.shared_memory()) == 1)
    held = running.shared_memory()
    half_way(running)
    assert len(running.shared_memory()) == 3, "its segment and its doorbell"
    running.signal(LONG, "KILL")
    wait_until(lambda: running.show(LONG, "ActiveState") == "failed")
    wait_until(lambda: running.shared_memory() == held)


@pytest.mark.skipif("serve" not in tee_worker_cli.commands, reason="this tee-worker has no command 'serve'")
def test_the_endpoint_is_ready_when_started_and_comes_back_when_killed_or_hung(running: Machine, expected: list[int]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    running.path("/etc/shmbroker/served.env").write_text(f"TEE_WORKER_ARGS=--model /srv/tiny --split op --port {port}\n")

    def answer() -> list[int]:
        asked = json.dumps({"model": "tiny", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", asked, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=START_SECONDS) as told:
            return [int(word[1:]) for word in json.load(told)["choices"][0]["text"].split()]

    running.systemctl("start", SERVED)
    assert answer() == expected[:TOKENS]
    for name in ("KILL", "STOP"):
        pid = running.main_pid(SERVED)
        running.signal(SERVED, name)
        restarted(running, SERVED, pid)
        assert answer() == expected[:TOKENS]


def test_metrics_are_reached_from_outside_of_the_brokers_private_network(running: Machine) -> None:
    running.systemctl("stop", BROKER)  # which is handed its sockets when it starts
    running.systemctl("start", METRICS, BROKER)
    # The property tells "127.0.0.1:PORT (Stream)" and the like.
    (port,) = re.findall(r"127\.0\.0\.1:(\d+)", running.show(METRICS, "Listen"))
    assert running.show(BROKER, "PrivateNetwork") == "yes"

    def scrape(*options: str) -> str:
        done = run("curl", "-sS", "--fail", "--max-time", "300", *options)
        assert done.returncode == 0, done.stderr + running.logs()
        return done.stdout

    pid = running.main_pid(BROKER)
    # The worker joins the broker that was started anew when it has seen that it is another.
    wait_until(lambda: 'shmbroker_peers{role="worker"} 1.0' in scrape(f"http://127.0.0.1:{port}/metrics"))
    assert scrape("--unix-socket", str(running.path("/run/shmbroker-metrics.sock")), "http://localhost/healthz") == "ok\n"
    running.signal(BROKER, "KILL")
    assert "shmbroker_uptime_seconds" in scrape(f"http://127.0.0.1:{port}/metrics"), "who asks meanwhile waits for the next one"
    restarted(running, BROKER, pid)


def test_stopping_the_target_stops_all_and_leaves_nothing(running: Machine) -> None:
    assert running.shared_memory()
    running.systemctl("stop", "shmbroker.target")
    # The target is stopped when this returns, and its services are on their way.
    wait_until(lambda: all(running.show(unit, "ActiveState") in ("inactive", "failed") for unit in (BROKER, GPU, SERVED)))
    assert [running.show(unit, "Result") for unit in (BROKER, GPU, SERVED)] == ["success"] * 3, running.logs()
    assert running.shared_memory() == []
