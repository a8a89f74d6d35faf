"""docs/decisions.md has a date and a status for each entry, and what is superseded names what took its place."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "decisions.md").read_text()
ENTRY = re.compile(r'\*\d{4}-\d\d-\d\d, (?:accepted|superseded by "([^"]+)")\.\* \*\*(.+?)\*\*', re.DOTALL)


def test_every_entry_begins_with_its_date_and_status_and_its_sentence() -> None:
    _, *sections = PAGE.split("\n## ")
    entries = [entry for section in sections for entry in section.split("\n\n")[1:]]
    assert len(entries) > 50
    assert [entry[:60] for entry in entries if not ENTRY.match(entry)] == []


def test_what_is_superseded_names_an_entry_that_holds() -> None:
    found = [(superseded, " ".join(title.split())) for superseded, title in ENTRY.findall(PAGE)]
    holding = {title.rstrip(".") for superseded, title in found if not superseded}
    assert len({title for _, title in found}) == len(found), "an entry is there twice"
    assert {superseded for superseded, _ in found if superseded} <= holding
