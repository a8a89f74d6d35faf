"""A TEE worker without weights sees by known answers whether the GPU worker holds the right ones."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import shmbroker
from benchmarks.families.tiny import served, tiny_family
from shmbroker import BadInput
from shmbroker.models import Checkpoint
from shmbroker.models.answers import Answers, answers_file, read_answers, record, record_whole, write_answers
from tee_worker import Split, Splits
from tee_worker.generate import generate
from tee_worker.offloading.known_answers import check_answers
from tee_worker.offloading.offload import offload
from tee_worker.planning.own_part import own_part
from tee_worker.run_options import GenerateOptions
from tests.processes import run

SPLITS = [*Split, "fused:0-0,layer:1-1,block:2-2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_family(tmp_path_factory.mktemp("known") / "model", "qwen2")


@pytest.fixture(scope="module")
def answers(folder: Path) -> Answers:
    return record(Checkpoint.at(folder))


@pytest.fixture
def client(broker: shmbroker.LocalBroker) -> Iterator[shmbroker.Client]:
    with shmbroker.connect(arena="24M") as client:
        yield client


def checked(client: shmbroker.Client, folder: Path, split: Split | str, answers: Answers, dtype: torch.dtype = torch.float32) -> int:
    """How many modules were compared."""
    channel = client.channel("known")
    try:
        model = own_part(Checkpoint.at(folder), dtype, split)
        offloaded = offload(model, channel, split)
        return check_answers(channel, offloaded.structure, Splits.named(split), answers, model.config.hidden_size)
    finally:
        channel.close()


def test_what_is_recorded_layer_by_layer_is_what_the_whole_model_gives(folder: Path, answers: Answers) -> None:
    whole = record_whole(Checkpoint.at(folder).model(torch.float32))
    assert whole.answers.keys() == answers.answers.keys()
    assert max(whole.answers[name].difference(answers.answers[name]) for name in whole.answers) < 1e-6
    assert len(answers.answers) == 3 * (7 + 3) + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"])
def test_a_worker_with_the_same_weights_gives_the_known_answers(
    client: shmbroker.Client, folder: Path, answers: Answers, dtype: torch.dtype
) -> None:
    with served(folder, "known", dtype):
        counts = [checked(client, folder, split, answers, dtype) for split in SPLITS]
    assert counts == [3 * 7 + 2, 3 * 7 + 2, 3 * 7 + 2, 3 * 2 + 2, 3 + 2, 7 + 1 + 2 + 2]


Change = Callable[[torch.Tensor], None]


def one_row(weight: torch.Tensor) -> None:
    weight[3] *= 1.5


def one_column(weight: torch.Tensor) -> None:
    weight[:, 5] += 0.3


def everything_a_little(weight: torch.Tensor) -> None:
    weight += 0.02 * torch.randn_like(weight)


@pytest.mark.parametrize(
    ("split", "parameter", "change"),
    [
        (Split.LINEAR, "model.layers.1.self_attn.q_proj.weight", one_row),
        (Split.FUSED, "model.layers.2.mlp.down_proj.weight", one_column),
        (Split.OP, "model.layers.0.mlp.up_proj.weight", everything_a_little),
        (Split.LAYER, "model.layers.1.input_layernorm.weight", lambda weight: weight.mul_(1.1)),
        (Split.BLOCK, "model.layers.1.self_attn.k_proj.bias", lambda weight: weight.add_(0.5)),
        (Split.BLOCK, "model.layers.2.mlp.gate_proj.weight", one_row),
        (Split.LAYER, "lm_head.weight", one_row),
        (Split.LAYER, "model.embed_tokens.weight", everything_a_little),
    ],
    ids=lambda value: getattr(value, "value", None) or getattr(value, "__name__", str(value)),
)
def test_a_worker_with_other_weights_is_refused_by_the_name_of_the_module(
    client: shmbroker.Client, folder: Path, answers: Answers, tmp_path: Path, split: Split, parameter: str, change: Change
) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    weights = load_file(other / "model.safetensors")
    change(weights[parameter])
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    parts = parameter.split(".")
    depth = {Split.LAYER: 3, Split.BLOCK: 4}.get(split, len(parts) - 1) if parts[1] == "layers" else len(parts) - 1
    with served(other, "known"), pytest.raises(BadInput, match=rf"known answers: {'.'.join(parts[:depth])} of the GPU worker gives other"):
        checked(client, folder, split, answers)


def test_answers_of_another_model_are_refused(client: shmbroker.Client, folder: Path, answers: Answers) -> None:
    fewer = Answers(answers.format, "OtherModel", {})
    with (
        served(folder, "known"),
        pytest.raises(BadInput, match=r"no answer of model\.embed_tokens is known: the answers are of another model"),
    ):
        checked(client, folder, Split.FUSED, fewer)


@pytest.mark.parametrize("content", [b"", b"{", b'{"format": 1}', b'{"format": 99, "model": "x", "answers": {}}'])
def test_a_file_that_is_none_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "known-answers.json"
    file.write_bytes(content)
    with pytest.raises(BadInput, match=r"the known answers in '.*known-answers.json' .*'tee-worker check'"):
        read_answers(file)


def test_the_commands_record_and_compare(broker: shmbroker.LocalBroker, talking: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(talking, model)
    with served(model, "known"):
        assert any("'tee-worker check --model" in note for note in notes_of(model))
        done = run(sys.executable, "-m", "tee_worker", "check", "--model", str(model))
        assert done.returncode == 0, done.stderr
        assert "known answers of LlamaForCausalLM in" in done.stdout
        assert any("modules of the GPU worker give the checkpoint's known answers" in note for note in notes_of(model))
        file = answers_file(Checkpoint.at(model))
        found = json.loads(file.read_text())
        found["answers"]["lm_head"]["signed_sum"] += found["answers"]["lm_head"]["norm"]
        file.rename(tmp_path / "right.json")
        (tmp_path / "wrong.json").write_text(json.dumps(found))
        with pytest.raises(BadInput, match="known answers: lm_head of the GPU worker gives other numbers"):
            notes_of(model, answers=str(tmp_path / "wrong.json"))
        assert any("known answers" in note for note in notes_of(model, answers=str(tmp_path / "right.json")))
        assert not any("known answers" in note or "check" in note for note in notes_of(model, check=False))


def notes_of(model: Path, **options: Any) -> list[str]:
    """What a run of two tokens says on standard error; it counts its own calls alone."""
    notes: list[str] = []
    outcome = generate(GenerateOptions(model=str(model), service="known", prompt="abc", max_new_tokens=2, **options), on_note=notes.append)
    assert outcome.analytic.equal
    return notes


def test_answers_that_cannot_be_written_are_an_error_that_says_so(folder: Path, answers: Answers, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot be written to .*: No such file or directory: name another with --answers FILE"):
        write_answers(tmp_path / "missing" / "known-answers.json", answers)
