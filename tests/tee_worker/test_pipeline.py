"""Mixed splits, and passes in parts that are on their way at once: the same tokens, and the traffic that was planned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, PreTrainedModel

import shmbroker
from shmbroker.models.checkpoint import Checkpoint
from tee_worker import Split, Splits, offload
from tee_worker.planning.own_part import own_part
from tee_worker.planning.pass_parts import SHORTEST_CHUNK, parts_of
from tee_worker.planning.plan import plan
from tee_worker.planning.structure import structure_of
from tee_worker.planning.traffic import generation_traffic

TOKENS = 5 * SHORTEST_CHUNK + 3
NEW_TOKENS = 6
MIXED = "fused:0,op:1,layer:2"


def prompt(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, 90, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


def generate(model: PreTrainedModel, ids: torch.Tensor, **arguments: object) -> torch.Tensor:
    arguments.setdefault("attention_mask", torch.ones_like(ids))
    with torch.inference_mode():
        output: torch.Tensor = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, **arguments)  # type: ignore[operator]
    return output


@pytest.mark.parametrize("split", ["linear:0,block:1,layer:2", MIXED, "block:0-1,op:2", "layer:0,fused:1-2"])
def test_a_mixed_split_gives_the_tokens_of_the_whole_model_with_the_planned_traffic(
    client: shmbroker.Client, tiny: Path, tiny_worker: str, whole: PreTrainedModel, split: str
) -> None:
    channel = client.channel(tiny_worker)
    parts = own_part(Checkpoint.at(tiny), torch.float32, split)
    structure = offload(parts, channel, split).structure
    ids = prompt(1, 9)
    assert torch.equal(generate(parts, ids), generate(whole, ids))
    planned = generation_traffic(structure, split, prompt_tokens=9, new_tokens=NEW_TOKENS)
    report = channel.report()
    assert (report.total.calls, report.total.sent_bytes, report.total.received_bytes) == (
        planned.calls,
        planned.sent_bytes,
        planned.received_bytes,
    )
    assert {line.op: line.calls for line in report.ops} == planned.calls_by_op


@pytest.mark.parametrize("split", [*Split, MIXED])
@pytest.mark.parametrize(("rows", "tokens"), [(1, TOKENS), (3, 7)])
def test_a_pipeline_gives_the_tokens_of_the_whole_model_with_the_planned_traffic(
    client: shmbroker.Client, tiny: Path, tiny_worker: str, whole: PreTrainedModel, split: str, rows: int, tokens: int
) -> None:
    channel = client.channel(tiny_worker)
    parts = own_part(Checkpoint.at(tiny), torch.float32, split)
    structure = offload(parts, channel, split, pipeline=3).structure
    ids = prompt(rows, tokens)
    assert torch.equal(generate(parts, ids), generate(whole, ids))
    planned = generation_traffic(structure, split, prompt_tokens=tokens, new_tokens=NEW_TOKENS, batch=rows, pipeline=3)
    assert {line.op: line.calls for line in channel.report().ops} == planned.calls_by_op
    total = channel.report().total
    assert (total.sent_bytes, total.received_bytes) == (planned.sent_bytes, planned.received_bytes)


@pytest.mark.parametrize("split", [Split.FUSED, Split.OP, Split.BLOCK])
def test_padding_and_a_conversation_go_through_a_pipeline(
    client: shmbroker.Client, tiny: Path, tiny_worker: str, whole: PreTrainedModel, split: Split
) -> None:
    parts = own_part(Checkpoint.at(tiny), torch.float32, split)
    offload(parts, client.channel(tiny_worker), split, pipeline=2)
    ids = prompt(3, 11)
    ids[0, :4] = ids[2, :1] = 0
    mask = (ids != 0).long()
    assert torch.equal(generate(parts, ids, attention_mask=mask), generate(whole, ids, attention_mask=mask))
    found = []
    for model in (parts, whole):
        cache = DynamicCache(config=model.config)
        first = generate(model, prompt(1, TOKENS), past_key_values=cache)
        found.append(generate(model, torch.cat([first, prompt(1, 2 * SHORTEST_CHUNK)], dim=1), past_key_values=cache))
    assert torch.equal(found[0], found[1])


def test_beam_search_with_micro_batches_says_that_it_cannot_be_done(client: shmbroker.Client, tiny: Path, tiny_worker: str) -> None:
    parts = own_part(Checkpoint.at(tiny), torch.float32)
    offload(parts, client.channel(tiny_worker), pipeline=2)
    with pytest.raises(shmbroker.BadInput, match="need --pipeline 1"):
        generate(parts, prompt(2, 5), num_beams=2)


def test_an_error_in_one_chunk_ends_the_pass_and_the_next_pass_is_right(
    client: shmbroker.Client, tiny: Path, tiny_worker: str, whole: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = own_part(Checkpoint.at(tiny), torch.float32)
    offload(parts, client.channel(tiny_worker), pipeline=3)
    ids, bad = prompt(1, TOKENS), prompt(1, TOKENS)
    bad[0, 2 * TOKENS // 3] = 10**6  # no such token: the worker says so, to one chunk
    with pytest.raises(shmbroker.RemoteOpError):
        generate(parts, bad)
    assert torch.equal(generate(parts, ids), generate(whole, ids))


@pytest.mark.parametrize(
    ("split", "says"),
    [
        ("fused:0-1", "3 layers, 0 to 2; the ranges end at 1"),
        ("fused:0-3", "ends at 3|end at 3"),
        ("fused:1-2", "should begin at layer 0"),
        ("fused:0-1,op:1-2", "should begin at layer 2"),
        ("fused:0-1,sop:2", "'sop' is not known"),
        ("fused:0-1;op:2", "is not SPLIT:FIRST-LAST"),
    ],
)
def test_a_mixed_split_that_does_not_fit_is_refused(client: shmbroker.Client, tiny: Path, tiny_worker: str, split: str, says: str) -> None:
    with pytest.raises(shmbroker.BadInput, match=says):
        offload(own_part(Checkpoint.at(tiny), torch.float32, split), client.channel(tiny_worker), split)


@given(st.integers(1, 9), st.integers(1, 2000), st.integers(1, 12))
def test_parts_cover_a_pass_once(batch: int, tokens: int, ways: int) -> None:
    parts = parts_of(batch, tokens, ways)
    assert 1 <= len(parts) <= ways
    assert sum(part.rows * part.tokens for part in parts) == batch * tokens
    following = 0
    for part in parts:
        assert (part.first_row if batch > 1 else part.first_token) == following
        following += part.rows if batch > 1 else part.tokens


@given(st.lists(st.tuples(st.sampled_from(Split), st.integers(1, 9)), min_size=1, max_size=6))
def test_a_mixed_split_reads_as_it_is_written(runs: list[tuple[Split, int]]) -> None:
    layers = [split for split, count in runs for _ in range(count)]
    text, first = [], 0
    for split, count in runs:
        text.append(f"{split.value}:{first}-{first + count - 1}")
        first += count
    splits = Splits.named(",".join(text))
    assert list(splits.of_layers(len(layers))) == layers
    assert Splits.named(str(splits)) == splits


@pytest.mark.parametrize("split", [*Split, MIXED])
def test_the_plan_of_the_whole_model_is_that_of_the_part_that_is_loaded(tiny: Path, split: str) -> None:
    source = Checkpoint.at(tiny)
    told = plan(source, torch.float32, prompt_tokens=20, new_tokens=3, split=Splits.named(split))
    own = structure_of(own_part(source, torch.float32, split), split)
    expected = generation_traffic(own, split, prompt_tokens=20, new_tokens=3)
    found = next(one for one in told.splits if one.split == str(Splits.named(split)))
    assert (found.calls, found.sent_bytes, found.received_bytes) == (expected.calls, expected.sent_bytes, expected.received_bytes)
    assert found.calls_by_op == expected.calls_by_op
    places = dict(told.places)
    for index, one in enumerate(Splits.named(split).of_layers(3)):
        inside = {name: where for name, where in places.items() if name.startswith(f"model.layers.{index}")}
        assert ("mlp.down_proj" in " ".join(inside)) == (not one.stateful)
        assert all(where.startswith("GPU worker") for name, where in inside.items() if "norm" not in name) == one.stateful
