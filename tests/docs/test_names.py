"""What documents name is there: files, modules and what is in them, commands' files, and the documents that the code names."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
OF_NOW = [page for page in PAGES if page.name != "CHANGELOG.md"]
"""A changelog names what was."""

FILE = re.compile(r"(?<![\w/.~$@-])(?:shmbroker|gpu_worker|tee_worker|tests|benchmarks|docs)/[\w./@-]*\w/?")
MODULE = re.compile(r"(?<![\w/.-])(?:shmbroker|gpu_worker|tee_worker|tests|benchmarks)(?:\.[A-Za-z_]\w*)+(?![\w/-])")
NO_MODULE = re.compile(r"\.(?:toml|h|service|target|instance|x|sock|env|md)$")
"""Ends of names that only look like one: files, and objects in shared memory."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_to_headings(page: Path) -> None:
    for target, fragment in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", page.read_text()):
        file = page.parent / target if target else page
        assert file.exists(), target
        if fragment and file.suffix == ".md":
            heads = [
                re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            ]
            assert fragment[1:] in heads, f"{target}{fragment}"


@pytest.mark.parametrize("page", OF_NOW, ids=name_of)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    missing = {named for named in FILE.findall(page.read_text()) if not (ROOT / named).exists()}
    assert not missing


@pytest.mark.parametrize("page", OF_NOW, ids=name_of)
def test_modules_and_names_that_a_page_names_are_there(page: Path) -> None:
    for dotted in set(MODULE.findall(page.read_text())):
        if not NO_MODULE.search(dotted):
            found(dotted)


def found(dotted: str) -> Any:
    """The module, or what is in it, that a dotted name leads to."""
    parts = dotted.split(".")
    thing = importlib.import_module(parts[0])
    for index, part in enumerate(parts[1:], 2):
        try:
            thing = getattr(thing, part)
        except AttributeError:
            thing = importlib.import_module(".".join(parts[:index]))
    return thing


def test_documents_that_the_code_names_are_there() -> None:
    sources = [path for package in ("shmbroker", "gpu_worker", "tee_worker", "benchmarks") for path in (ROOT / package).rglob("*.*")]
    text = "\n".join(path.read_text() for path in sources if path.suffix in (".py", ".pyi", ".c", ".h", ".service", ".json"))
    for named in {*re.findall(r"\bdocs/[\w/.-]+\.\w+", text)}:
        assert (ROOT / named).exists(), named


def test_every_document_is_in_the_index_of_the_readme() -> None:
    index = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in index, page.name
