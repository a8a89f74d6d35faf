"""CUDA: devices, pinning, IPC, confidential-computing mode. torch is loaded here, and only here asked for CUDA."""

from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Iterator
from typing import Any

from shmbroker.commands.doctor.check import Check, content, ok, warn
from shmbroker.settings.schema import Settings

SMI_SECONDS = 20.0
"""The first nvidia-smi after boot initialises the driver."""

_PINNED_BYTES = 1 << 20
_EXPORTED_BYTES = 1 << 20


def checks(settings: Settings) -> Iterator[Check]:
    """All of this family."""
    import torch

    if not torch.cuda.is_available():
        yield _without(settings)
        return
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    yield ok("CUDA", f"{len(devices)} devices: {', '.join(devices)}; CUDA {torch.version.cuda}", devices=devices)
    yield from _confidential()
    yield _pinning()
    yield ipc()


def _without(settings: Settings) -> Check:
    import torch

    built = torch.version.cuda
    why = "this torch is built without CUDA" if built is None else f"this torch is built for CUDA {built}, and no device answers"
    driver = content("/proc/driver/nvidia/version").partition("\n")[0]
    if settings.device.startswith("cuda"):
        return warn(
            "CUDA",
            f"not available: {why}, and device {settings.device} is set",
            "install the driver and a torch for CUDA, or set device = cpu",
        )
    if driver or os.path.exists("/dev/nvidiactl"):
        return warn(
            "CUDA", f"there is a driver ({driver or '/dev/nvidiactl'}), and CUDA is not available: {why}", "install a torch for CUDA"
        )
    return ok("CUDA", f"not available: {why}; the CPU computes", devices=[])


def _pinning() -> Check:
    """Pin a page of memory for real: in confidential-computing mode it fails."""
    import torch

    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    with mmap.mmap(-1, _PINNED_BYTES) as memory:
        memory[0] = 0
        view = torch.frombuffer(memory, dtype=torch.uint8)
        address = view.data_ptr()
        code = int(runtime.cudaHostRegister(address, _PINNED_BYTES, 0))
        if code == 0:
            runtime.cudaHostUnregister(address)
        del view
    if code == 0:
        return ok("pinning", "cudaHostRegister works: copies run at full speed beside computing", pinning=True)
    return warn(
        "pinning",
        f"cudaHostRegister answers error {code}: pageable copies are used",
        "in confidential-computing mode that is as it must be; else raise the memlock limit",
        pinning=False,
    )


def ipc() -> Check:
    """Export a handle for real."""
    from shmbroker.arena import CudaRuntime
    from shmbroker.errors import CudaRefused

    try:
        cuda = CudaRuntime(0)
        pointer = cuda.allocate(_EXPORTED_BYTES)
        try:
            cuda.export(pointer)
        finally:
            cuda.free(pointer)
    except CudaRefused as refused:
        return warn(
            "CUDA IPC",
            f"memory of the device cannot be shared: {refused}",
            "tensors go through shared memory of the host instead, and lose nothing but time",
            ipc=False,
        )
    return ok("CUDA IPC", "memory of the device can be shared between processes", ipc=True)


def _confidential() -> Iterator[Check]:
    try:
        done = subprocess.run(["nvidia-smi", "conf-compute", "-f"], capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return  # no nvidia-smi in this container: the pinning check tells what it would matter for
    told = done.stdout.strip()
    if done.returncode or not told:
        return
    on = told.upper().endswith("ON")
    text = f"confidential computing is {'on: what crosses to the GPU is encrypted' if on else 'off: the host sees what crosses to the GPU'}"
    yield ok("CUDA mode", text, confidential=on)
