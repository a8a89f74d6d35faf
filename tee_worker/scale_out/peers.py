"""A replica's side of its keeper: a broker and GPU workers that are there as long as the replica is."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

import msgspec

from shmbroker.control.access import CONTROL_VARIABLE, UNIX
from shmbroker.control.joining import INSTANCE_VARIABLE
from shmbroker.errors import ShmBrokerError
from shmbroker.settings.load import variable_of
from tee_worker.scale_out.keeper import BROKER_SECONDS, Failed, Kept, Note, Plan, Told
from tee_worker.scale_out.options import Options
from tee_worker.scale_out.slot import sockets_folder

log = logging.getLogger(__name__)

END_SECONDS = 20.0
"""How long the end waits until the keeper has given everything back; it does so by itself too."""


def worker_command(options: Options, service: str) -> list[str]:
    """Of a GPU worker."""
    command = [sys.executable, "-m", "gpu_worker", "--log-level", "warning", "serve", "--model", options.model, "--service", service]
    command += ["--device", options.device, "--dtype", options.dtype]
    return command + (["--threads", str(options.threads)] if options.threads else [])


class Peers:
    """From here to :meth:`close`. ``on_failure``: told, in another thread, when they cannot be kept. Raises :class:`ShmBrokerError`."""

    def __init__(self, options: Options, on_failure: Callable[[str], None]) -> None:
        self._on_failure = on_failure
        self._kept = threading.Event()
        self._over = threading.Event()
        self._closing = False
        self.failure = ""
        """Why they are not there any more; empty while they are kept."""
        self.instance = ""
        plan = Plan(str(sockets_folder()), [worker_command(options, service) for service in options.services()], os.getpid())
        ours, its = socket.socketpair()
        self._socket = ours
        with its:
            command = [sys.executable, "-m", "tee_worker.scale_out.keeper", str(its.fileno())]
            subprocess.run(command, stdin=subprocess.DEVNULL, pass_fds=[its.fileno()], check=True)  # it goes on on its own
        ours.sendall(msgspec.json.encode(plan) + b"\n")
        threading.Thread(target=self._listen, name="shmbroker-keeper", daemon=True).start()
        if not self._kept.wait(2 * BROKER_SECONDS) or self.failure:
            self.close()
            raise ShmBrokerError(
                self.failure or "the keeper of this replica's broker did not answer; its own words are in the replica's log"
            )
        # Whatever this process starts or opens finds this broker.
        os.environ.update({INSTANCE_VARIABLE: self.instance, variable_of("runtime_dir"): plan.folder, CONTROL_VARIABLE: UNIX})

    def _listen(self) -> None:
        with contextlib.suppress(OSError), self._socket.makefile("rb") as lines:
            for line in lines:
                told: Told = msgspec.json.decode(line, type=Told)
                if isinstance(told, Kept):
                    self.instance = told.instance
                    self._kept.set()
                elif isinstance(told, Note):
                    log.warning("%s", told.text)
                elif isinstance(told, Failed):
                    self.failure = told.text
        self.failure = self.failure or "the keeper of this replica's broker and GPU worker has ended"
        self._over.set()
        self._kept.set()
        if not self._closing:
            self._on_failure(self.failure)

    def close(self) -> None:
        """End them, and wait until they are gone."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        self._over.wait(END_SECONDS)
        self._socket.close()
