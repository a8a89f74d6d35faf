"""Running a GPU worker: weights first, then the broker, so that whoever finds the service finds it ready."""

from __future__ import annotations

import logging
import re
import time
from typing import Literal

import torch

from gpu_worker.cuda.device import open_cuda
from gpu_worker.device import CpuDevice, Device
from gpu_worker.ops import register
from gpu_worker.weights import Weights
from shmbroker.control.status import ask
from shmbroker.errors import BadInput
from shmbroker.models import model_dtype, model_source
from shmbroker.settings import mib
from shmbroker.worker import Worker

log = logging.getLogger(__name__)

CPU = "cpu"
CUDA = re.compile(r"cuda(:\d+)?")
"""How the devices are named on the command line."""


def serve(
    *,
    model: str | None,
    shape: str | None,
    seed: int,
    device: str,
    dtype: str,
    service: str,
    instance: str | None,
    name: str | None,
    threads: int | None,
    spin: float,
    until_exit: int,
    trace: str | None,
    max_channels: int | None = None,
    max_waiting_rows: int | None = None,
    client_weights: dict[str, float] | None = None,
    batch: Literal["user", "all"] | None = None,
    misbehaving: Device | None = None,
) -> None:
    """Load ``model``, or make random weights of ``shape``, and serve until told to stop. Raises :class:`ShmBrokerError` for whatever is wrong with the arguments.

    ``misbehaving``: what computes in the place of ``device``, for demonstrations.
    """
    target = misbehaving or open_device(device)
    wanted = model_dtype(dtype)
    checkpoint = model_source(model, shape, seed)
    ask(instance)  # before the weights are read: a missing broker is told at once
    if threads:
        torch.set_num_threads(threads)
    begun = time.monotonic()
    weights = Weights.load(checkpoint, wanted, target)
    log.info("%s of weights in %s on %s after %.1f s", mib(weights.nbytes), dtype, target.name, time.monotonic() - begun)
    worker = Worker(
        service,
        instance=instance,
        name=name,
        device=target.name,
        spin=spin,
        until_exit=until_exit,
        identity=weights.identity,
        trace=trace,
        memory=target.memory,
        max_channels=max_channels,
        max_waiting_rows=max_waiting_rows,
        client_weights=client_weights,
        batch=batch,
    )
    register(worker, weights, target)
    worker.serve()


def open_device(text: str) -> Device:
    """``cpu``, ``cuda`` or ``cuda:1`` to a device. Raises :class:`BadInput` for one that is not there."""
    if text == CPU:
        return CpuDevice()
    if CUDA.fullmatch(text):
        return open_cuda(text)
    raise BadInput(f"device {text!r} is not known; there are: cpu, cuda, cuda:N")
