"""What the trust modes refuse, each with its reason; and the floor, which nothing lowers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import shmbroker
from gpu_worker.device import CpuDevice
from gpu_worker.ops import register
from gpu_worker.weights import Weights
from shmbroker import BadInput, WorkerLost
from shmbroker.models import Checkpoint, model_digest
from shmbroker.settings import load as loading
from shmbroker.worker import Worker
from tee_worker import offload
from tee_worker.cli import cli
from tee_worker.trust.modes import Arithmetic, Trust, TrustOptions
from tee_worker.trust.run import whole_model as pinned
from tests.processes import run
from tests.threads import STUCK_SECONDS, InThread
from tests.trust.conftest import BLIND, DEALT, SHARES, VERIFY, whole_model, worker


@contextlib.contextmanager
def serving(service: str) -> Iterator[None]:
    """A worker without a model, in a thread of this process."""
    with run_in_thread(Worker(service)):
        yield


@contextlib.contextmanager
def run_in_thread(worker: Worker) -> Iterator[None]:
    ready = threading.Event()
    running = InThread(lambda: worker.serve(ready.set))
    try:
        assert ready.wait(STUCK_SECONDS)
        yield
    finally:
        worker.stop()
        running.join()


@contextlib.contextmanager
def serving_model(folder: Path, service: str) -> Iterator[None]:
    """A worker with a model, in a thread of this process."""
    device = CpuDevice()
    worker = Worker(service, identity=Weights.load(Checkpoint.at(folder), torch.float32, device).identity)
    register(worker, Weights.load(Checkpoint.at(folder), torch.float32, device), device)
    with run_in_thread(worker):
        yield


@pytest.mark.parametrize("mode", ["verify", "blind", "shares"])
@pytest.mark.parametrize("split", ["op", "block", "layer", "fused:0-1,layer:2-2"])
def test_splits_at_which_more_than_products_leaves(
    client: shmbroker.Client, tiny: Path, workers: tuple[str, str], mode: str, split: str
) -> None:
    options = TrustOptions(mode=Trust(mode), same_host_shares=mode == "shares")
    with pytest.raises(BadInput, match=rf"split '\w+' is not possible at trust '{mode}': .*; use split 'linear' or 'fused'"):
        offload(whole_model(tiny), client.channel(workers[0]), split, trust=options, check=False)


BAD: dict[str, tuple[Callable[[], TrustOptions], str]] = {
    "an unknown mode": (lambda: TrustOptions.named("trusting"), "trust 'trusting' is not known; there are: plain, verify, shares, blind"),
    "float elsewhere": (lambda: TrustOptions(mode=Trust.BLIND, arithmetic=Arithmetic.FLOAT), "arithmetic 'float' is of mode 'verify'"),
    "other bits": (lambda: TrustOptions(mode=Trust.VERIFY, bits=10), "weights of 10 bits are not known; there are: 8, 12, 14"),
    "no rows": (lambda: TrustOptions(mode=Trust.BLIND, hide_lengths=0), "hide_lengths 0 must be 1 or more rows"),
    "fewer than no pads": (lambda: TrustOptions(mode=Trust.BLIND, pads=-1), "pads -1 must be 0 or more rows"),
    "bits of no integers": (lambda: TrustOptions(bits=14), "bits are of the exact modes: at 'plain'"),
    "bits of floats": (lambda: TrustOptions(mode=Trust.VERIFY, arithmetic=Arithmetic.FLOAT, bits=8), "bits are of the exact modes"),
    "pads of nobody": (lambda: TrustOptions(mode=Trust.VERIFY, pads=9), "pads are made ahead at mode 'blind' alone"),
    "lengths in plain": (lambda: TrustOptions(hide_lengths=4), "at 'plain' the worker sees every row as it is"),
    "lengths that are seen": (lambda: TrustOptions(mode=Trust.VERIFY, hide_lengths=8), "at 'verify' the worker sees every row as it is"),
}


@pytest.mark.parametrize("what", BAD)
def test_options_that_do_not_fit_together(what: str) -> None:
    make, match = BAD[what]
    with pytest.raises(BadInput, match=match):
        make()


def test_workers_that_are_one_or_hide_nothing(
    client: shmbroker.Client, other_client: shmbroker.Client, tiny: Path, workers: tuple[str, str]
) -> None:
    """T5, T6."""
    channel, other = client.channel(workers[0]), other_client.channel(workers[1])
    cases: list[tuple[object, TrustOptions, str]] = [
        (None, SHARES, "needs a second worker"),
        (other, TrustOptions(mode=Trust.SHARES), "both workers are on this host: .*same_host_shares"),
        (other, TrustOptions(mode=Trust.BLIND), "both workers are on this host: .*same_host_shares"),
        (client.channel(workers[1]), SHARES, "both workers would map one segment"),
        (other_client.channel(workers[0]), SHARES, "both workers offer service 'first'"),
        (other_client.channel(workers[0]), DEALT, "both workers offer service 'first'"),
        (None, DEALT, "same_host_shares is of two workers"),
        (other, VERIFY, "a second worker is of modes 'shares' and 'blind'"),
        (other, TrustOptions(), "a second worker is of trust 'shares' and 'blind'"),
    ]
    for second, options, match in cases:
        model = whole_model(tiny)
        with pytest.raises(BadInput, match=match):
            offload(model, channel, trust=options, second=second, check=False)  # type: ignore[arg-type]
        assert model.get_output_embeddings().weight is not None, "the model is as it was"


def test_one_process_that_is_both_workers_is_refused(client: shmbroker.Client, other_client: shmbroker.Client, tiny: Path) -> None:
    """T5."""
    with (
        serving("double-a"),
        serving("double-b"),
        pytest.raises(WorkerLost, match="is both workers now"),
    ):
        offload(
            whole_model(tiny),
            client.channel("double-a", wait=30),
            trust=SHARES,
            second=other_client.channel("double-b", wait=30),
            check=False,
        )


def test_a_worker_of_the_other_role_takes_over_from_nobody(
    client: shmbroker.Client, other_client: shmbroker.Client, tiny: Path, broker: shmbroker.LocalBroker
) -> None:
    """T5: it offers the first one's service too, and is there when that dies."""
    with worker(tiny, "rows"), serving_model(tiny, "pads"), serving_model(tiny, "rows"):
        channel = client.failover_channel("rows", patience=1.0)
        second = other_client.channel("pads", wait=30)
        if channel.worker_pid == os.getpid():
            channel.replace(channel.channel, WorkerLost("so that the other one is in use"))
        moved = offload(whole_model(tiny), channel, trust=SHARES, second=second, check=False)
        assert channel.worker_pid != second.worker_pid
        os.kill(channel.worker_pid, signal.SIGKILL)
        with pytest.raises(WorkerLost, match="must not be given this"), torch.no_grad():
            moved.model(torch.tensor([[5, 6]]))
        assert moved.sealed is not None
        moved.sealed.close()


def test_numbers_in_files_cannot_be_changed_after_they_were_hashed(tiny: Path, tmp_path: Path) -> None:
    """What is computed with is what was hashed, whatever becomes of the file."""
    copied = shutil.copytree(tiny, tmp_path / "copied")
    model = pinned(Checkpoint.at(copied), torch.float32, model_digest(whole_model(tiny)))
    file = next(copied.glob("*.safetensors"))
    size = file.stat().st_size
    with file.open("r+b") as writing:
        writing.seek(size // 2)
        writing.write(b"\x7f" * (size - size // 2))
    assert model_digest(model) == model_digest(whole_model(tiny))
    with pytest.raises(BadInput, match="is another than --model-digest says"):
        pinned(Checkpoint.at(copied), torch.float32, model_digest(whole_model(tiny)))


def test_what_is_generated_by_is_part_of_the_digest(tiny: Path) -> None:
    model = whole_model(tiny)
    before = model_digest(model)
    assert model.generation_config is not None
    model.generation_config.suppress_tokens = [7]
    assert model_digest(model) != before


def test_a_worker_without_the_op_or_with_other_weights(client: shmbroker.Client, tiny: Path, workers: tuple[str, str]) -> None:
    with serving("plain-only"), pytest.raises(BadInput, match="ring_linear"):
        offload(whole_model(tiny), client.channel("plain-only", wait=30), trust=VERIFY, check=False)
    model = whole_model(tiny)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    with pytest.raises(shmbroker.RemoteOpError, match=r"model\.layers\.1\.mlp\.down_proj\.weight has other values here"):
        offload(model, client.channel(workers[0]), trust=VERIFY, check=False)


def test_numbers_that_are_not_finite_are_told_with_their_module(client: shmbroker.Client, tiny: Path, workers: tuple[str, str]) -> None:
    model = whole_model(tiny)
    moved = offload(model, client.channel(workers[0]), trust=BLIND, check=False)
    assert moved.sealed is not None
    with torch.no_grad():
        model.get_input_embeddings().weight[5, 0] = torch.nan
    with pytest.raises(BadInput, match=r"model\.layers\.0\.self_attn.* not finite"), torch.inference_mode():
        model(torch.tensor([[5, 6]]))
    moved.sealed.close()


@pytest.mark.parametrize("options", [VERIFY, BLIND, TrustOptions(mode=Trust.VERIFY, arithmetic=Arithmetic.FLOAT)])
def test_no_gradient_comes_back_and_that_is_said(
    client: shmbroker.Client, tiny: Path, workers: tuple[str, str], options: TrustOptions
) -> None:
    model = whole_model(tiny)
    moved = offload(model, client.channel(workers[0]), trust=options, check=False)
    assert moved.sealed is not None
    embeds = torch.randn(1, 3, model.config.hidden_size, requires_grad=True)
    with pytest.raises(BadInput, match="requires grad, and no gradient comes back"):
        model(inputs_embeds=embeds)
    with torch.no_grad():
        model(inputs_embeds=embeds)
    moved.sealed.close()


def test_arithmetic_float_needs_float32(client: shmbroker.Client, tiny: Path, workers: tuple[str, str]) -> None:
    model = whole_model(tiny).to(torch.bfloat16)
    with pytest.raises(BadInput, match="needs results in float32"):
        offload(model, client.channel(workers[0]), trust=TrustOptions(mode=Trust.VERIFY, arithmetic=Arithmetic.FLOAT), check=False)


# --- the floor --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Path]:
    """The machine's file, the user's, and a third one: they are not there yet."""
    monkeypatch.setattr(loading, "SYSTEM_FILE", tmp_path / "system.toml")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "shmbroker").mkdir()
    return {"system": tmp_path / "system.toml", "user": tmp_path / "shmbroker" / "shmbroker.toml", "named": tmp_path / "named.toml"}


def floor() -> str:
    return loading.current().trust_floor


def test_no_file_and_no_variable_lowers_the_floor(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """T4."""
    assert floor() == "plain"
    files["system"].write_text('trust_floor = "verify"')
    assert floor() == "verify"
    files["user"].write_text('trust_floor = "plain"')
    assert floor() == "verify"
    monkeypatch.setenv("SHMBROKER_TRUST_FLOOR", "plain")
    assert floor() == "verify"
    files["named"].write_text('trust_floor = "plain"')
    monkeypatch.setenv("SHMBROKER_CONFIG", str(files["named"]))
    assert floor() == "verify", "the machine's file counts though another is named"
    assert "system.toml" in loading.load().origins["trust_floor"]
    monkeypatch.setenv("SHMBROKER_TRUST_FLOOR", "blind")
    assert floor() == "blind", "whoever likes may raise it"
    monkeypatch.setenv("SHMBROKER_TRUST_FLOOR", "low")
    with pytest.raises(BadInput, match="one of plain, verify, shares, blind"):
        floor()


UNDER: dict[str, list[TrustOptions]] = {
    "verify": [TrustOptions(), TrustOptions(mode=Trust.VERIFY, arithmetic=Arithmetic.FLOAT)],
    "shares": [TrustOptions(), VERIFY, SHARES, DEALT],  # on one host they hide nothing from it
    "blind": [TrustOptions(), VERIFY, SHARES, DEALT],
}


@pytest.mark.parametrize("least", UNDER)
def test_what_is_below_the_floor_is_not_started(
    files: dict[str, Path], client: shmbroker.Client, other_client: shmbroker.Client, tiny: Path, workers: tuple[str, str], least: str
) -> None:
    """T4."""
    channel, other = client.channel(workers[0]), other_client.channel(workers[1])
    files["system"].write_text(f'trust_floor = "{least}"')
    for options in UNDER[least]:
        second = other if options.same_host_shares else None
        with pytest.raises(BadInput, match=f"below the floor that is set here, trust_floor = '{least}'"):
            offload(whole_model(tiny), channel, trust=options, second=second, check=False)
    moved = offload(whole_model(tiny), channel, trust=BLIND, check=False)
    assert moved.sealed is not None
    moved.sealed.close()


# --- on the command line ----------------------------------------------------------------------------------------------------------------


def tee_worker(*arguments: str, **environment: str) -> tuple[int, str, str]:
    done = run(sys.executable, "-m", "tee_worker", *arguments, **environment)
    return done.returncode, done.stdout, done.stderr


def test_the_command_line_refuses_what_cannot_be(broker: shmbroker.LocalBroker, tiny: Path, workers: tuple[str, str]) -> None:
    digest = model_digest(whole_model(tiny))
    prefill = ["prefill", "--model", str(tiny), "--tokens", "4", "--split", "fused", "--service", workers[0]]
    cases = [
        (["--trust", "verify"], "--trust verify needs --model-digest: .*'tee-worker digest --model"),
        (["--trust", "blind", "--model-digest", "sha256:00"], rf"is another than --model-digest says: it is {digest}"),
        (["--model-digest", digest], "--model-digest is compared above --trust plain alone"),
        (["--trust", "verify", "--model-digest", digest, "--answers", "x.json"], "--answers is of --trust plain"),
        (["--trust", "blind", "--same-host-shares", "--model-digest", digest], "--same-host-shares is of two workers"),
        (["--trust", "verify", "--second", "x", "--model-digest", digest], "--second is of --trust shares"),
        (["--pads-from", "x", "--trust", "shares", "--second", "y", "--model-digest", digest], "--pads-from is of --trust blind"),
        (["--trust", "shares", "--model-digest", digest], "--trust shares needs a second worker: --second SERVICE"),
        (["--trust", "shares", "--second", workers[0], "--model-digest", digest], "both workers offer service 'first'"),
        (["--trust", "shares", "--second", workers[1], "--model-digest", digest], "both workers are on this host: .*--same-host-shares"),
        (["--trust", "verify", "--split", "layer", "--model-digest", digest], "split 'layer' is not possible at trust 'verify'"),
        (
            ["--trust", "verify", "--arithmetic", "float", "--dtype", "bfloat16", "--model-digest", digest],
            "--arithmetic float needs results in float32",
        ),
    ]
    for arguments, match in cases:
        result = CliRunner().invoke(cli, [*prefill, *arguments])
        assert isinstance(result.exception, BadInput), (arguments, result.output, result.exception)
        assert re.search(match, str(result.exception)), (arguments, str(result.exception))


def test_a_floor_in_the_environment_stops_a_flag(broker: shmbroker.LocalBroker, tiny: Path) -> None:
    """T4."""
    code, _, stderr = tee_worker("prefill", "--model", str(tiny), "--split", "fused", "--trust", "plain", SHMBROKER_TRUST_FLOOR="verify")
    assert code != 0
    assert "trust 'plain' is below the floor that is set here, trust_floor = 'verify'" in stderr


def test_a_blind_prefill_from_the_command_line(broker: shmbroker.LocalBroker, tiny: Path, workers: tuple[str, str]) -> None:
    code, stdout, stderr = tee_worker("digest", "--model", str(tiny))
    assert (code, stderr) == (0, "")
    assert stdout.strip() == model_digest(whole_model(tiny))
    code, stdout, stderr = tee_worker(
        "prefill", "--model", str(tiny), "--tokens", "9", "--split", "fused", "--trust", "blind", "--pads", "4", "--service", workers[0],
        "--model-digest", stdout.strip(), "--json",
    )  # fmt: skip
    assert code == 0, stderr
    outcome = json.loads(stdout)
    assert outcome["analytic"]["equal"]
    assert outcome["trust"]["mode"] == "blind"
    assert outcome["trust"]["pads_taken"] == outcome["trust"]["checked"] > 0
    assert "trust 'blind': the GPU worker sees masked rows" in stderr
