"""Bad input to the library and the command lines: one clear line, a non-zero exit, no traceback."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import shmbroker
from tests.processes import run


def cli(*arguments: str, **environment: str) -> tuple[int, str]:
    done = run(sys.executable, "-m", *arguments, **environment)
    assert "Traceback" not in done.stderr, done.stderr
    told = [line for line in done.stderr.splitlines() if not line.startswith(("Usage:", "Try ")) and line.strip()]
    return done.returncode, "\n".join(told)


def test_no_broker_is_told_with_the_command_that_starts_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    for command in (
        ["shmbroker", "status"],
        ["gpu_worker", "serve", "--model", str(tmp_path)],
        ["tee_worker", "generate", "--model", str(tmp_path), "--prompt", "x"],
    ):
        status, told = cli(*command, SHMBROKER_INSTANCE="nobody", SHMBROKER_RUNTIME_DIR=str(tmp_path))
        assert status == 1
        assert told.startswith("error: no broker answers for instance 'nobody'")
        assert "shmbroker serve --instance nobody" in told
        assert len(told.splitlines()) == 1
    with pytest.raises(shmbroker.BrokerUnreachable):
        shmbroker.connect("nobody-either")


def test_a_second_broker_on_the_same_instance_is_refused(broker: shmbroker.LocalBroker) -> None:
    status, told = cli("shmbroker", "serve", "--instance", broker.instance)
    assert status == 1
    assert f"a broker already serves instance '{broker.instance}' (pid {broker.pid})" in told


def test_a_full_shared_memory_names_bytes_needed_bytes_free_and_the_remedy(broker: shmbroker.LocalBroker) -> None:
    space = os.statvfs("/dev/shm")
    free = space.f_bavail * space.f_frsize
    with pytest.raises(shmbroker.SharedMemoryFull, match=r"/dev/shm is too small: .* \d+ of \d+ bytes are free; .*--shm-size"):
        shmbroker.connect(arena=free + (1 << 30))
    shmbroker.connect(arena="1M").close()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["shmbroker", "serve", "--instance", "No Good"], "instance 'No Good' cannot be used"),
        (["shmbroker", "serve", "--group", "no-such-group"], "there is no group 'no-such-group'"),
        (["shmbroker", "demo", "--split", "half"], "split 'half' is not known; there are: linear, fused, op"),
        (["shmbroker", "demo", "--lane", "fast"], "lane 'fast' is not known"),
        (["gpu_worker", "serve", "--model", "/nowhere"], "model '/nowhere' is neither a folder nor a .gguf file"),
        (["gpu_worker", "serve", "--model", "/nowhere", "--device", "tpu"], "device 'tpu' is not known; there are: cpu, cuda, cuda:N"),
        (["gpu_worker", "serve", "--model", "/nowhere", "--dtype", "int3"], "dtype 'int3' is not carried"),
        (
            ["gpu_worker", "serve", "--model", "/nowhere", "--dtype", "int8"],
            "a model cannot be in int8; there are: float32, bfloat16, float16",
        ),
        (["tee_worker", "generate", "--model", "/nowhere", "--prompt", "x", "--split", "half"], "split 'half' is not known"),
        (["tee_worker", "generate", "--model", "/nowhere", "--prompt", "x"], "model '/nowhere' is neither a folder"),
        (["tee_worker", "generate", "--model", "/nowhere"], "Missing option '--prompt'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_argument_is_told_in_one_line(arguments: list[str], told: str) -> None:
    status, line = cli(*arguments)
    assert status != 0
    assert told in line
    assert len(line.splitlines()) == 1


def test_a_model_folder_without_a_config_is_told(tmp_path: Path) -> None:
    status, told = cli("gpu_worker", "serve", "--model", str(tmp_path))
    assert status == 1
    assert "has no config.json" in told
    (tmp_path / "config.json").write_text("{}")
    status, told = cli("gpu_worker", "serve", "--model", str(tmp_path))
    assert "no *.safetensors" in told


def test_a_service_that_nobody_offers_is_told_with_those_there_are(client: shmbroker.Client, worker: int) -> None:
    with pytest.raises(shmbroker.NoSuchService, match=r"no worker offers service 'tpu' .*\(offered: 'test'\)"):
        client.channel("tpu", wait=0)


def test_lanes_and_doorbells_that_do_not_exist_are_told(client: shmbroker.Client, worker: int) -> None:
    with pytest.raises(shmbroker.BadInput, match="there are: auto, shm, zmq"):
        client.channel("test", lane="carrier pigeon")
    with pytest.raises(shmbroker.BadInput, match="there are: auto, sem, poll"):
        client.channel("test", doorbell="brass")
    with pytest.raises(shmbroker.BadInput, match="belongs to lane shm"):
        client.channel("test", lane="zmq", doorbell="sem")


def test_more_channels_than_were_asked_for_are_refused_and_closed_ones_can_be_had_again(broker: shmbroker.LocalBroker, worker: int) -> None:
    with shmbroker.connect(arena="1M", channels=2) as client:
        first, _ = client.channel("test"), client.channel("test")
        with pytest.raises(shmbroker.ChannelError, match="all 2 channels of this client are open"):
            client.channel("test")
        first.close()
        client.channel("test")


def test_sizes_that_cannot_be_read_are_told() -> None:
    for size in ("much", "-5", "0", "12Q"):
        with pytest.raises(shmbroker.BadInput, match="size"):
            shmbroker.connect("x", arena=size)
    with pytest.raises(shmbroker.BadInput, match="depth must be a power of two"):
        shmbroker.connect("x", depth=3)


def test_an_op_whose_shapes_cannot_be_found_is_refused_at_registration() -> None:
    worker = shmbroker.Worker("x")
    with pytest.raises(shmbroker.BadInput, match="needs an out_spec"):

        @worker.op
        def blind(x: object, *, out: object) -> None: ...

    worker.op(lambda x: x)
    with pytest.raises(shmbroker.BadInput, match="registered already"):
        worker.op(lambda x: x)
