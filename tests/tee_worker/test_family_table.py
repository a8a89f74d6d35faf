"""docs/families.md says what happens, and says enough: families whose making is unlike others' are tried again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import shmbroker
from benchmarks.families.measure import EQUAL, measure
from benchmarks.families.names import FAMILIES
from tee_worker import Split

ROOT = Path(__file__).parents[2]
PAGE, README = (ROOT / "docs" / "families.md").read_text(), (ROOT / "README.md").read_text()
FAMILY = re.compile(r"^\| `([\w-]+)` \| (.+) \|$", re.MULTILINE)
TABLE = {name: dict(zip([split.value for split in Split], cells.split(" | "), strict=True)) for name, cells in FAMILY.findall(PAGE)}

UNLIKE_OTHERS = [
    "deepseek_v3",  # latent attention, experts
    "falcon",  # linear layers that are none
    "falcon_h1",  # attention and state space in one layer
    "gemma4",  # a multimodal class, rows of the embedding's weight
    "gpt_neox_japanese",  # attention that returns a bias too
    "gpt_oss",  # sinks
    "llama4_text",  # rotary embeddings of another kind
    "mamba",  # a weight that is not called
    "mpt",  # no masks but biases
    "nanochat",  # no parameter stays here
    "qwen3_vl",  # a class for pictures and text, positions in three dimensions
    "zaya",  # a linear layer that runs several times in a pass
]


@pytest.fixture
def client(broker: shmbroker.LocalBroker) -> Iterator[shmbroker.Client]:
    with shmbroker.connect(arena="24M") as client:
        yield client


def test_the_table_is_of_all_families_that_are_tried() -> None:
    assert list(TABLE) == list(FAMILIES)


@pytest.mark.parametrize(("split", "families"), [("linear", 100), ("fused", 100), ("op", 80), ("block", 75), ("layer", 80)])
def test_so_many_families_are_equal(split: str, families: int) -> None:
    assert sum(told[split] == EQUAL for told in TABLE.values()) >= families


def test_the_readme_claims_what_the_table_shows() -> None:
    told = re.search(
        r"Of (\d+) families .* (\d+) give the numbers of one process at `fused`, (\d+) at `op`, (\d+) at `block` and (\d+) at `layer`",
        README,
    )
    assert told is not None
    counts = [sum(row[split] == EQUAL for row in TABLE.values()) for split in ("fused", "op", "block", "layer")]
    assert [int(number) for number in told.groups()] == [len(TABLE), *counts]


@pytest.mark.parametrize("family", UNLIKE_OTHERS)
def test_a_family_does_what_the_table_says(client: shmbroker.Client, family: str) -> None:
    outcome = measure(client, family, FAMILIES[family])
    assert outcome.wrong == {}
    for split, told in TABLE[family].items():
        if told == EQUAL:
            assert outcome.splits[split] == EQUAL
        else:
            (number,) = re.fullmatch(r"refused \((\d+)\)", told).groups()  # type: ignore[union-attr]
            reason = re.search(rf"^{number}\. (.+)$", PAGE, re.MULTILINE)
            assert reason is not None
            assert outcome.splits[split] == f"refused: {reason[1]}"
