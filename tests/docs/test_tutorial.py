"""The tutorial's commands, run as they are printed, one after the other, as its reader would."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from shmbroker.client.local_broker import stop_process
from shmbroker.control.status import ask
from shmbroker.errors import ShmBrokerError
from shmbroker.memory.reaper import objects
from tests.conftest import INSTANCE_PREFIX
from tests.processes import wait_until

ROOT = Path(__file__).parents[2]
INSTANCE = f"{INSTANCE_PREFIX}tutorial"


def commands() -> list[str]:
    """Those of the bash blocks, continued lines joined; ports exchanged for free ones."""
    text = "\n".join(re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.DOTALL))
    for port in ("9464", "8011"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            text = text.replace(port, str(probe.getsockname()[1]))
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def ready(command: str) -> bool:
    """Whether what was started in the background can be used."""
    if "tee-worker" in command:
        with contextlib.suppress(OSError):
            port = command.split("--port ")[1].split()[0]
            return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health").status == 200)
        return False
    with contextlib.suppress(ShmBrokerError):
        return "shmbroker" in command or any(peer.services for peer in ask(None).peers)
    return False


def test_the_tutorials_commands_do_what_it_says(
    tmp_path: Path, short_folder: Path, embedded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SHMBROKER_INSTANCE", INSTANCE)
    monkeypatch.setenv("SHMBROKER_RUNTIME_DIR", str(short_folder / "run"))
    monkeypatch.setenv("MODEL", str(embedded))
    outputs: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for command in commands():
            if command.startswith("MODEL="):
                continue
            if command.endswith("&"):
                process = subprocess.Popen(["bash", "-c", f"exec {command[:-1]}"], cwd=tmp_path, stdout=subprocess.DEVNULL)
                stack.callback(stop_process, process)
                wait_until(lambda command=command, process=process: process.poll() is not None or ready(command))  # type: ignore[misc]
                assert process.poll() is None, command
                continue
            done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=tmp_path, capture_output=True, text=True, timeout=900)
            assert done.returncode == 0, (command, done.stdout, done.stderr)
            outputs[command] = done.stdout + done.stderr
        found = "\n".join(outputs.values())
    assert "equal to what was counted" in found
    assert re.search(r"^shmbroker_calls_total\{.*\} \d+", found, re.MULTILINE)
    assert re.search(r"^round trip: min [\d.]+ us", found, re.MULTILINE)
    whole = next(text for command, text in outputs.items() if "reference" in command)
    assert next(text for command, text in outputs.items() if "generate" in command).find(whole) == 0, "the same text, printed the same way"
    assert '"content"' in found
    assert '"status":"ok"' in found
    assert json.loads((tmp_path / "trace.json").read_text())
    doctor = next(text for command, text in outputs.items() if "doctor" in command)
    assert re.search(r"transport.*shm", doctor), doctor
    assert not list(objects(INSTANCE))
