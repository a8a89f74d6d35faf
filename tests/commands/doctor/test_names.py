"""The doctor on names that a logout takes away: beforehand by how systemd-logind is set, afterwards by what is missing."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

import shmbroker
from shmbroker.commands.doctor import files, names
from shmbroker.commands.doctor.check import State
from shmbroker.control.status import ask
from shmbroker.memory.reaper import objects
from tests.commands.doctor.test_doctor import doctor, only
from tests.processes import worker_process

USER = 12345


@pytest.fixture
def logind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which systemd runs, with its files below this folder."""
    for name in ("usr", "run", "etc", "linger"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(names, "LOGIND_FILES", tuple(str(tmp_path / place / "logind.conf") for place in ("usr", "run", "etc")))
    monkeypatch.setattr(names, "LINGER", str(tmp_path / "linger"))
    monkeypatch.setattr(names, "SYSTEMD_RUNS", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: USER)
    return tmp_path


def logout() -> tuple[State, str, str]:
    (check,) = names.checks("default", None)
    return check.state, check.text, check.remedy


def test_a_user_whose_shared_memory_ends_with_his_session_is_told_what_to_do(logind: Path) -> None:
    state, text, remedy = logout()
    assert state is State.WARN
    assert f"when the last session of user {USER} ends, systemd-logind removes" in text
    assert f"loginctl enable-linger {USER}" in remedy
    (logind / "linger" / str(USER)).touch()
    assert logout()[0] is State.OK


def test_a_system_user_has_nothing_to_fear(logind: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", names.last_system_user)
    assert logout()[0] is State.OK


@pytest.mark.parametrize(
    ("written", "removes"),
    [
        ({}, True),
        ({"etc/logind.conf": "[Login]\n#RemoveIPC=no\n"}, True),
        ({"etc/logind.conf": "[Login]\nRemoveIPC=no\n"}, False),
        ({"usr/logind.conf": "[Login]\nRemoveIPC=no\n", "etc/logind.conf": "[Login]\nKillUserProcesses=no\n"}, True),
        ({"etc/logind.conf": "[Login]\nRemoveIPC=yes\n", "usr/logind.conf.d/50-ours.conf": "[Login]\nRemoveIPC=off\n"}, False),
        ({"usr/logind.conf.d/50-a.conf": "[Login]\nRemoveIPC=no\n", "etc/logind.conf.d/50-a.conf": "[Login]\nRemoveIPC=yes\n"}, True),
        ({"etc/logind.conf": "no ini file"}, True),
    ],
)
def test_what_logind_is_set_to_is_read_as_logind_reads_it(logind: Path, written: dict[str, str], removes: bool) -> None:
    for name, text in written.items():
        (logind / name).parent.mkdir(exist_ok=True)
        (logind / name).write_text(text)
    assert names.removes_ipc() == removes
    assert (logout()[0] is State.WARN) == removes


def test_names_that_are_missing_under_the_living_are_told_with_whose_they_are_and_the_remedy() -> None:
    with shmbroker.local_broker() as broker, worker_process() as process:
        assert only(doctor(), "names")["state"] == "ok"
        for name in objects(broker.instance):
            os.unlink(name.path)
        check = only(doctor(), "names")
        assert check["state"] == "warn"
        assert f"worker test-worker (pid {process.pid})" in check["text"]
        assert "loginctl enable-linger" in check["remedy"]


def test_a_broker_that_has_few_files_left_is_told() -> None:
    with shmbroker.local_broker() as broker:
        (check,) = files.checks(ask(None))
        assert check.state is State.OK
        opened = check.figures["open"]
        resource.prlimit(broker.pid, resource.RLIMIT_NOFILE, (opened + 20, opened + 20))
        (check,) = files.checks(ask(None))
        assert check.state is State.WARN
        assert check.figures["limit"] == opened + 20
