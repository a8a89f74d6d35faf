"""What CONTRIBUTING.md says is told by a test, where no other test tells it."""

from __future__ import annotations

import ast
import hashlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from gpu_worker.device import CpuDevice
from gpu_worker.ops import register
from shmbroker.control import messages
from shmbroker.memory.layout import LAYOUT_VERSION
from shmbroker.models import ops
from shmbroker.settings.schema import Settings
from shmbroker.version import __version__
from tee_worker.planning.splits import Split
from tests.faults.points import all_points

ROOT = Path(__file__).parents[2]
SOURCES = [path for package in ("shmbroker", "gpu_worker", "tee_worker") for path in sorted((ROOT / package).rglob("*.py"))]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
MESSAGES = (5, "70712425628a299c")
"""Version of the protocol, and a digest of all fields of all messages."""

MATRIX = ast.parse((ROOT / "tests" / "faults" / "matrix.py").read_text())


def table(page: str, head: str) -> str:
    """The rows of the table that begins with ``head``."""
    return (ROOT / page).read_text().split(f"\n| {head} |", 1)[1].split("\n\n", 1)[0]


# --- an op --------------------------------------------------------------------------------------------------------------------------------


class Registered:
    """Notes the names of the ops that are registered, as a worker's decorators do."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def op(self, name: str, *, out_spec: object, row_wise: bool = False) -> Any:
        self.names.append(name)
        return lambda function: function

    bound_op = op


def test_every_op_that_both_programs_name_is_registered_by_the_gpu_worker() -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    registered = Registered()
    register(registered, SimpleNamespace(model=LlamaForCausalLM(config)), CpuDevice())  # type: ignore[arg-type]
    named = {value for name, value in vars(ops).items() if name.isupper() and isinstance(value, str)}
    assert sorted(registered.names) == sorted(named)


# --- a split ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", Split, ids=lambda split: split.value)
def test_every_split_is_in_the_tables_and_in_the_help(split: Split) -> None:
    for page in ("README.md", "docs/threat-model.md"):
        assert re.search(rf"^\|(?: `\w+`,)* `{split.value}`", table(page, "split"), re.MULTILINE), page
    of_generate = (ROOT / "docs" / "cli.md").read_text().split("\n## `tee-worker generate`\n", 1)[1]
    help_text = re.search(r"--split TEXT +(.*?)\n +--", of_generate, re.DOTALL)
    assert help_text is not None
    assert re.search(rf"\b{split.value}\b", help_text[1])


# --- a setting ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", Settings.__struct_fields__)
def test_every_setting_is_taken_by_something(name: str) -> None:
    taken = rf'(?:settings|current\(\)|DEFAULTS)\.{name}\b|"--{name.replace("_", "-")}"'
    assert any(re.search(taken, path.read_text()) for path in SOURCES if path.name != "schema.py")


# --- a message ----------------------------------------------------------------------------------------------------------------------------


def test_every_request_is_in_the_list_of_who_asks_whom() -> None:
    told = set(re.findall(r"\b[A-Z]\w+", (messages.__doc__ or "").split("::", 1)[1].split("Every", 1)[0]))
    kinds = {kind.__name__ for kind in messages.AnyMessage.__args__}
    assert told <= kinds
    answers = {kind for kind in kinds if re.match(r"Answer to|The object's|Workers that|All that|It is done|The request", _doc(kind))}
    assert kinds - answers == told


def _doc(kind: str) -> str:
    return str(getattr(messages, kind).__doc__)


def test_messages_that_changed_have_another_version() -> None:
    structs = [kind for _, kind in sorted(vars(messages).items()) if isinstance(kind, type) and issubclass(kind, msgspec.Struct)]
    fields = [f"{kind.__name__}.{name}: {told}" for kind in structs for name, told in vars(kind).get("__annotations__", {}).items()]
    digest = hashlib.sha256("\n".join(fields).encode()).hexdigest()[:16]
    assert (messages.PROTOCOL_VERSION, digest) == MESSAGES, (
        "the messages are others than they were: PROTOCOL_VERSION must be one above that of the last release; then write down the new pair"
    )


# --- a fault point ------------------------------------------------------------------------------------------------------------------------


def roles() -> dict[str, dict[str, int]]:
    """``ROLES`` of the kill matrix, read and not imported: importing it makes the points calls."""
    found = next(node.value for node in MATRIX.body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "ROLES")
    assert found is not None
    cases: dict[str, dict[str, int]] = ast.literal_eval(found)
    return cases


def test_somebody_is_killed_at_every_fault_point() -> None:
    assert set(all_points()) <= {point for cases in roles().values() for point in cases}


def test_the_document_tells_how_many_points_and_cases_there_are() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    cases = sum(len(cases) for cases in roles().values())
    assert f"mark {len(all_points())} steps" in text
    assert f"{cases} cases" in text
    assert f"All {cases} hold" in text


# --- a release ----------------------------------------------------------------------------------------------------------------------------


def test_the_changelog_has_this_version_and_tells_of_each_its_layout_and_protocol() -> None:
    versions = re.findall(r"^## \[([^\]]+)\](?: - \d{4}-\d\d-\d\d)?\n\nLayout (\d+), protocol (\d+)", CHANGELOG, re.MULTILINE)
    assert [version for version, _, _ in versions] == re.findall(r"^## \[([^\]]+)\]", CHANGELOG, re.MULTILINE)
    assert versions[0][0] == "Unreleased"
    assert versions[1][0] == __version__
    assert (int(versions[0][1]), int(versions[0][2])) == (LAYOUT_VERSION, messages.PROTOCOL_VERSION)
