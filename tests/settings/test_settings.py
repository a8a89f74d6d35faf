"""Settings: where each value comes from, what is refused, and that programs and Python take it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

import shmbroker
from shmbroker.settings import load as loading
from shmbroker.settings.kinds import DOORBELL_WORDS, LANE_WORDS, Doorbell, Lane, listed
from shmbroker.settings.load import load, variable_of
from shmbroker.settings.schema import DEFAULTS, OWN_DEFAULTS, Settings
from tests.processes import run

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _nothing_is_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [*(variable_of(name) for name in Settings.__struct_fields__), loading.FILE_VARIABLE]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(loading, "SYSTEM_FILE", tmp_path / "system.toml")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def help_of(program: str, command: str, **environment: str) -> str:
    """As one line: where it is broken depends on the width."""
    return " ".join(run(sys.executable, "-m", program, command, "--help", **environment).stdout.split())


def shmbroker_command(*arguments: str, **environment: str):  # type: ignore[no-untyped-def]
    return run(sys.executable, "-m", "shmbroker", *arguments, **environment)


# --- where values come from -------------------------------------------------------------------------------------------------------------


def test_without_files_and_variables_everything_is_at_its_default() -> None:
    loaded = load()
    assert loaded.settings == DEFAULTS
    assert set(loaded.origins.values()) == {"default"}
    assert loaded.files == ()
    assert loaded.chosen() == {}


def test_the_users_file_wins_over_the_systems_and_variables_win_over_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = write(tmp_path / "system.toml", 'arena = "1G"\nspin = 10\nservice = "a"\n')
    user = write(loading.user_file(), 'spin = 20\nservice = "b"\n')
    monkeypatch.setenv("SHMBROKER_SERVICE", "c")
    loaded = load()
    assert (loaded.settings.arena, loaded.settings.spin, loaded.settings.service) == ("1G", 20.0, "c")
    assert loaded.origins["arena"] == f"file {system}"
    assert loaded.origins["spin"] == f"file {user}"
    assert loaded.origins["service"] == "variable SHMBROKER_SERVICE"
    assert loaded.chosen() == {"arena": "1G", "spin": 20.0, "service": "c"}


def test_a_file_that_is_named_stands_for_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "system.toml", "spin = 10\n")
    write(loading.user_file(), "spin = 20\n")
    named = write(tmp_path / "named.toml", "depth = 8\n")
    monkeypatch.setenv("SHMBROKER_CONFIG", str(named))
    assert load().files == (named,)
    assert load().chosen() == {"depth": 8}
    monkeypatch.setenv("SHMBROKER_CONFIG", "/dev/null")
    assert load().chosen() == {}


def test_an_empty_variable_is_as_if_it_were_not_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "system.toml", "spin = 10\n")
    monkeypatch.setenv("SHMBROKER_SPIN", "")
    assert load().settings.spin == 10.0


def test_a_zero_that_means_nothing_is_no_default_of_a_command_and_any_other_zero_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMBROKER_THREADS", "0")
    monkeypatch.setenv("SHMBROKER_SPIN", "0")
    assert load().chosen() == {"spin": 0.0}


# --- what is refused --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("aerna = 3", "there is no setting 'aerna' (did you mean arena?)"),
        ("bytes = 3", "there is no setting 'bytes' (did you mean max_bytes?)"),
        ("zzz = 3", "there is no setting 'zzz';"),
        ('spin = "fast"', "spin cannot be 'fast': it is a number of at least 0"),
        ("spin = -1", "spin cannot be -1: it is a number of at least 0"),
        ("depth = 1.5", "depth cannot be 1.5: it is a whole number from 1 to 65536"),
        ('lane = "carrier pigeon"', "lane cannot be 'carrier pigeon': it is one of auto, shm, zmq"),
        ('doorbell = "brass"', "doorbell cannot be 'brass': it is one of auto, sem, poll"),
        ('arena = "much"', "arena cannot be 'much': it is a size, e.g. 4096 or '512M'"),
        ('pure_python = "1"', "pure_python cannot be '1': it is true or false (1 or 0)"),
        ("instance = 3", "instance cannot be 3: it is a text"),
        ("[client]\narena = 3", "there is no setting 'client'"),
        ("arena = 512M", "is not TOML"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_with_file_and_key(tmp_path: Path, text: str, told: str) -> None:
    path = write(tmp_path / "system.toml", text)
    with pytest.raises(shmbroker.BadInput, match=re.escape(told)) as caught:
        load()
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "text", "told"),
    [
        ("SHMBROKER_AERNA", "3", "variable SHMBROKER_AERNA is not known (did you mean SHMBROKER_ARENA?)"),
        ("SHMBROKER_PORT", "9464", "variable SHMBROKER_PORT is not known (did you mean SHMBROKER_METRICS_PORT?): unset it"),
        ("SHMBROKER_TCP", "1", "variable SHMBROKER_TCP is not known: unset it"),
        (
            "SHMBROKER_PORT",
            "tcp://10.0.0.1:80",
            "variable SHMBROKER_PORT is not known (Kubernetes sets it for a service named shmbroker: set enable",
        ),
        ("SHMBROKER_PORT_80_TCP_ADDR", "10.0.0.1", "(Kubernetes sets it for a service"),
        ("SHMBROKER_SERVICE_HOST", "10.0.0.1", "(Kubernetes sets it for a service"),
        ("SHMBROKER_SPIN", "fast", "variable SHMBROKER_SPIN cannot be 'fast': it is a number of at least 0"),
        ("SHMBROKER_PURE_PYTHON", "maybe", "it is true or false (1 or 0)"),
        ("SHMBROKER_METRICS_PORT", "70000", "a whole number from 0 to 65535"),
        ("SHMBROKER_CONFIG", "/no/such/file", "the settings in /no/such/file cannot be read: No such file or directory"),
    ],
)
def test_a_variable_that_cannot_be_used_is_told(monkeypatch: pytest.MonkeyPatch, variable: str, text: str, told: str) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(shmbroker.BadInput, match=re.escape(told)):
        load()


@pytest.mark.parametrize("program", ["shmbroker", "gpu_worker", "tee_worker"])
def test_every_program_refuses_a_wrong_setting_in_one_line(program: str) -> None:
    done = run(sys.executable, "-m", program, "serve", SHMBROKER_SPNI="3")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "did you mean SHMBROKER_SPIN?" in done.stderr


def test_what_may_be_asked_for_is_auto_and_what_there_is() -> None:
    assert ("auto", *(lane.value for lane in Lane)) == LANE_WORDS
    assert ("auto", *(doorbell.value for doorbell in Doorbell if doorbell is not Doorbell.SOCKET)) == DOORBELL_WORDS
    assert (listed(LANE_WORDS), listed(LANE_WORDS[1:])) == ("auto, shm or zmq", "shm or zmq")


# --- who takes them -----------------------------------------------------------------------------------------------------------------------


def test_config_prints_every_value_and_where_it_came_from(tmp_path: Path) -> None:
    path = write(tmp_path / "named.toml", 'arena = "1G"\n')
    environment = {"SHMBROKER_CONFIG": str(path), "SHMBROKER_SPIN": "7"}
    done = shmbroker_command("--log-level", "error", "config", "--json", **environment)
    told = json.loads(done.stdout)
    assert told["files"] == [str(path)]
    assert set(told["settings"]) == set(Settings.__struct_fields__)
    assert told["settings"]["arena"] == {"value": "1G", "from": f"file {path}"}
    assert told["settings"]["spin"] == {"value": 7.0, "from": "variable SHMBROKER_SPIN"}
    assert told["settings"]["log_level"] == {"value": "error", "from": "flag --log-level"}
    assert told["settings"]["depth"] == {"value": 64, "from": "default"}
    table = shmbroker_command("config", **environment).stdout
    assert re.search(rf"^arena +1G +file {path} +SHMBROKER_ARENA *$", table, re.MULTILINE)


def test_commands_take_their_defaults_from_the_settings_and_flags_win() -> None:
    told = help_of("gpu_worker", "serve", SHMBROKER_SPIN="7", SHMBROKER_SERVICE="other")
    assert "default: 7.0" in told
    assert "default: other" in told
    words = (sys.executable, "-m", "gpu_worker", "serve", "--shape", "llama-3.2-1b")
    assert "'tpu'" in run(*words, SHMBROKER_DEVICE="tpu").stderr
    assert "'npu'" in run(*words, "--device", "npu", SHMBROKER_DEVICE="tpu").stderr


def test_a_command_keeps_its_own_default_until_the_setting_is_set() -> None:
    assert f"default: {OWN_DEFAULTS['tee-worker generate']['timeout']}" in help_of("tee_worker", "generate")
    assert "default: 9.0" in help_of("tee_worker", "generate", SHMBROKER_TIMEOUT="9")


def test_python_takes_what_is_not_given_from_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMBROKER_ARENA", "1M")
    monkeypatch.setenv("SHMBROKER_TIMEOUT", "7")
    monkeypatch.setenv("SHMBROKER_CHANNELS", "3")
    monkeypatch.setenv("SHMBROKER_SERVICE", "other")
    assert shmbroker.Worker().service == "other"
    assert shmbroker.Worker("given").service == "given"
    with shmbroker.local_broker(), shmbroker.connect() as client:
        assert (client.arena.nbytes, client.timeout, client.segment.geometry.channel_count) == (1 << 20, 7.0, 3)
        with pytest.raises(shmbroker.NoSuchService, match="'other'"):
            client.channel(wait=0)
        with shmbroker.connect(arena="2M", timeout=None) as other:
            assert (other.arena.nbytes, other.timeout) == (2 << 20, None)


def test_a_private_broker_ignores_the_group_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMBROKER_GROUP", "no-such-group")
    with shmbroker.local_broker(), shmbroker.connect(arena="1M"):
        pass


def test_loading_is_cheap() -> None:
    """No process pays for a TOML parser, torch or NumPy because of settings that nobody made."""
    words = "import sys, shmbroker.settings.load; shmbroker.settings.load.load(); print([m for m in ('torch', 'numpy', 'tomllib') if m in sys.modules])"
    assert run(sys.executable, "-c", words).stdout == "[]\n"


def test_the_document_lists_every_setting_with_its_default() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    for name in Settings.__struct_fields__:
        default = getattr(DEFAULTS, name)
        told = str(default).lower() if isinstance(default, bool) else str(default) if default != "" else ""
        row = f"| `{name}` | {f'`{told}`' if told else 'none'} |"
        assert row in text, row


def test_a_secret_that_a_command_reads_from_a_variable_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMBROKER_API_KEY", "secret")
    assert "secret" not in str(load())
