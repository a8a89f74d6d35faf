"""A worker's side of a service: ops, the loop that runs frames, control requests."""

from shmbroker.worker.device_memory import DeviceMemory, HostMemory, Launched
from shmbroker.worker.worker import Worker

__all__ = ["DeviceMemory", "HostMemory", "Launched", "Worker"]
