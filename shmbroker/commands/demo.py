"""``shmbroker demo``: broker, GPU worker and TEE worker as real processes, driven by their command lines, against the model in one process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import click
import msgspec

from shmbroker import console
from shmbroker.call.report import Report
from shmbroker.client.local_broker import LocalBroker, local_broker, stop_process
from shmbroker.control.status import ask
from shmbroker.errors import BadInput, ShmBrokerError
from shmbroker.lane.kinds import Lane
from shmbroker.memory.reaper import objects
from shmbroker.models import embedded
from shmbroker.settings.sizes import MIB

SPLITS = ("linear", "fused", "op")
WORKER_SECONDS = 120.0
"""How long a GPU worker may take to load 540 MB of weights on a busy machine."""


def run(prompt: str, max_new_tokens: int, splits: tuple[str, ...], lanes: tuple[str, ...], as_json: bool) -> bool:
    """Run the demo and print what came of it; returns whether all tokens were identical. Raises :class:`ShmBrokerError`."""
    for split in splits:
        if split not in SPLITS:
            raise BadInput(f"split {split!r} is not known; there are: {', '.join(SPLITS)}")
    for lane in lanes:
        if lane not in [one.value for one in Lane]:
            raise BadInput(f"lane {lane!r} is not known; there are: shm, zmq")
    signal.signal(signal.SIGTERM, _end)
    model = embedded.ensure()
    asked = ["--model", str(model), "--prompt", prompt, "--chat", "--max-new-tokens", str(max_new_tokens), "--json"]
    _say(as_json, f"the model in one process: {max_new_tokens} tokens ...")
    expected = _tee_worker(["reference", *asked])["tokens"]
    runs: list[dict[str, Any]] = []
    with local_broker() as broker, _gpu_worker(broker, model):
        _say(as_json, f"broker (pid {broker.pid}) and GPU worker are up")
        for split in splits or SPLITS:
            for lane in lanes or ("shm", "zmq"):
                _say(as_json, f"split {split}, lane {lane} ...")
                outcome = _tee_worker(["generate", *asked, "--split", split, "--lane", lane])
                outcome["identical"] = outcome["tokens"] == expected
                runs.append({"lane": lane, **outcome})
    left = [name.file for name in objects(broker.instance)]
    identical = all(outcome["identical"] for outcome in runs)
    result = {
        "text": runs[0]["text"],
        "tokens": runs[0]["tokens"],
        "identical": identical,
        "report": runs[0]["report"],
        "left_in_shared_memory": left,
        "runs": runs,
    }
    if as_json:
        click.echo(json.dumps(result))
    else:
        _show(prompt, result)
    return identical and not left


def _say(quiet: bool, text: str) -> None:
    if not quiet:
        click.echo(text, err=True)


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)  # so that every with-block on the way is left


def _tee_worker(arguments: list[str]) -> dict[str, Any]:
    arguments = [*arguments, "--until-exit", str(os.getpid())]
    done = subprocess.run([sys.executable, "-m", "tee_worker", *arguments], stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise ShmBrokerError(f"tee-worker {arguments[0]} ended with status {done.returncode}; its own words are above")
    outcome: dict[str, Any] = json.loads(done.stdout)
    return outcome


@contextlib.contextmanager
def _gpu_worker(broker: LocalBroker, model: Path) -> Iterator[None]:
    command = [sys.executable, "-m", "gpu_worker", "--log-level", "warning", "serve", "--model", str(model)]
    process = subprocess.Popen([*command, "--until-exit", str(broker.pid)])
    try:
        until = time.monotonic() + WORKER_SECONDS
        while not any(peer.role == "worker" for peer in ask(broker.instance).peers):
            if process.poll() is not None:
                raise ShmBrokerError(f"gpu-worker ended with status {process.returncode}; its own words are above")
            if time.monotonic() > until:
                raise ShmBrokerError(f"gpu-worker was not ready within {WORKER_SECONDS:g} s")
            time.sleep(0.1)
        yield
    finally:
        stop_process(process)


def _show(prompt: str, result: dict[str, Any]) -> None:
    from rich.table import Table

    terminal = console.terminal()
    terminal.print(f"\n[bold]{prompt}[/]")
    terminal.print(result["text"].strip() + "\n", highlight=False)
    table = Table("split", "lane", "calls", "a pass", "sent MiB", "back MiB", "socket B", "tokens/s", "identical", box=None, pad_edge=False)
    for outcome in result["runs"]:
        report = outcome["report"]
        calls = report["total"]["calls"]
        table.add_row(
            outcome["split"],
            report["lane"],
            str(calls),
            str(calls // len(outcome["tokens"])),
            f"{report['total']['sent_bytes'] / MIB:.1f}",
            f"{report['total']['received_bytes'] / MIB:.1f}",
            str(report["socket_bytes"]),
            f"{outcome['tokens_per_second']:.1f}",
            "yes" if outcome["identical"] else "[red]NO[/]",
        )
    terminal.print(table)
    last = result["runs"][-1]
    terminal.print(f"\nreport of split {last['split']} on lane {last['lane']}:")
    terminal.print(msgspec.convert(last["report"], Report).render())
    left = result["left_in_shared_memory"]
    terminal.print(f"\nleft in shared memory: {', '.join(left) or 'nothing'}")
    terminal.print(f"identical: {'yes' if result['identical'] else 'NO'}")
