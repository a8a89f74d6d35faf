"""A broker and a GPU worker for one run, where it has none to go to."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from shmbroker.client.local_broker import local_broker, stop_process
from shmbroker.control.status import ask
from shmbroker.errors import BrokerUnreachable, ShmBrokerError
from tee_worker.run_options import RunOptions

WORKER_START_SECONDS = 300.0
"""How long a worker may take to make or read its weights."""

_LOOK_SECONDS = 0.1
_STDERR = 2


def some_broker_answers(options: RunOptions) -> bool:
    """Whether a broker answers. Raises :class:`BrokerUnreachable` for one that was named and does not."""
    try:
        ask(options.instance)
    except BrokerUnreachable:
        if options.instance is not None:
            raise
        return False
    return True


@contextlib.contextmanager
def own_peers(options: RunOptions, on_note: Callable[[str], None], *weights: str) -> Iterator[None]:
    """A broker and a GPU worker of this run's own, both ready, for the length of a block; they end with this process however it ends.

    ``weights``: the worker's options that tell whose weights it holds. Raises :class:`ShmBrokerError` when they do not start.
    """
    services = [options.service, *(one for one in (options.second, options.pads_from) if one is not None)]
    on_note(f"starting a broker and {'a GPU worker' if len(services) == 1 else 'two GPU workers'} for this run alone ...")
    with local_broker() as broker, contextlib.ExitStack() as stack:
        workers = []
        for service in services:
            command = [sys.executable, "-m", "gpu_worker", "--log-level", "warning", "serve", *weights]
            command += ["--service", service, "--dtype", options.dtype, "--until-exit", str(os.getpid())]
            command += ["--threads", str(options.threads)] if options.threads else []
            # Standard output is for what this run prints. Ctrl-C is for this process, which ends the worker when it needs it no more.
            workers.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=_STDERR, start_new_session=True))
            stack.callback(stop_process, workers[-1])
        for worker in workers:
            await_worker(worker, broker.instance)
        yield


def await_worker(worker: subprocess.Popen[bytes], instance: str) -> None:
    """Wait until a worker process has joined. Raises :class:`ShmBrokerError` when it does not."""
    until = time.monotonic() + WORKER_START_SECONDS
    while not any(peer.pid == worker.pid for peer in ask(instance).peers):
        if worker.poll() is not None:
            raise ShmBrokerError(f"the GPU worker of this run ended with status {worker.returncode}; its own words are above")
        if time.monotonic() > until:
            raise ShmBrokerError(
                f"the GPU worker of this run was not ready within {WORKER_START_SECONDS:g} s: start one by hand, 'gpu-worker serve', which tells more"
            )
        time.sleep(_LOOK_SECONDS)
