"""A client's segment, mapped by a worker: the tensors that its frames name."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shmbroker.errors import BadInput
from shmbroker.lane.submission_reader import Descriptor, Form, SubmissionReader
from shmbroker.memory.layout import Space
from shmbroker.memory.segment import Segment
from shmbroker.worker.device_memory import DeviceMemory, HostMemory, nothing


class MappedSegment:
    """A client's segment as a worker maps it.

    ``memory``: of the device that is told of the segment for as long as it is mapped. Made, and given its device arena, by the control thread;
    :meth:`view` and :meth:`close` are called by one thread at a time, under the lock that is held while an op runs. No frame names the device arena
    before ``reader`` knows its size, which is set last.
    """

    def __init__(self, segment: Segment, memory: DeviceMemory | None = None) -> None:
        self.segment = segment
        self.memory: DeviceMemory = memory or HostMemory()
        geometry = segment.geometry
        self.reader = SubmissionReader(geometry.arena_offset, geometry.total_bytes)
        self.users = 0
        """Open channels on it, counted by the control thread."""
        self._device: torch.Tensor | None = None
        self._device_opened: tuple[bytes, int] | None = None
        self._close_device = nothing
        self._unmap = nothing
        if memory is not None:
            self._unmap = memory.map(torch.frombuffer(segment.map, dtype=torch.uint8).data_ptr(), geometry.total_bytes)

    def open_device(self, handle: bytes, nbytes: int) -> None:
        """Open the client's device arena, once. Raises what the device refuses it with; :class:`BadInput` for a second one."""
        if self._device_opened is None:
            self._device, self._close_device = self.memory.open_arena(handle, nbytes)
            self._device_opened = handle, nbytes
            self.reader.device_bytes = nbytes
        elif self._device_opened != (handle, nbytes):
            raise BadInput("this client has another device arena open here: a client has one")

    def view(self, descriptor: Descriptor) -> torch.Tensor:
        """The tensor that a checked descriptor names, in place."""
        (tensor,) = self.views((descriptor,))
        return tensor

    def views(self, descriptors: Sequence[Descriptor]) -> list[torch.Tensor]:
        """The tensors that checked descriptors name, in place.

        Each has a storage and a version counter of its own: what is done with one such tensor is not taken for having been done with others.
        """
        with torch.inference_mode(False):  # made in inference mode, one would not tell that it was written
            return [self._view(offset, form) for offset, form in descriptors]

    def _view(self, offset: int, form: Form) -> torch.Tensor:
        shape, dtype = form.spec.shape, form.spec.dtype
        if form.space == Space.DEVICE:
            assert self._device is not None
            begin = self._device[offset : offset + max(form.extent_bytes, dtype.itemsize)].view(dtype)
            return begin.as_strided(shape, form.strides).data
        if not form.extent_bytes:
            return torch.empty(shape, dtype=dtype).as_strided(shape, form.strides).data
        flat = torch.frombuffer(self.segment.map, dtype=dtype, count=form.extent_bytes // dtype.itemsize, offset=offset)
        return flat.as_strided(shape, form.strides).data

    def close(self) -> None:
        """Unmap, once no tensor of it lives. Not while a device still copies."""
        self._device = None
        self._close_device()
        self._unmap()
        self._close_device = self._unmap = nothing
        self.segment.close()
