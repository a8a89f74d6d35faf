"""What the deployment documents tell, as far as a plain machine can show it."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from pathlib import Path

import jinja2
import pytest
import yaml

from shmbroker.control.keys import make_keys
from tests.conftest import INSTANCE_PREFIX
from tests.processes import broker_process, run
from tests.tee_worker.conftest import gpu_worker

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEPLOY = Path(__file__).parents[2] / "docs" / "deploy"
INSTANCE = f"{INSTANCE_PREFIX}deploy"


@pytest.fixture
def enclave_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The environment of an enclave's processes: control on loopback TCP with keys, and the segment in one plain file. Options for the broker."""
    file = tmp_path / "memory"
    with file.open("wb") as made:
        os.posix_fallocate(made.fileno(), 0, 128 << 20)
    make_keys(tmp_path / "keys")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("SHMBROKER_SEGMENTS", f"path:{file}")
    monkeypatch.setenv("SHMBROKER_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("SHMBROKER_INSTANCE", INSTANCE)
    monkeypatch.setenv("SHMBROKER_CONTROL", endpoint)
    monkeypatch.setenv("SHMBROKER_KEYS", str(tmp_path / "keys"))
    return ["--control", endpoint, "--keys", str(tmp_path / "keys")]


def test_text_is_generated_over_tcp_with_polling_and_a_segment_in_a_file(enclave_like: list[str], embedded: Path) -> None:
    with broker_process(INSTANCE, *enclave_like), gpu_worker(embedded, "gpu"):
        options = ["--model", str(embedded), "--prompt", "Why is the sky blue?", "--max-new-tokens", "6", "--json"]
        done = run(sys.executable, "-m", "tee_worker", "generate", *options, "--doorbell", "poll", "--arena", "64M")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        whole = run(sys.executable, "-m", "tee_worker", "reference", *options)
        assert found["tokens"] == json.loads(whole.stdout)["tokens"]
        report = found["report"]
        assert (report["lane"], report["doorbell"], report["control"]) == ("shm", "poll", "tcp")
        assert found["analytic"]["equal"]


def test_the_gramine_manifest_renders_to_what_the_enclave_needs() -> None:
    class Gramine:
        libos = "/gramine/libsysdb.so"

        @staticmethod
        def runtimedir() -> str:
            return "/gramine/runtime"

    template = (DEPLOY / "tee-worker.manifest.template").read_text()
    rendered = jinja2.Template(template, undefined=jinja2.StrictUndefined).render(
        gramine=Gramine, env={}, venv="/opt/shmbroker", model="/srv/model", port=5570, keys="/etc/shmbroker/keys"
    )
    manifest = tomllib.loads(rendered)
    assert {"type": "untrusted_shm", "path": "/dev/shm", "uri": "dev:/dev/shm"} in manifest["fs"]["mounts"]
    assert "dev:/dev/shm" in manifest["sgx"]["allowed_files"]
    assert manifest["loader"]["env"]["SHMBROKER_CONTROL"] == "tcp://127.0.0.1:5570"
    argv = manifest["loader"]["argv"]
    assert argv[argv.index("--doorbell") + 1] == "poll"
    known = run(sys.executable, "-m", "tee_worker", "generate", "--help").stdout
    assert all(option in known for option in argv if option.startswith("--"))


def test_the_pod_of_the_container_document_is_yaml_with_one_shared_memory_for_all() -> None:
    text = (DEPLOY / "containers.md").read_text()
    pod = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])["spec"]  # type: ignore[index]
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"]:
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert {"shm": "/dev/shm"}.items() <= {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}.items()
