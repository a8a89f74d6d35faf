"""The errors of docs/troubleshooting.md are those of the code, word for word, and every kind of error is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmbroker import errors

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
HEADS = re.findall(r"^### (.+)$", PAGE, re.MULTILINE)
GENERAL = {"ShmBrokerError", "CallError"}
"""Bases, which are never raised where something more is known."""

BY_NAME = {"BadFrame", "PeerRefused"}
"""Errors with many texts, and one remedy."""


def texts(tree: ast.AST) -> Iterator[str]:
    """All texts of a module, with ``...`` for what is filled in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


MESSAGES = [
    text
    for folder in ("shmbroker", "gpu_worker", "tee_worker")
    for path in sorted((ROOT / folder).rglob("*.py"))
    for text in texts(ast.parse(path.read_text()))
]


@pytest.mark.parametrize("head", HEADS)
def test_every_error_that_is_explained_is_raised_in_these_words(head: str) -> None:
    for quoted in re.findall("`([^`]+)`", head):
        if quoted in BY_NAME | {"Bus error"}:
            continue
        pattern = re.compile(".*".join(re.escape(part) for part in quoted.split("...")), re.DOTALL)
        assert any(pattern.search(message) for message in MESSAGES), quoted


def test_every_kind_of_error_is_explained() -> None:
    kinds = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.ShmBrokerError)}
    missing = {kind for kind in kinds - GENERAL if f"`{kind}`" not in PAGE}
    assert not missing
