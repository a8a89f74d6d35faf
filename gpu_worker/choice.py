"""Which device a GPU worker computes on, by the word of ``--device``."""

from __future__ import annotations

import re

from gpu_worker.cuda import open_cuda
from gpu_worker.device import CpuDevice, Device
from shmbroker.errors import BadInput


def open_device(text: str) -> Device:
    """``cpu``, ``cuda`` or ``cuda:1`` to a device. Raises :class:`BadInput` for one that is not there."""
    if text == "cpu":
        return CpuDevice()
    if re.fullmatch(r"cuda(:\d+)?", text):
        return open_cuda(text)
    raise BadInput(f"device {text!r} is not known; there are: cpu, cuda, cuda:N")
