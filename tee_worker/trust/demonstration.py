"""What a worker can read, and whether its lie is noticed, shown on a real model with a worker that misbehaves."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import torch

from shmbroker.client.local_broker import local_broker, stop_process
from shmbroker.errors import WrongResult
from shmbroker.models import Checkpoint, model_digest
from tee_worker.generate import encode, generate
from tee_worker.own_peers import await_worker
from tee_worker.run_options import GenerateOptions

PROMPT = "My name is Ada Lovelace. I live at 12 St James's Square, and the doctor says that it is"
SERVICE = "demo-trust"
LIE_AT = 40
"""Which result is changed: one of the prompt's pass, in the tenth layer or so."""

MODES = ("plain", "verify", "blind")
_STDERR = 2


class Reading(msgspec.Struct, frozen=True):
    """What the worker could tell of the prompt at one mode."""

    trust: str
    recovered: int
    """Tokens of the prompt, each at its place."""
    tokens: int
    text: str
    """What it reads."""


class Lying(msgspec.Struct, frozen=True):
    """What came of one changed number at one mode."""

    trust: str
    noticed: bool
    told: str
    """The error, or the text that came out."""


class Demonstration(msgspec.Struct, frozen=True):
    """All of it."""

    prompt: str
    readings: tuple[Reading, ...]
    lies: tuple[Lying, ...]


def demonstrate(model: str, prompt: str, new_tokens: int, on_line: Callable[[str], None]) -> Demonstration:
    """Show it for the checkpoint ``model``, line by line. Raises :class:`ShmBrokerError`."""
    checkpoint = Checkpoint.at(model)
    tokenizer = checkpoint.tokenizer()
    secret = encode(tokenizer, prompt, chat=False)[0].tolist()
    digest = model_digest(checkpoint.model(torch.float32))
    readings, lies = [], []
    with local_broker() as broker, tempfile.TemporaryDirectory() as folder:

        def run(mode: str) -> str:
            options = GenerateOptions(
                model=model, prompt=prompt, max_new_tokens=new_tokens, instance=broker.instance, service=SERVICE, failover=0.0, check=False,
                trust=mode, model_digest=None if mode == "plain" else digest,
            )  # fmt: skip
            return generate(options).text

        file = Path(folder) / "read"
        on_line(f"A worker that reads. The prompt has {len(secret)} tokens: {prompt!r}")
        with _misbehaving(model, broker.instance, "--read", str(file)):
            for mode in MODES:
                file.write_text("")
                run(mode)
                read = _best(file, secret)
                found = sum(one == other for one, other in zip(read, secret, strict=False))
                readings.append(Reading(mode, found, len(secret), str(tokenizer.decode(read))))
                on_line(f"  {mode:7} {found:3} of {len(secret)} tokens: {readings[-1].text!r}")
        on_line(f"A worker that lies once: it changes one number of its result {LIE_AT}.")
        for mode in MODES:
            with _misbehaving(model, broker.instance, "--lie", "change", "--lie-at", str(LIE_AT)):
                try:
                    lies.append(Lying(mode, False, run(mode)))
                    on_line(f"  {mode:7} nobody notices; the answer goes on: {lies[-1].told!r}")
                except WrongResult as error:
                    lies.append(Lying(mode, True, str(error)))
                    on_line(f"  {mode:7} {error}")
    return Demonstration(prompt, tuple(readings), tuple(lies))


def _best(file: Path, secret: list[int]) -> list[int]:
    """Of all that the worker has read, what comes nearest to the prompt: it need not know which."""
    told = [json.loads(line)["tokens"] for line in file.read_text().splitlines()] or [[]]
    best: list[int] = max(told, key=lambda tokens: sum(one == other for one, other in zip(tokens, secret, strict=False)))
    return best


@contextlib.contextmanager
def _misbehaving(model: str, instance: str, *options: str) -> Iterator[None]:
    command = [sys.executable, "-m", "gpu_worker", "--log-level", "warning", "misbehave", "--model", model, "--service", SERVICE]
    command += ["--instance", instance, "--name", "the misbehaving worker", "--until-exit", str(os.getpid()), *options]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=_STDERR, start_new_session=True)
    try:
        await_worker(process, instance)
        yield
    finally:
        stop_process(process)
