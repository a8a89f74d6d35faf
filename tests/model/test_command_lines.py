"""The real model through the command lines: the demo, streaming, the report, GGUF, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import shmbroker
from shmbroker import embedded_model
from shmbroker.memory.reaper import objects
from tee_worker.generate import Options, generate
from tests.model.conftest import gpu_worker
from tests.processes import run

PROMPT = ["--prompt", "Why is the sky blue?", "--chat"]


def tee_worker(*arguments: str) -> tuple[int, str, str]:
    done = run(sys.executable, "-m", "tee_worker", *arguments)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def test_the_demo_generates_64_identical_tokens_at_every_split_on_both_lanes() -> None:
    done = run(sys.executable, "-m", "shmbroker", "demo", "--json", seconds=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["identical"] is True
    assert len(result["tokens"]) == 64
    assert "scatter" in result["text"], "English, and to the point"
    assert result["left_in_shared_memory"] == []
    assert {(one["split"], one["lane"]) for one in result["runs"]} == {
        (s, lane) for s in ("linear", "fused", "op") for lane in ("shm", "zmq")
    }
    for one in result["runs"]:
        report = one["report"]
        assert one["analytic"]["equal"]
        assert report["total"]["calls"] == 64 * (30 * {"linear": 7, "fused": 4, "op": 6}[one["split"]] + 2)
        assert one["parameter_bytes"] < 200_000, "the norms alone: 540 MB of weights live in the GPU worker"
        assert one["private_bytes"] < 450 << 20, "torch and transformers alone take 300 MiB"
        if one["lane"] == "shm":
            assert report["socket_bytes"] == 0
        else:
            assert report["socket_bytes"] < 4096 * report["total"]["calls"], "frames, not tensors"
    assert result["report"] == result["runs"][0]["report"]


@pytest.fixture(scope="module")
def worker(broker: shmbroker.LocalBroker, embedded: Path) -> Iterator[None]:
    with gpu_worker(embedded, "gpu"):
        yield


def test_text_is_streamed_and_followed_by_the_report(worker: None, embedded: Path) -> None:
    status, out, _ = tee_worker("generate", "--model", str(embedded), *PROMPT, "--max-new-tokens", "8", "--split", "op")
    assert status == 0
    text, _, report = out.partition("\n\n")
    assert text.startswith("The answer to this question")
    for part in (
        "batch_linear",
        "matmul",
        "compute",
        "transport",
        "lane shm, doorbell sem, control ipc",
        "0 bytes of frames over a socket",
    ):
        assert part in report.replace("\n", " ")
    assert "equal to what was counted" in report.replace("\n", " ")


def test_what_cannot_work_is_refused_in_one_line_before_anything_is_generated(worker: None, embedded: Path) -> None:
    status, out, error = tee_worker("generate", "--model", str(embedded), "--prompt", "word " * 8200)
    assert status == 1
    assert out == ""
    assert error.startswith(
        "error: the prompt has 8201 tokens and 64 new ones are asked for, the model's context is 8192: shorten the prompt"
    )
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "x", "arena": "much"}, "size 'much' cannot be read"),
        ({"prompt": "x", "service": "tpu"}, "no worker offers service 'tpu'"),
        ({"prompt": "x", "lane": "pigeon"}, "there are: auto, shm, zmq"),
        ({"prompt": "x", "dtype": "bfloat16"}, "start both workers with the same --model and --dtype"),
    ],
    ids=["empty prompt", "size", "service", "lane", "dtype"],
)
def test_what_cannot_work_is_refused_with_the_remedy(worker: None, embedded: Path, options: dict[str, str], told: str) -> None:
    with pytest.raises(shmbroker.ShmBrokerError, match=told):
        generate(Options(model=str(embedded), **options))


def test_an_arena_that_is_told_to_be_too_small_says_how_large_it_must_be(worker: None, embedded: Path) -> None:
    options = Options(model=str(embedded), prompt="word " * 600, max_new_tokens=2, split="op", arena="1M")
    with pytest.raises(shmbroker.ArenaTooSmall, match=r"the largest tensor of this run, float32\[1, 9, 601, 601\]") as caught:
        generate(options)
    enough = str(caught.value).split("at least ")[1].split(" ")[0]
    assert len(generate(msgspec.structs.replace(options, arena=enough)).tokens) == 2


def test_a_gguf_file_serves_as_well_as_a_folder(worker: None, embedded: Path) -> None:
    file = embedded_model.gguf_file()
    with gpu_worker(file, "gguf"):
        options = Options(model=str(file), prompt="Why is the sky blue?", chat=True, max_new_tokens=4, service="gguf")
        assert generate(options).text == "The answer to this", "what the folder gives, as the other tests of this file see"


def test_nothing_is_left_in_shared_memory(broker: shmbroker.LocalBroker) -> None:
    held = [name.kind for name in objects(broker.instance)]
    assert "segment" not in held, "every client has left; bells of living workers remain"
