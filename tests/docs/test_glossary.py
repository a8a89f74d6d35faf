"""docs/glossary.md has each word once, in order, with a file; words that were given up for another are not used any more."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (ROOT / "docs" / "glossary.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| word ")
]

GIVEN_UP = {
    r"\bclass \w*Place\b|\bdef place\(\) ->": "SegmentStore and store(): place is what an arena does with a block",
    r"\bclass Line\b": "OpReport, ModelServer, StreamKind: one word had three meanings",
    r"\bclass Blocks\b": "LayerHalves: a block is a run of bytes",
    r"\bBlock = Callable\b": "BlockUntil: a block is a run of bytes",
    r"\bbytes_(?:in|out)\b": "sent_bytes and received_bytes, as the client sees them",
}
"""Patterns, and what is said instead."""


def test_each_word_is_there_once_in_order_with_its_meaning_and_its_file() -> None:
    words = [row[0].strip("`").lower() for row in ROWS]
    assert words == sorted(set(words))
    for word, meaning, file in ROWS:
        assert meaning, word
        assert re.fullmatch(r"`[\w/]+\.(?:py|h)`", file), word


@pytest.mark.parametrize("pattern", GIVEN_UP)
def test_a_word_that_was_given_up_does_not_come_back(pattern: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}: {match[0]} (say {GIVEN_UP[pattern]})"
        for folder in ("shmbroker", "gpu_worker", "tee_worker", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for match in re.finditer(pattern, path.read_text())
    ]
    assert not found, "\n".join(found)
