"""The ``units`` command, and what systemd's own programs say of the files."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shmbroker.systemd.units import PACKAGED, UNITS, USERS, closed_folders, install, program_folders, texts
from tests.processes import run

EXPOSURE = {"shmbroker.service": 2.5, "tee-worker@.service": 2.5, "gpu-worker@.service": 3.5}
"""The most that ``systemd-analyze security`` may find; a GPU worker needs its devices."""

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def units(*options: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "shmbroker", "units", *options)


def test_units_are_printed_with_the_paths_of_this_installation() -> None:
    done = units()
    assert done.returncode == 0, done.stderr
    programs = re.findall(r"^ExecStart=(\S+) ", done.stdout, re.MULTILINE)
    assert [Path(program).name for program in programs] == ["shmbroker", "gpu-worker", "tee-worker"]
    assert all(os.access(program, os.X_OK) for program in programs)
    assert "u shmbroker-gpu" in done.stdout


def test_units_are_installed_into_a_folder(tmp_path: Path) -> None:
    done = units("--install", "--dest", str(tmp_path / "new"))
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_text() for path in (tmp_path / "new").iterdir()} == texts()
    new = tmp_path / "new"
    assert f"next: systemd-sysusers {new}/shmbroker-users.conf\n" in done.stdout, "of this file alone, where it is"
    linked = " ".join(str(new / name) for name in UNITS)
    assert f"next: systemctl link {linked} && systemctl enable --now shmbroker.target\n" in done.stdout, "systemd does not look there"


def test_where_systemd_looks_by_itself_it_is_told_to_look_again(tmp_path: Path) -> None:
    done = run(sys.executable, "-m", "shmbroker", "units", "--install", "--user", XDG_CONFIG_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("next: systemctl --user daemon-reload && systemctl --user enable --now shmbroker.target\n")
    assert "sysusers" not in done.stdout


def test_units_of_a_user_ask_for_nothing_that_only_root_can_give(tmp_path: Path) -> None:
    done = units("--install", "--user", "--dest", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(UNITS)
    told = "".join(path.read_text() for path in tmp_path.iterdir())
    assert not re.search(r"^(User|Group|PrivateUsers|ProtectSystem|DeviceAllow)=", told, re.MULTILINE)
    assert "--group" not in told
    assert "WantedBy=default.target" in told
    assert "NoNewPrivileges=yes" in told


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = units("--install", "--dest", str(tmp_path / "file"))
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path}/file/shmbroker.target cannot be written: File exists: run as root, or give --user or --dest\n"


def test_a_python_without_the_console_scripts_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nonexistent")
    with pytest.raises(ValueError, match="there is no program /nonexistent/shmbroker: install the package"):
        texts()


@pytest.mark.parametrize("package", ["shmbroker", "gpu_worker", "tee_worker"])
def test_a_service_is_given_the_folders_of_all_packages(package: str) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    lies_in = Path(spec.origin).resolve().parents[1]
    assert any(lies_in.is_relative_to(folder) for folder in program_folders())


def test_folders_that_other_users_may_not_enter_are_named(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    assert closed_folders([closed]) == [closed], "bound by the units, so what is above does not matter"
    assert closed_folders([Path("/usr")]) == []


@needs_systemd
@pytest.mark.parametrize("user", [False, True])
def test_systemd_has_nothing_to_say_against_them(tmp_path: Path, user: bool) -> None:
    """It warns of unknown keys with exit status 0: any word is a failure."""
    install(texts(user=user), tmp_path, tmp_path)
    files = [str(tmp_path / name) for name in UNITS]
    # Else those that are installed on this machine would be read too.
    done = run(
        "systemd-analyze", *(["--user"] if user else []), "verify", *files, XDG_RUNTIME_DIR=str(tmp_path), SYSTEMD_UNIT_PATH=f"{tmp_path}:"
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_systemd
@pytest.mark.parametrize("unit", EXPOSURE)
@pytest.mark.parametrize("installed", [False, True])
def test_the_sandbox_is_tight(tmp_path: Path, unit: str, installed: bool) -> None:
    path = tmp_path / unit
    path.write_text(texts()[unit] if installed else (PACKAGED / unit).read_text())
    done = run("systemd-analyze", "security", "--offline=true", f"--threshold={int(EXPOSURE[unit] * 10)}", "--no-pager", str(path))
    assert done.returncode == 0, done.stdout.splitlines()[-1]


def test_the_users_file_makes_the_users_of_the_units() -> None:
    made = re.findall(r"^u (\S+) -:shmbroker ", (PACKAGED / USERS).read_text(), re.MULTILINE)
    needed = [re.findall(r"^User=(.+)$", (PACKAGED / unit).read_text(), re.MULTILINE) for unit in EXPOSURE]
    assert sorted(made) == sorted(name for names in needed for name in names)
