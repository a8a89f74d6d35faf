"""``shmbroker demo``: broker, GPU worker and TEE worker as real processes, against the model in one process.

The two programs above this package are driven as their user would: by their command lines.
"""

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
from typing import TYPE_CHECKING, Any

import click
import msgspec

from shmbroker import console
from shmbroker.commands.options import json_option
from shmbroker.errors import BadInput, ShmBrokerError
from shmbroker.settings.kinds import Lane, listed
from shmbroker.settings.sizes import MIB

if TYPE_CHECKING:
    from shmbroker.client.local_broker import LocalBroker

SPLITS = ("linear", "fused", "op")
LANES = tuple(lane.value for lane in Lane)
WORKER_SECONDS = 120.0
"""How long a GPU worker may take to load 540 MB of weights on a busy machine."""


@click.command()
@click.option("--prompt", default="Why is the sky blue?", show_default=True)
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--split", "splits", multiple=True, help=f"{listed(SPLITS)}; may be given several times.  [default: all three]")
@click.option("--lane", "lanes", multiple=True, help=f"{listed(LANES)}; may be given several times.  [default: both]")
@json_option()
def demo(prompt: str, max_new_tokens: int, splits: tuple[str, ...], lanes: tuple[str, ...], as_json: bool) -> None:
    """Generate text with a small model split over real processes, and compare it with the model in one process."""
    _check_known("split", splits, SPLITS)
    _check_known("lane", lanes, LANES)
    signal.signal(signal.SIGTERM, _end)
    result = _run(prompt, max_new_tokens, splits or SPLITS, lanes or LANES, quiet=as_json)
    if as_json:
        click.echo(json.dumps(result))
    else:
        _show(prompt, result)
    sys.exit(0 if result["identical"] and not result["left_in_shared_memory"] else 1)


def _check_known(what: str, asked: tuple[str, ...], known: tuple[str, ...]) -> None:
    for one in asked:
        if one not in known:
            raise BadInput(f"{what} {one!r} is not known; there are: {', '.join(known)}")


def _run(prompt: str, max_new_tokens: int, splits: tuple[str, ...], lanes: tuple[str, ...], *, quiet: bool) -> dict[str, Any]:
    """Every split on every lane, and the same without any: text, tokens, reports, and what is left. Raises :class:`ShmBrokerError`."""
    from shmbroker.client.local_broker import local_broker
    from shmbroker.memory.reaper import objects
    from shmbroker.models import embedded

    model = embedded.ensure()
    asked = ["--model", str(model), "--prompt", prompt, "--chat", "--max-new-tokens", str(max_new_tokens), "--json"]
    steps = _Steps(2 + len(splits) * len(lanes), quiet=quiet)
    steps.begin(f"the model in one process, to compare with; its {max_new_tokens} tokens as they come:\n\n{prompt}")
    # Its text is the first that there is: it goes to standard error as it comes.
    expected = _tee_worker(["reference", *asked, *(["--quiet"] if quiet else [])])
    steps.say(f"\n{_speed(expected)}")
    runs: list[dict[str, Any]] = []
    steps.begin("a broker, and a GPU worker that reads the weights")
    with local_broker() as broker, _gpu_worker(broker, model):
        for split in splits:
            for lane in lanes:
                steps.begin(f"split {split}, lane {lane}")
                outcome = _tee_worker(["generate", *asked, "--quiet", "--split", split, "--lane", lane])
                outcome["identical"] = outcome["tokens"] == expected["tokens"]
                steps.say(f"{_speed(outcome)}, identical: {'yes' if outcome['identical'] else 'NO'}")
                runs.append({"lane": lane, **outcome})
    return {
        "text": runs[0]["text"],
        "tokens": runs[0]["tokens"],
        "identical": all(outcome["identical"] for outcome in runs),
        "report": runs[0]["report"],
        "left_in_shared_memory": [name.file for name in objects(broker.instance)],
        "runs": runs,
    }


class _Steps:
    """Says on standard error what goes on, and how far it is."""

    def __init__(self, count: int, *, quiet: bool) -> None:
        self._count = count
        self._begun = 0
        self._quiet = quiet

    def begin(self, text: str) -> None:
        """The next of them."""
        self._begun += 1
        self.say(f"[{self._begun}/{self._count}] {text}")

    def say(self, text: str) -> None:
        """Of the one that was begun."""
        if not self._quiet:
            click.echo(text, err=True)


def _speed(outcome: dict[str, Any]) -> str:
    return f"{len(outcome['tokens'])} tokens in {outcome['seconds']:.1f} s"


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
    from shmbroker.client.local_broker import stop_process
    from shmbroker.control.status import ask

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

    from shmbroker.call.report import Report

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
