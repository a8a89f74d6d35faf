"""A broker and a GPU worker for one measurement, where no broker runs."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator

from shmbroker.client.local_broker import local_broker, stop_process
from shmbroker.control.status import ask
from shmbroker.errors import BrokerUnreachable
from tee_worker.run_options import PrefillOptions


@contextlib.contextmanager
def own_peers(options: PrefillOptions, on_note: Callable[[str], None]) -> Iterator[None]:
    """A broker and a worker with the model of ``options``, for the length of a block; nothing where a broker runs.

    Raises :class:`BrokerUnreachable` for one that was named and does not answer.
    """
    try:
        ask(options.instance)
    except BrokerUnreachable:
        if options.instance is not None:
            raise
    else:
        yield
        return
    on_note("no broker runs: starting one, and a GPU worker on this machine's CPU, for this measurement ...")
    with local_broker():
        command = [sys.executable, "-m", "gpu_worker", "--log-level", "warning", "serve"]
        command += ["--service", options.service, "--dtype", options.dtype]
        command += ["--model", options.model] if options.model else ["--shape", str(options.shape), "--seed", str(options.seed)]
        command += ["--threads", str(options.threads)] if options.threads else []
        worker = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            yield
        finally:
            stop_process(worker)
