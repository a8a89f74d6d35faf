"""Placement: where the tensors of a call lie, and room for those that lie nowhere yet."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from shmbroker.arena.arena import Location, Placed
from shmbroker.arena.room import Room
from shmbroker.call.client_memory import ClientMemory
from shmbroker.call.kept import KeptBooks
from shmbroker.call.plan import Plan
from shmbroker.call.queue_pair import QueuePair
from shmbroker.errors import BadInput, CudaRefused, PeerRefused
from shmbroker.memory import layout

log = logging.getLogger(__name__)


class Placement:
    """Places the tensors of one channel's calls: in the client's segment, in its device arena, or with the worker. Thread-safe.

    ``open_on_worker(handle, nbytes)`` has the worker open the client's device arena; it raises what the worker refuses that with.
    """

    def __init__(self, memory: ClientMemory, pair: QueuePair, kept: KeptBooks, open_on_worker: Callable[[bytes, int], object]) -> None:
        self.memory = memory
        self.arena = memory.arena
        self.kept = kept
        self._pair = pair
        self._open_on_worker = open_on_worker
        self._device_opened: bool | None = None
        """Whether the worker has opened the client's device arena; None until it was asked."""

    def place(self, room: Room, timeout: float | None) -> Placed:
        """A tensor in a fresh block, and the block. While the arena is full, completions are taken, since they may free blocks."""
        arena = self.arena
        limit = self._limit(timeout)
        arena.check_size(room)
        begun = time.monotonic()
        waited = 0.0
        while True:
            left = max(0.0, limit - waited)
            if not self._pair.outstanding or not left:
                return arena.place(room, left, waited=waited)
            placed = arena.place_now(room)
            if placed is not None:
                return placed
            if not waited:
                arena.count_wait()
            self._pair.completions.wait_any(left)
            waited = time.monotonic() - begun

    def place_elsewhere(
        self, plan: Plan, timeout: float | None, outputs: list[Any], offsets: list[int], generations: list[int], holds: list[object]
    ) -> None:
        """Room for the outputs of a call that has them kept on the worker, or in the client's device arena."""
        if plan.output_space == layout.Space.KEPT:
            for spec in plan.specs:
                kept = self.kept.new(spec)
                outputs.append(kept)
                offsets.append(kept.number)
                generations.append(1)
            return
        arena = self.memory.device
        assert arena is not None
        limit = self._limit(timeout)
        for room in plan.rooms:
            output, block = arena.place(room, limit)
            outputs.append(output)
            offsets.append(block.offset)
            generations.append(block.generation)
            holds.append(block.hold)

    def find_on_device(self, tensor: torch.Tensor) -> Location | None:
        """Where ``tensor`` lies in the client's device arena, once the worker has opened it; else None, and the tensor is copied."""
        arena = self.memory.device
        location = None if arena is None else arena.find(tensor)
        if location is None or arena is None:
            return None
        if self._device_opened is None:
            try:
                self._open_on_worker(arena.handle, arena.nbytes)
                self._device_opened = True
            except (PeerRefused, CudaRefused, BadInput) as error:
                self._device_opened = False
                who = self._pair.peer_text()
                log.warning("%s cannot use the device arena: its tensors are copied through shared memory (%s)", who, error)
        return location if self._device_opened else None

    def _limit(self, timeout: float | None) -> float:
        """Seconds to wait for room, of a call that may take ``timeout``."""
        limit = self.memory.place_timeout
        return limit if timeout is None else min(timeout, limit)
