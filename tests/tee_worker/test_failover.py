"""A GPU worker dies in the midst of a generation: another takes over, and the tokens are those that would have been."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import shmbroker
from shmbroker.client.failover import FailoverChannel
from tee_worker import Split, offload
from tests.processes import run, wait_until
from tests.tee_worker.conftest import gpu_worker
from tests.tee_worker.test_offload import NEW_TOKENS, PROMPT, generate
from tests.tiny_models import save_random, tiny_llama


def after_tokens(count: int, action: Callable[[], None]) -> object:
    """A streamer that does something when so many tokens have come."""

    class Streamer:
        seen = -PROMPT.numel()

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.numel()
            if self.seen == count:
                action()

        def end(self) -> None:
            pass

    return Streamer()


def kill_worker(channel: FailoverChannel) -> None:
    os.kill(channel.worker_pid, signal.SIGKILL)


@pytest.mark.parametrize(("split", "lane"), [(Split.LINEAR, "shm"), (Split.FUSED, "zmq"), (Split.OP, "shm")])
def test_generation_goes_on_with_another_worker_token_for_token(broker: shmbroker.LocalBroker, tiny: Path, split: Split, lane: str) -> None:
    whole = generate(AutoModelForCausalLM.from_pretrained(tiny))
    with gpu_worker(tiny, "two"), gpu_worker(tiny, "two"), shmbroker.connect(arena="32M") as client:
        wait_until(lambda: workers_of("two") == 2)
        channel = client.failover_channel("two", lane=lane)
        first = channel.worker_pid
        parts = AutoModelForCausalLM.from_pretrained(tiny)
        offload(parts, channel, split, check=False)  # whose calls would be counted
        tokens = generate(parts, streamer=after_tokens(5, lambda: kill_worker(channel)))
        assert torch.equal(tokens, whole)
        assert channel.worker_pid != first
        report = channel.report()
        assert report.failovers == 1
        assert report.total.calls == NEW_TOKENS * (3 * {Split.LINEAR: 7, Split.FUSED: 4, Split.OP: 6}[split] + 2)
        assert "another worker took over 1 time" in str(report)


def workers_of(service: str) -> int:
    from shmbroker.control.status import ask

    return sum(service in peer.services for peer in ask(None).peers)


def test_with_no_other_worker_a_new_one_is_waited_for(broker: shmbroker.LocalBroker, tiny: Path) -> None:
    whole = generate(AutoModelForCausalLM.from_pretrained(tiny))
    with contextlib.ExitStack() as stack:
        stack.enter_context(gpu_worker(tiny, "alone"))
        client = stack.enter_context(shmbroker.connect(arena="32M"))
        channel = client.failover_channel("alone", patience=60.0)
        parts = AutoModelForCausalLM.from_pretrained(tiny)
        offload(parts, channel, Split.OP, check=False)

        def die_and_rise() -> None:
            kill_worker(channel)
            thread = threading.Thread(target=lambda: stack.enter_context(gpu_worker(tiny, "alone")))
            stack.callback(thread.join)
            thread.start()

        assert torch.equal(generate(parts, streamer=after_tokens(3, die_and_rise)), whole)
        assert channel.failovers == 1


def test_with_none_coming_the_loss_is_told_with_what_to_do(broker: shmbroker.LocalBroker, tiny: Path) -> None:
    with gpu_worker(tiny, "last"), shmbroker.connect(arena="32M") as client:
        channel = client.failover_channel("last", patience=0.2)
        embed = channel.bind("matmul", out_spec=lambda a, b: shmbroker.TensorSpec((a.shape[0], b.shape[1]), a.dtype))
        x = torch.eye(4)
        assert torch.equal(embed(x, x), x)
        kill_worker(channel)
        with pytest.raises(shmbroker.WorkerLost, match=r"none took over within 0.2 s.*start one, or wait longer"):
            embed(x, x)


def test_a_worker_with_other_weights_does_not_take_over(broker: shmbroker.LocalBroker, tiny: Path, tmp_path: Path) -> None:
    """Its tokens would be wrong ones."""
    other = save_random(tiny_llama(attention_bias=True), tmp_path / "other", seed=1)
    with gpu_worker(tiny, "mixed"), shmbroker.connect(arena="32M") as client:
        channel = client.failover_channel("mixed", patience=0.5)
        parts = AutoModelForCausalLM.from_pretrained(tiny)
        offload(parts, channel, Split.FUSED, check=False)
        with gpu_worker(other, "mixed"):
            wait_until(lambda: workers_of("mixed") == 2)
            kill_worker(channel)
            with pytest.raises(shmbroker.WorkerLost, match="offers it with other weights"):
                generate(parts)


def test_futures_and_captured_calls_are_sent_again_too(broker: shmbroker.LocalBroker, tiny: Path) -> None:
    def outer(a: shmbroker.TensorSpec, b: shmbroker.TensorSpec) -> shmbroker.TensorSpec:
        return shmbroker.TensorSpec((a.shape[0], b.shape[1]), a.dtype)

    x = torch.randn(8, 8)
    with gpu_worker(tiny, "calls"), gpu_worker(tiny, "calls"), gpu_worker(tiny, "calls"), shmbroker.connect(arena="32M") as client:
        wait_until(lambda: workers_of("calls") == 3)
        channel = client.failover_channel("calls")
        matmul = channel.bind("matmul", out_spec=outer)
        captured = matmul.capture(client.copy_in(x), client.copy_in(x))
        expected = captured.replay().clone()
        os.kill(channel.worker_pid, signal.SIGSTOP)  # so that the calls are surely under way when it dies
        futures = [matmul.submit(x, x) for _ in range(5)]
        called: list[bool] = []
        futures[0].add_done_callback(lambda future: called.append(torch.equal(future.result(), expected)))
        kill_worker(channel)
        assert all(torch.equal(future.result(120), expected) for future in futures)
        wait_until(lambda: called == [True], 10.0)
        assert torch.equal(captured.replay(), expected)
        assert channel.failovers == 1
        kill_worker(channel)
        assert torch.equal(captured.replay(), expected)
        assert channel.failovers == 2


def test_tee_worker_generate_goes_on_when_its_gpu_worker_is_killed(broker: shmbroker.LocalBroker, embedded: Path) -> None:
    options = ["--model", str(embedded), "--prompt", "Why is the sky blue?", "--chat", "--max-new-tokens", "40"]
    expected = run(sys.executable, "-m", "tee_worker", "generate", "--service", "pair", "--json", *options)
    assert expected.returncode == 1, "nobody offers it yet"
    with gpu_worker(embedded, "pair"), gpu_worker(embedded, "pair"):
        wait_until(lambda: workers_of("pair") == 2)
        command = [sys.executable, "-m", "tee_worker", "generate", "--service", "pair", "--split", "op", *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
            assert process.stdout is not None
            begun = process.stdout.read(1)  # the first word is there, the others are being computed
            os.kill(worker_in_use("pair"), signal.SIGKILL)
            out, error = process.communicate(timeout=120)
        told = " ".join(error.decode().split())
        assert process.returncode == 0, told
        assert "another worker took over 1 time" in told
        again = run(sys.executable, "-m", "tee_worker", "reference", "--json", *options)
        from shmbroker.models.checkpoint import Checkpoint

        text = Checkpoint.at(str(embedded)).tokenizer().decode(json.loads(again.stdout)["tokens"], skip_special_tokens=True)
        assert (begun + out).decode() == f"{text}\n"
        assert "equal to what was counted" in told


def worker_in_use(service: str) -> int:
    """The pid of the worker that has a client."""
    from shmbroker.control.status import ask

    used: set[int] = set()

    def known() -> bool:
        report = ask(None)
        workers = {channel.worker for peer in report.peers for channel in peer.stats.channels if channel.service == service}
        used.update(peer.pid for peer in report.peers if peer.peer in workers)
        return bool(used)

    wait_until(known)  # clients tell the broker of their channels once a second
    return used.pop()
