"""What the documentation prints is true: scripts run, tables agree with the code, links lead somewhere."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import sys
from pathlib import Path

import pytest

import shmbroker
from shmbroker.arena.spec import CODE_OF, NAME_OF
from shmbroker.control import messages
from shmbroker.lane.frame_layout import KEPT_OP
from shmbroker.memory import layout
from shmbroker.memory.cheader import declaration
from tests.processes import START_SECONDS, check_is_small_and_light, run, running, wait_until

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
assert _spec is not None
assert _spec.loader is not None
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)
README = (ROOT / "README.md").read_text()


def script(name: str) -> str:
    """The first Python block after the script's name."""
    return README.split(f"`{name}`", 1)[1].split("```python\n", 1)[1].split("```", 1)[0]


def test_the_two_scripts_of_the_readme_run_as_printed(tmp_path: Path) -> None:
    for name in ("worker.py", "client.py"):
        assert len(script(name).splitlines()) <= 20
        (tmp_path / name).write_text(script(name))
    with shmbroker.local_broker(), running(sys.executable, str(tmp_path / "worker.py")) as worker:
        done = run(sys.executable, str(tmp_path / "client.py"), SHMBROKER_WAIT=str(START_SECONDS))  # both load torch, on whatever machine
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("True torch.Size([1024, 1024])")
        assert re.search(r"^calls +5 +101 +106$", done.stdout, re.MULTILINE), "double: 1 + 4; matmul: 1 + 100"
        assert worker.poll() is None


@pytest.mark.parametrize("structure", layout.STRUCTURES, ids=lambda structure: structure.__name__)
def test_the_layout_document_agrees_with_the_structures(structure: type[ctypes.LittleEndianStructure]) -> None:
    text = (ROOT / "docs" / "memory-layout.md").read_text()
    head = f"### `{structure.__name__}`, {ctypes.sizeof(structure)} bytes"
    assert head in text
    table = text.split(head, 1)[1].split("###", 1)[0]
    told = {(int(offset), field) for offset, field in re.findall(r"^\| (\d+) \| `([^`]+)` \|", table, re.MULTILINE)}
    true = {
        (layout.offset_of(structure, name), declaration(name, kind))
        for name, kind, *_ in structure._fields_
        if not name.startswith("reserved")
    }
    assert told == true


def test_the_layout_document_lists_every_dtype_and_status_code() -> None:
    text = (ROOT / "docs" / "memory-layout.md").read_text()
    assert f"version {layout.LAYOUT_VERSION}\n" in text
    for dtype, code in CODE_OF.items():
        assert f"| {NAME_OF[dtype]} | {int(code)} |" in text
    for status in layout.Status:
        assert re.search(rf"\| {status.name}[^|]* \| {status.value} \|", text)


def test_the_layout_document_tells_the_op_id_of_calls_about_kept_tensors() -> None:
    text = (ROOT / "docs" / "memory-layout.md").read_text()
    assert f"\nA frame with op id {KEPT_OP} is about kept tensors themselves." in text
    assert f"| `uint32_t op_id` | as given by bind, which counts from {KEPT_OP + 1}; {KEPT_OP}: about kept tensors, see below |" in text
    assert f"\nA tensor with space {layout.Space.KEPT.value} lies in the worker's own memory" in text
    with pytest.raises(ValueError, match="op_id"):
        messages.read_body(messages.open_envelope(messages.encode(messages.Bound(KEPT_OP))))
    assert messages.read_body(messages.open_envelope(messages.encode(messages.Bound(KEPT_OP + 1)))) == messages.Bound(KEPT_OP + 1)


@pytest.mark.parametrize("program", ["shmbroker", "gpu_worker", "tee_worker"])
def test_every_command_of_the_readme_exists_and_every_command_has_a_row(program: str) -> None:
    named = rf"(?:\| |, )`{program.replace('_', '-')} ([\w-]+)"
    of_readme, rows = set(re.findall(named, README)), set(re.findall(named, (ROOT / "docs" / "commands.md").read_text()))
    offered = set(re.findall(r"^  ([\w-]+)  ", run(sys.executable, "-m", program, "--help").stdout.split("Commands:")[1], re.MULTILINE))
    assert of_readme
    assert of_readme <= offered
    assert rows == offered


def test_make_targets_that_documents_name_are_in_the_makefile() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        told = set(re.findall(r"^make ([\w-]+)|`make ([\w-]+)", page.read_text(), re.MULTILINE))
        assert {first or second for first, second in told} <= targets, page


def test_public_names_have_docstrings() -> None:
    for name in shmbroker.__all__:
        if name != "__version__":
            public = getattr(shmbroker, name)
            assert public.__doc__, name
            if isinstance(public, type):
                for attribute, value in vars(public).items():
                    if callable(value) and not attribute.startswith("_"):
                        assert value.__doc__, f"{name}.{attribute}"


def test_the_broker_is_small_and_loads_neither_torch_nor_numpy() -> None:
    with shmbroker.local_broker() as broker:
        wait_until(lambda: Path(f"/proc/{broker.pid}/status").exists())
        check_is_small_and_light(broker.pid)


@pytest.mark.parametrize("page", generate.PAGES)
def test_generated_pages_are_as_the_programs_make_them_now(page: str) -> None:
    assert (ROOT / "docs" / page).read_text() == generate.PAGES[page](), "run: python docs/generate.py"
