"""The modes on a whole model, over real processes: plain's tokens, one another's bits, and every lie rejected."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import shmbroker
from shmbroker import WrongResult
from shmbroker.call.remote_op import RemoteOp
from shmbroker.control.status import ask
from shmbroker.monitoring.figures import read_figures
from shmbroker.trust import loops
from tee_worker.trust.float_check import FloatLayer
from tee_worker.trust.modes import Trust, TrustOptions
from tee_worker.trust.sealed import SealedChannel, SealedLayer
from tests.processes import wait_until
from tests.trust.conftest import BLIND, MODES, VERIFY, generate, logits, sealed, whole_model, worker


@pytest.mark.parametrize("split", ["linear", "fused"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_generates_the_tokens_of_one_process(
    client: shmbroker.Client, other_client: shmbroker.Client, tiny: Path, workers: tuple[str, str], mode: str, split: str
) -> None:
    expected = generate(whole_model(tiny))
    model = whole_model(tiny)
    with sealed(model, client.channel(workers[0]), MODES[mode], other_client.channel(workers[1]), split=split, check=True) as moved:
        assert torch.equal(generate(model), expected)
        assert moved.sealed is not None
        report = moved.sealed.session.report()
    assert report.checked > 0
    assert (report.rejected, report.pads_reused) == (0, 0)
    hides = MODES[mode].mode in (Trust.BLIND, Trust.SHARES)
    assert report.pads_taken == (report.checked if hides else 0)


def test_the_exact_modes_give_one_anothers_bits(
    client: shmbroker.Client, other_client: shmbroker.Client, tiny: Path, workers: tuple[str, str]
) -> None:
    found = {}
    for mode in ("verify", "blind", "dealt", "shares"):
        model = whole_model(tiny)
        with sealed(model, client.channel(workers[0]), MODES[mode], other_client.channel(workers[1])):
            found[mode] = logits(model)
    assert all(torch.equal(found["verify"], other) for other in found.values())


@pytest.mark.parametrize("which", loops.KINDS[1:])
def test_without_a_compiler_it_is_the_same(client: shmbroker.Client, tiny: Path, workers: tuple[str, str], which: str) -> None:
    """The worker's loops are the fastest there, this side's are others."""
    found = []
    before = loops.kind()
    for kind in (before, which):
        model = whole_model(tiny)
        loops.choose(kind)
        try:
            with sealed(model, client.channel(workers[0]), BLIND):
                found.append(logits(model))
        finally:
            loops.choose(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("bits", [8, 14])
def test_other_bits_run_too_and_more_are_nearer(client: shmbroker.Client, tiny: Path, workers: tuple[str, str], bits: int) -> None:
    expected = logits(whole_model(tiny))
    model = whole_model(tiny)
    with sealed(model, client.channel(workers[0]), TrustOptions(mode=Trust.VERIFY, bits=bits)):
        difference = float((logits(model) - expected).abs().max() / expected.abs().max())
    assert difference < {8: 3e-2, 14: 5e-4}[bits]


def test_lengths_are_rounded_up_where_they_are_to_be_hidden(client: shmbroker.Client, tiny: Path, workers: tuple[str, str]) -> None:
    expected = logits(whole_model(tiny))
    model = whole_model(tiny)
    channel = client.channel(workers[0])
    with sealed(model, channel, TrustOptions(mode=Trust.BLIND, pads=0, hide_lengths=16)) as moved:
        torch.testing.assert_close(logits(model), expected, atol=5e-3, rtol=5e-2)
        assert moved.sealed is not None
        report = moved.sealed.session.report()
    calls = channel.report().total.calls
    assert report.checked == 16 * calls, "11 tokens are 16 rows of every call"


def test_a_model_reaches_no_ordinary_op_and_no_channel(client: shmbroker.Client, tiny: Path, workers: tuple[str, str]) -> None:
    """T1: what a sealed layer is, and what it is not."""
    model = whole_model(tiny)
    with sealed(model, client.channel(workers[0]), BLIND):
        for module in model.modules():
            op = getattr(module, "op", None)
            assert not isinstance(op, RemoteOp)
    for kind in (SealedLayer, SealedChannel):
        assert not {"bind", "submit", "capture", "keep"} & set(dir(kind))
    assert not {"submit", "capture", "keep"} & set(dir(FloatLayer))


def generate_often(model: PreTrainedModel) -> None:
    """Until every pad that was made ahead is used: a dealer's lie is in one of them."""
    for _ in range(8):
        generate(model)


# --- lies -------------------------------------------------------------------------------------------------------------------------------

LIES = ("change", "swap", "stale", "other")


@pytest.mark.parametrize(("mode", "lie"), [("verify", "change"), ("approximate", "other"), *(("blind", lie) for lie in LIES)])
def test_a_lie_ends_the_session_and_nothing_of_its_pass_comes_out(client: shmbroker.Client, tiny: Path, mode: str, lie: str) -> None:
    """T3: the 21st product is one of the second layer's, in the third pass."""
    expected = generate(whole_model(tiny))
    seen: list[int] = []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            seen.extend(value.reshape(-1).tolist())

        def end(self) -> None:
            pass

    with worker(tiny, f"lying-{mode}-{lie}", "--lie", lie, "--lie-at", "21", command="misbehave"):
        model = whole_model(tiny)
        with sealed(model, client.channel(f"lying-{mode}-{lie}", wait=30), MODES[mode]) as moved:
            assert moved.sealed is not None
            session = moved.sealed.session
            with pytest.raises(WrongResult, match=r"gave a wrong result: row \d+ of call 21, model\.layers\.\d.*this session has ended"):
                generate(model, streamer=Streamer())
            assert session.report().rejected == 1
            assert session.trouble
            with pytest.raises(WrongResult, match="this session has ended"):
                logits(model)
            assert all(pads.missing >= pads.target for pads in session.pads), "pads are gone too"
    assert seen == expected[0, : len(seen)].tolist()
    assert len(seen) < expected.shape[1]


@pytest.mark.parametrize(("mode", "liar"), [("dealt", "other"), ("shares", "first"), ("shares", "other")])
def test_either_of_two_workers_is_caught(
    client: shmbroker.Client, other_client: shmbroker.Client, tiny: Path, workers: tuple[str, str], mode: str, liar: str
) -> None:
    with worker(tiny, f"liar-{mode}-{liar}", "--lie", "change", "--lie-at", "9", command="misbehave"):
        honest, lying = workers[0], f"liar-{mode}-{liar}"
        services = (lying, honest) if liar == "first" else (honest, lying)
        model = whole_model(tiny)
        channel, other = client.channel(services[0], wait=30), other_client.channel(services[1], wait=30)
        with sealed(model, channel, MODES[mode], other), pytest.raises(WrongResult, match="gave a wrong result"):
            generate_often(model)


@pytest.mark.parametrize("mode", ["approximate", "blind"])
def test_a_result_that_is_written_over_afterwards_changes_nothing(client: shmbroker.Client, tiny: Path, mode: str) -> None:
    """T2: it was copied before it was checked, or it is rejected; never is it used."""
    expected = logits(whole_model(tiny))
    with worker(tiny, f"rewriting-{mode}", "--lie", "rewrite", "--lie-at", "2", command="misbehave"):
        model = whole_model(tiny)
        with sealed(model, client.channel(f"rewriting-{mode}", wait=30), MODES[mode]):
            try:
                found = logits(model)
            except WrongResult:
                return
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=5e-2)


def test_results_of_many_threads_are_each_their_own(client: shmbroker.Client, tiny: Path, workers: tuple[str, str]) -> None:
    model = whole_model(tiny)
    with sealed(model, client.channel(workers[0]), VERIFY) as moved:
        expected = logits(model)
        results: list[torch.Tensor] = []
        threads = [threading.Thread(target=lambda: results.append(logits(model))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert moved.sealed is not None
        assert moved.sealed.session.report().rejected == 0
    assert len(results) == 8
    assert all(torch.equal(one, expected) for one in results)


def test_pads_are_made_ahead_and_then_nobody_waits(client: shmbroker.Client, tiny: Path, workers: tuple[str, str]) -> None:
    model = whole_model(tiny)
    with sealed(model, client.channel(workers[0]), TrustOptions(mode=Trust.BLIND, pads=64)) as moved:
        assert moved.sealed is not None
        supply = moved.sealed.supply
        assert supply is not None
        wait_until(supply.full.is_set)
        logits(model)
        assert moved.sealed.session.report().pads_waited == 0


def test_status_and_metrics_tell_the_mode_and_its_counts(client: shmbroker.Client, tiny: Path, workers: tuple[str, str]) -> None:
    model = whole_model(tiny)
    with sealed(model, client.channel(workers[0]), BLIND) as moved:
        logits(model)
        assert moved.sealed is not None
        counts = moved.sealed.session.counts()

        def told() -> bool:
            channels = [one for one in read_figures(client.segment.name).channels if one.trust]
            return [(one.trust, one.checked, one.rejected, one.pads_taken) for one in channels] == [("blind", *counts[1:4])]

        wait_until(told)

        def in_status() -> bool:
            said = [channel.trust for peer in ask(None).peers for channel in peer.stats.channels if channel.trust]
            return any(f"blind: {counts.checked} rows checked, 0 rejected, {counts.pads_taken} pads taken" in one for one in said)

        wait_until(in_status)
