"""Futures of a failover channel whose worker dies: sent again, whoever looks for them, and however."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import threading

import pytest
import torch

import shmbroker
from shmbroker.control.status import ask
from tests.processes import freeze, wait_until, worker_process

SECONDS = 200.0


def workers_of(service: str) -> int:
    return sum(service in peer.services for peer in ask(None).peers)


@pytest.mark.parametrize("how", ["result", "done", "wait", "as_completed", "callback", "await", "captured"])
def test_a_submitted_call_that_is_lost_is_sent_again_for_whoever_looks(client: shmbroker.Client, how: str) -> None:
    service = f"pair-{how}"
    with worker_process(service), worker_process(service):
        wait_until(lambda: workers_of(service) == 2)
        channel = client.failover_channel(service)
        double = channel.bind("double")
        captured = double.capture(torch.ones(3))
        captured.replay()
        freeze(channel.worker_pid)  # so that the calls are surely under way when it dies
        submit = captured.submit if how == "captured" else lambda: double.submit(torch.ones(3))
        futures = [submit() for _ in range(1 if how == "captured" else 5)]
        told: list[list[float]] = []
        if how == "callback":
            for future in futures:
                future.add_done_callback(lambda future: told.append(future.result().tolist()))
        os.kill(channel.worker_pid, signal.SIGKILL)
        if how == "done":
            wait_until(lambda: all([future.done() for future in futures]), SECONDS)
        elif how == "wait":
            assert not concurrent.futures.wait(futures, SECONDS).not_done
        elif how == "as_completed":
            assert len(list(concurrent.futures.as_completed(futures, SECONDS))) == 5
        elif how == "callback":
            wait_until(lambda: len(told) == 5, SECONDS)
        elif how == "await":

            async def gather() -> list[torch.Tensor]:
                return await asyncio.gather(*futures)

            asyncio.run(gather())
        assert [future.result(SECONDS).tolist() for future in futures] == [[2.0] * 3] * len(futures)
        assert channel.failovers == 1
        channel.close()
        wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "shmbroker-failover"])


def test_a_lost_call_that_nobody_takes_over_is_told_to_whoever_looks(client: shmbroker.Client) -> None:
    with worker_process("single"):
        channel = client.failover_channel("single", patience=0.2)
        double = channel.bind("double")
        double(torch.ones(1))
        freeze(channel.worker_pid)
        futures = [double.submit(torch.ones(1)) for _ in range(3)]
        os.kill(channel.worker_pid, signal.SIGKILL)
        wait_until(futures[0].done, SECONDS)
        assert not concurrent.futures.wait(futures[1:2], SECONDS).not_done
        for future in futures:
            with pytest.raises(shmbroker.WorkerLost, match=r"none took over within 0\.2 s"):
                future.result(SECONDS)


def test_closing_the_client_ends_the_search_for_another_worker(broker: shmbroker.LocalBroker) -> None:
    client = shmbroker.connect(arena="1M")
    with worker_process("sought"):
        channel = client.failover_channel("sought", patience=3600.0)
        double = channel.bind("double")
        double(torch.ones(1))
        os.kill(channel.worker_pid, signal.SIGKILL)
        errors: list[BaseException] = []

        def call() -> None:
            try:
                double(torch.ones(1))
            except shmbroker.ShmBrokerError as error:
                errors.append(error)

        caller = threading.Thread(target=call)
        caller.start()
        wait_until(lambda: "closed" in repr(channel.channel), SECONDS)  # the lost one is, and another is looked for
        client.close()
        caller.join(SECONDS)
        assert not caller.is_alive()
        assert isinstance(errors[0], shmbroker.ShmBrokerError)
