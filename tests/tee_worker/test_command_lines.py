"""The real model through the command lines: the demo, streaming, the report, GGUF, and what is refused."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import shmbroker
from shmbroker.control.status import ask
from shmbroker.memory.reaper import objects
from shmbroker.models import embedded as embedded_model
from tee_worker.generate import generate
from tee_worker.run_options import GenerateOptions
from tests.processes import run, running, wait_until
from tests.tee_worker.conftest import gpu_worker

PROMPT = ["--prompt", "Why is the sky blue?", "--chat"]


def tee_worker(*arguments: str) -> tuple[int, str, str]:
    done = run(sys.executable, "-m", "tee_worker", *arguments)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


DEMO_TOKENS = 8
"""An eighth of what the demo makes by itself: text that can be told from nonsense."""


def test_the_demo_generates_identical_tokens_at_every_split_on_both_lanes() -> None:
    done = run(sys.executable, "-m", "shmbroker", "demo", "--max-new-tokens", str(DEMO_TOKENS), "--json", seconds=1800)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["identical"] is True
    assert len(result["tokens"]) == DEMO_TOKENS
    assert result["text"].startswith("The answer to this question"), "English, and to the point"
    assert result["left_in_shared_memory"] == []
    assert {(one["split"], one["lane"]) for one in result["runs"]} == {
        (s, lane) for s in ("linear", "fused", "op") for lane in ("shm", "zmq")
    }
    for one in result["runs"]:
        report = one["report"]
        assert one["analytic"]["equal"]
        assert report["total"]["calls"] == DEMO_TOKENS * (30 * {"linear": 7, "fused": 4, "op": 6}[one["split"]] + 2)
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


def test_the_text_alone_is_on_standard_output_and_the_report_on_standard_error(worker: None, embedded: Path) -> None:
    options = ["--model", str(embedded), *PROMPT, "--max-new-tokens", "8"]
    status, out, told = tee_worker("generate", *options, "--split", "op")
    assert status == 0
    assert out.startswith("The answer to this question")
    assert out.count("\n") == 1
    assert out.endswith("\n")
    for part in (
        "batch_linear",
        "matmul",
        "compute",
        "transport",
        "lane shm, doorbell sem, control ipc",
        "0 bytes of frames over a socket",
        "equal to what was counted",
    ):
        assert part in " ".join(told.split())
    assert tee_worker("generate", *options, "--quiet") == (0, out, "")
    assert tee_worker("reference", *options, "--quiet") == (0, out, "")
    status, again, told = tee_worker("reference", *options)
    assert (status, again) == (0, out)
    assert "8 tokens after a prompt of 36" in told


@pytest.mark.parametrize("command", ["generate", "reference"])
def test_for_programs_the_outcome_is_on_standard_output_and_the_text_on_standard_error(worker: None, embedded: Path, command: str) -> None:
    options = ["--model", str(embedded), *PROMPT, "--max-new-tokens", "8", "--json"]
    status, out, told = tee_worker(command, *options)
    assert status == 0
    outcome = json.loads(out)
    assert outcome["text"].startswith("The answer to this question")
    assert outcome["text"] in told
    assert len(outcome["tokens"]) == 8
    status, out, told = tee_worker(command, *options, "--quiet")
    assert (status, json.loads(out)["tokens"], told) == (0, outcome["tokens"], "")


def test_no_progress_bar_is_written_where_there_is_no_terminal(broker: shmbroker.LocalBroker, tiny: Path) -> None:
    command = (sys.executable, "-m", "gpu_worker", "--log-level", "warning", "serve", "--model", str(tiny), "--service", "bars")
    with running(
        *command, HF_HUB_OFFLINE="1"
    ) as process:  # a variable with which it is started anew: the bars are chosen when libraries are loaded
        wait_until(lambda: process.poll() is not None or any("bars" in peer.services for peer in ask(None).peers))
        process.terminate()
        _, told = process.communicate()
    assert process.returncode == 0, told.decode()
    assert "it/s" not in told.decode()


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
        generate(GenerateOptions(model=str(embedded), **options))


def test_an_arena_that_is_told_to_be_too_small_says_how_large_it_must_be(worker: None, embedded: Path) -> None:
    options = GenerateOptions(model=str(embedded), prompt="word " * 600, max_new_tokens=2, split="op", arena="1M")
    with pytest.raises(shmbroker.ArenaTooSmall, match=r"the largest tensor of this run, float32\[1, 9, 601, 601\]") as caught:
        generate(options)
    enough = str(caught.value).split("at least ")[1].split(" ")[0]
    assert len(generate(msgspec.structs.replace(options, arena=enough)).tokens) == 2


def test_a_generation_in_parts_sends_what_its_analytic_model_says(worker: None, embedded: Path) -> None:
    options = GenerateOptions(model=str(embedded), prompt="word " * 80, max_new_tokens=2, pipeline=2)
    assert generate(options).analytic.equal


def test_a_gguf_file_serves_as_well_as_a_folder(worker: None, embedded: Path) -> None:
    file = embedded_model.gguf_file()
    with gpu_worker(file, "gguf"):
        options = GenerateOptions(model=str(file), prompt="Why is the sky blue?", chat=True, max_new_tokens=4, service="gguf")
        assert generate(options).text == "The answer to this", "what the folder gives, as the other tests of this file see"


def test_the_plan_tells_the_prototypes_traffic_at_split_op() -> None:
    """98 calls, 3328 MiB out (8 KiB of ids and 8 KiB of the last hidden state on top), 3656.5 MiB back."""
    status, out, _ = tee_worker("plan", "--shape", "llama-3.2-1b", "--tokens", "1024", "--json")
    assert status == 0
    splits = {one["split"]: one for one in json.loads(out)["splits"]}
    assert splits["op"]["calls"] == 98
    assert splits["op"]["sent_bytes"] == (3328 << 20) + 2 * 8192
    assert splits["op"]["received_bytes"] == 16 * (228 << 20) + (8 << 20) + 128256 * 4
    assert splits["op"]["largest_bytes"] == 128 << 20
    assert (splits["linear"]["calls"], splits["fused"]["calls"]) == (114, 66)


def test_the_plan_tells_module_by_module_where_it_runs_with_equal_layers_as_one_row(embedded: Path) -> None:
    status, out, _ = tee_worker("plan", "--model", str(embedded), "--tokens", "9", "--split", "op")
    assert status == 0
    for pattern in (
        r"calls +212 +122 +182",
        r"arena +64\.\d",
        r"model\.layers\.0-29\.self_attn\.q_proj +GPU worker",
        r"model\.layers\.0-29\.self_attn +TEE: mask, softmax; GPU worker: Q @ +K\^T, attention @ V",
        r"model\.norm +TEE",
        r"lm_head +GPU worker",
    ):
        assert re.search(pattern, re.sub(r"\s+", " ", out)), pattern
    assert len(out.splitlines()) < 40


@pytest.mark.parametrize("columns", [{}, {"COLUMNS": "80"}, {"COLUMNS": "200"}], ids=str)
def test_a_plan_of_mixed_layers_fits_80_columns(embedded: Path, columns: dict[str, str]) -> None:
    split = ["--tokens", "512", "--split", "fused:0-3,layer:4-27,fused:28-29"]
    done = run(sys.executable, "-m", "tee_worker", "plan", "--model", str(embedded), *split, **columns)
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if str(embedded) not in line]
    assert max(map(len, table)) <= 80
    assert "…" not in done.stdout
    assert re.search(r"model\.layers\.0-3,28-29\.mlp\.up_proj +GPU worker", done.stdout)
    assert re.search(r"model\.layers\.4-27 +GPU worker, with its keys and\s+values", done.stdout)


def test_a_prefill_is_measured_with_a_broker_and_worker_of_its_own_and_equals_the_plan() -> None:
    done = run(
        sys.executable, "-m", "tee_worker", "prefill", "--shape", "smollm2-135m", "--tokens", "12", "--compare", "--json", "--dtype", "bfloat16",
        SHMBROKER_RUNTIME_DIR=f"/tmp/no-broker-{os.getpid()}", SHMBROKER_INSTANCE="",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["analytic"]["equal"]
    assert outcome["report"]["total"]["calls"] == outcome["analytic"]["calls"] == 182
    assert outcome["largest_difference"] < 0.02 * outcome["logits_range"]


@pytest.mark.parametrize("options", [[], ["--shape", "llama-3.2-1b", "--model", "somewhere"], ["--shape", "llama-9"]])
def test_a_model_that_is_not_told_or_told_twice_is_refused_in_one_line(options: list[str]) -> None:
    status, _, error = tee_worker("plan", *options)
    assert status == 1
    assert "give --model DIR" in error or "there are: llama-3.2-1b" in error
    assert len(error.strip().splitlines()) == 1


def test_nothing_is_left_in_shared_memory(broker: shmbroker.LocalBroker) -> None:
    held = [name.kind for name in objects(broker.instance)]
    assert "segment" not in held, "every client has left; bells of living workers remain"
