"""``tee-worker ray`` as a user starts it, and what can be seen of it from outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from shmbroker.control.messages import ChannelInfo, PeerStatus
from shmbroker.control.status import ask
from shmbroker.errors import BrokerUnreachable
from shmbroker.memory import names
from tee_worker.scale_out.slot import instances
from tests.processes import wait_until

LOOKS = 16
"""So many at once come to every ingress."""


@dataclass
class Fleet:
    """``tee-worker ray``, ready."""

    process: subprocess.Popen[bytes]
    url: str
    runtime: Path

    @property
    def folder(self) -> Path:
        return self.runtime / f"ray-{os.geteuid()}"

    def post(self, path: str, body: dict[str, Any], **options: Any) -> requests.Response:
        return requests.post(f"{self.url}/{path}", json=body, timeout=300, **options)

    def counted(self, name: str) -> float:
        """A figure, of all ingresses: each tells its own, and when it was made."""
        with ThreadPoolExecutor(LOOKS) as pool:
            address = self.url.removesuffix("/v1") + "/metrics"
            found = [one.text for one in pool.map(lambda _: requests.get(address, timeout=60), range(LOOKS))]
        figures = {}
        for text in found:
            values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
            figures[values[f"shmbroker_ray_{name}_created"]] = float(values[f"shmbroker_ray_{name}_total"])
        return sum(figures.values())

    def answering(self) -> set[str]:
        """Ray's names of the replicas that several requests at once go to."""
        with ThreadPoolExecutor(LOOKS) as pool:
            body = {"prompt": "x", "max_tokens": 1}
            return {one.headers["x-shmbroker-replica"] for one in pool.map(lambda _: self.post("completions", body), range(LOOKS))}

    def peers(self) -> dict[str, tuple[PeerStatus, ...]]:
        """Of each broker that answers, by instance."""
        found = {}
        before = os.environ.get("SHMBROKER_RUNTIME_DIR")
        os.environ["SHMBROKER_RUNTIME_DIR"] = str(self.folder)
        try:
            for instance in instances(self.folder)[:8]:
                if not (self.folder / f"{instance}.sock").exists():
                    continue
                with contextlib.suppress(BrokerUnreachable, OSError):
                    found[instance] = tuple(ask(instance).peers)
        finally:
            if before is None:
                del os.environ["SHMBROKER_RUNTIME_DIR"]
            else:
                os.environ["SHMBROKER_RUNTIME_DIR"] = before
        return found

    def whole(self) -> dict[str, tuple[int, int]]:
        """By instance: the replica's process, and its GPU worker's; of those that have both."""
        found = {}
        for instance, peers in self.peers().items():
            replicas = [peer.pid for peer in peers if peer.name.startswith("tee-worker ray") and alive(peer.pid)]
            workers = [peer.pid for peer in peers if peer.services and alive(peer.pid)]
            if replicas and workers:
                found[instance] = replicas[0], workers[0]
        return found

    def channels(self) -> list[ChannelInfo]:
        """Of all replicas, to their GPU workers."""
        return [channel for peers in self.peers().values() for peer in peers for channel in peer.stats.channels]

    def processes(self) -> dict[int, str]:
        """All of its own and of Ray's, by what they inherited."""
        marker = f"SHMBROKER_RUNTIME_DIR={self.runtime}".encode()
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and marker in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
        return found

    def end(self) -> int:
        """Ctrl-C, as a terminal gives it to the whole group."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(300)

    def terminate(self) -> int:
        """SIGTERM, as a service manager gives it to the command alone."""
        self.process.terminate()
        return self.process.wait(300)

    def folders_of_ray(self) -> set[Path]:
        """Where Ray's processes keep logs and sockets."""
        found = set()
        for pid in self.processes():
            with contextlib.suppress(OSError):
                for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    if entry.startswith(b"RAY_TMPDIR="):
                        found.add(Path(entry.partition(b"=")[2].decode()))
        return found

    def left(self) -> list[str]:
        """What there is of it in shared memory and in its folder."""
        ours = tuple(f"{kind}shmbroker.{instance}." for instance in instances(self.folder) for kind in ("", "sem."))
        found = [file for file in os.listdir(names.SHM_DIR) if file.startswith(ours)]
        return found + ([path.name for path in self.folder.iterdir()] if self.folder.exists() else [])


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@contextlib.contextmanager
def running_fleet(model: Path, *options: str) -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="shmbroker-") as runtime, tempfile.TemporaryFile() as words:
        command = [
            sys.executable,
            "-m",
            "tee_worker",
            "ray",
            "--model",
            str(model),
            "--port",
            "0",
            "--until-exit",
            str(os.getpid()),
            *options,
        ]
        environment = {**os.environ, "SHMBROKER_RUNTIME_DIR": runtime}
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=words, start_new_session=True
        )
        assert process.stdout is not None
        fleet = Fleet(process, "", Path(runtime))
        try:
            line = process.stdout.readline().decode()
            words.seek(0)
            assert line.startswith("ready: "), words.read().decode()
            fleet.url = line.split()[1]
            yield fleet
        finally:
            fleet.end()
            process.stdout.close()
            wait_until(lambda: not fleet.processes())


def events_of(response: requests.Response) -> Iterator[dict[str, Any]]:
    """A stream's, without its last one, which has to be there unless there is an error."""
    last = ""
    for line in response.iter_lines():
        if line.startswith(b"data: "):
            last = line.removeprefix(b"data: ").decode()
            if last != "[DONE]":
                yield json.loads(last)
    assert last == "[DONE]" or "error" in json.loads(last) or json.loads(last)["type"] in ("response.completed", "response.incomplete"), (
        last
    )


def stream(fleet: Fleet, prompt: str, tokens: int, **fields: Any) -> Iterator[str]:
    """The text in pieces; an error is raised."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, **fields}
    with fleet.post("completions", body, stream=True) as response:
        if response.status_code != 200:
            raise RuntimeError(response.json()["error"])
        for event in events_of(response):
            if "error" in event:
                raise RuntimeError(event["error"])
            yield event["choices"][0]["text"]


def text_of(fleet: Fleet, prompt: str, tokens: int) -> str:
    return "".join(stream(fleet, prompt, tokens))


def end_of(pieces: Iterator[str]) -> tuple[str, str]:
    """The text to its end, or to the error that is told then; its words."""
    text = ""
    try:
        for piece in pieces:
            text += piece
    except RuntimeError as error:
        told = error.args[0]
        if told["type"] != "ReplicaLost":
            raise
        return text, told["message"]
    return text, ""
