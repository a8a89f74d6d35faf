"""The plan's figures are those of a run, and its rows those of the model."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from shmbroker.models import Checkpoint
from tee_worker.planning.places import folded
from tee_worker.planning.plan import plan
from tee_worker.planning.splits import Split, Splits
from tee_worker.run_options import GenerateOptions
from tee_worker.split_run import channel_as_asked, split_run


@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("split", [*(one.value for one in Split), "op:0-0,layer:1-2"])
def test_the_arena_of_a_plan_is_the_one_that_a_run_has(tiny_worker: str, tiny: Path, split: str, pipeline: int) -> None:
    source = Checkpoint.at(str(tiny))
    made = plan(source, torch.float32, prompt_tokens=200, new_tokens=4, split=Splits.named(split), pipeline=pipeline)
    planned = {one.split: one.arena_bytes for one in made.splits}
    options = GenerateOptions(model=str(tiny), prompt="", service=tiny_worker, split=split, pipeline=pipeline)
    with split_run(options, source, channel_as_asked, prompt_tokens=200, new_tokens=4) as running:
        assert running.channel.memory.segment.geometry.arena_bytes == planned[split]
    assert msgspec.to_builtins(made)["splits"][0]["arena_bytes"] == planned["linear"]


def test_layers_whose_modules_run_at_the_same_places_are_one_row() -> None:
    layers = [f"model.layers.{index}" for index in range(5)]
    inside = {0: "TEE", 1: "GPU worker", 2: "TEE", 3: "TEE", 4: "elsewhere"}
    places = [("embed", "GPU worker"), *((f"{layer}.mlp.up", inside[index]) for index, layer in enumerate(layers)), ("norm", "TEE")]
    assert list(folded(places, layers)) == [
        ("embed", "GPU worker"),
        ("model.layers.0,2-3.mlp.up", "TEE"),
        ("model.layers.1.mlp.up", "GPU worker"),
        ("model.layers.4.mlp.up", "elsewhere"),
        ("norm", "TEE"),
    ]


def test_layers_are_told_apart_by_all_of_their_modules() -> None:
    layers = ["h.1", "h.10"]
    places = [("h.1.a", "TEE"), ("h.1.b", "TEE"), ("h.10.a", "TEE"), ("h.10.b", "GPU worker")]
    assert list(folded(places, layers)) == places
    assert list(folded(places, [])) == places
