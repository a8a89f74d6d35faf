"""Reading what the two ends of channels tell of themselves in a segment's header. Who looks disturbs nobody, and believes nothing.

The file is read, never mapped: a client may cut its segment short, and who touches a mapped page that is gone is killed. All numbers are claims of the
client and the worker: they are bounded, and what does not fit together is left out.
"""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from shmbroker.errors import SegmentError
from shmbroker.memory import layout
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.segment import read_header
from shmbroker.memory.stores import store

ATTEMPTS = 4
"""How often a segment is read, in the hope of a moment when nobody writes; then what was read last has to do."""

_PAUSE_SECONDS = 0.0005
"""Between two attempts: many times what writing takes."""

_Told = tuple[layout.SegmentHeader, "ctypes.Array[layout.ChannelStatistics]"]


@dataclass(frozen=True, slots=True)
class Block:
    """A block that is held. ``offset``: bytes from the start of the segment."""

    offset: int
    nbytes: int
    age_seconds: float


@dataclass(frozen=True, slots=True)
class ArenaFigures:
    """What an arena holds, bytes unless named otherwise."""

    total_bytes: int
    held_bytes: int
    held_blocks: int
    high_water_bytes: int
    largest_free_bytes: int
    placed_blocks: int
    waits: int
    full: int
    copied_bytes: int
    cursor: int
    """Bytes from the start of the segment."""
    blocks: tuple[Block, ...]
    """In order of address; where there are many, the oldest and the largest."""
    idle_seconds: float
    """Since its client last told of a change."""


@dataclass(frozen=True, slots=True)
class ChannelFigures:
    """What an open channel has done. From ``run_calls`` to ``batched_with`` it is the worker's word, the rest the client's."""

    index: int
    opened_ns: int
    service: str
    worker: str
    """Its id."""
    lane: str
    doorbell: str
    calls: int
    errors: int
    sent_bytes: int
    received_bytes: int
    call_ns: int
    copied_bytes: int
    outstanding: int
    buckets: tuple[int, ...]
    idle_seconds: float
    """Since either side last told of a change."""
    run_calls: int
    failed_calls: int
    compute_ns: int
    queued_ns: int
    waiting_calls: int
    share: float
    """Of the worker's time, its client's: 0 to 1."""
    batched_calls: int = 0
    """Computed together with calls of other clients."""
    batched_with: int = 0
    """All calls of the batches that those were in."""
    trust: str = ""
    """The mode that its calls are made at; empty where the client has not said."""
    checked: int = 0
    rejected: int = 0
    pads_taken: int = 0
    pads_waited: int = 0


@dataclass(frozen=True, slots=True)
class SegmentFigures:
    """What a segment's header tells."""

    name: str
    owner: str
    owner_pid: int
    maker_pid: int
    age_seconds: float
    """Since it was made, by the wall clock."""
    geometry: Geometry
    arena: ArenaFigures
    open_channels: int
    channels: tuple[ChannelFigures, ...]
    """Of them, those that were asked for."""


def read_figures(name: str, most_channels: int = 1024) -> SegmentFigures:
    """Look at the segment ``name``, and at the first ``most_channels`` open channels. Raises :class:`SegmentError` when it is gone, spoilt, or not for us to see."""
    try:
        fd = os.open(store().path("/" + name.lstrip("/")), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except PermissionError:
        raise SegmentError(f"segment {name} may not be read by user {os.geteuid()}: look as the user it belongs to") from None
    except OSError as error:
        raise SegmentError(
            f"segment {name} cannot be opened ({os.strerror(error.errno or 0)}): its client is gone, or has never been"
        ) from None
    try:
        geometry, owner = read_header(name, fd)
        page, channels = _settled(fd, geometry)
    finally:
        os.close(fd)
    opened = [index for index in range(geometry.channel_count) if channels[index].opened_ns]
    now_ns = time.monotonic_ns()
    return SegmentFigures(
        name=name,
        owner=owner,
        owner_pid=page.owner_pid,
        maker_pid=page.maker_pid,
        age_seconds=_seconds_since(page.made_at_ns, time.time_ns()),
        geometry=geometry,
        arena=_arena(page.arena, geometry, now_ns),
        open_channels=len(opened),
        channels=tuple(_channel(index, channels[index], now_ns) for index in opened[:most_channels]),
    )


def _settled(fd: int, geometry: Geometry) -> _Told:
    """Header and statistics, of a moment when nobody wrote, if there was one."""
    for attempt in range(ATTEMPTS):
        told = _read(fd, geometry)
        if attempt == ATTEMPTS - 1 or (_even(told) and _revisions(told) == _revisions(_read(fd, geometry))):
            break
        time.sleep(_PAUSE_SECONDS)
    return told


def _read(fd: int, geometry: Geometry) -> _Told:
    kind = layout.ChannelStatistics * geometry.channel_count
    nbytes = geometry.statistics_offset + ctypes.sizeof(kind)
    data = bytearray(os.pread(fd, nbytes, 0).ljust(nbytes, b"\0"))
    return layout.SegmentHeader.from_buffer(data), kind.from_buffer(data, geometry.statistics_offset)


def _revisions(told: _Told) -> list[int]:
    page, channels = told
    return [page.arena.revision, *[revision for one in channels for revision in (one.revision, one.worker_revision)]]


def _even(told: _Told) -> bool:
    return not any(revision % 2 for revision in _revisions(told))


def _arena(told: layout.ArenaStatistics, geometry: Geometry, now_ns: int) -> ArenaFigures:
    total = geometry.arena_bytes
    blocks: list[Block] = []
    end = geometry.arena_offset
    for block in told.blocks[: min(told.block_count, layout.PICTURED_BLOCKS)]:
        if end <= block.offset and 0 < block.nbytes <= geometry.total_bytes - block.offset:
            blocks.append(Block(block.offset, block.nbytes, max(0, now_ns - block.placed_ns) / 1e9))
            end = block.offset + block.nbytes
    return ArenaFigures(
        total_bytes=total,
        held_bytes=min(told.held_bytes, total),
        held_blocks=min(told.held_blocks, total // layout.ALIGNMENT),
        high_water_bytes=min(told.high_water_bytes, total),
        largest_free_bytes=min(told.largest_free_bytes, total),
        placed_blocks=told.placed_blocks,
        waits=told.waits,
        full=told.full,
        copied_bytes=told.copied_bytes,
        cursor=min(max(told.cursor, geometry.arena_offset), geometry.total_bytes),
        blocks=tuple(blocks),
        idle_seconds=_seconds_since(told.published_ns, now_ns),
    )


def _seconds_since(then_ns: int, now_ns: int) -> float:
    """Whatever was written there: never less than 0."""
    return max(0, now_ns - then_ns) / 1e9


def _channel(index: int, told: layout.ChannelStatistics, now_ns: int) -> ChannelFigures:
    return ChannelFigures(
        index=index,
        opened_ns=told.opened_ns,
        service=_text(told.service),
        worker=_text(told.worker),
        lane=_text(told.lane),
        doorbell=_text(told.doorbell),
        calls=told.calls,
        errors=told.errors,
        sent_bytes=told.sent_bytes,
        received_bytes=told.received_bytes,
        call_ns=told.call_ns,
        copied_bytes=told.copied_bytes,
        outstanding=min(told.outstanding, 1 << 32),
        buckets=tuple(told.buckets),
        idle_seconds=_seconds_since(max(told.published_ns, told.worker_published_ns), now_ns),
        run_calls=told.run_calls,
        failed_calls=told.failed_calls,
        compute_ns=told.compute_ns,
        queued_ns=told.queued_ns,
        waiting_calls=min(told.waiting_calls, 1 << 32),
        share=min(told.share_ppm, 1_000_000) / 1e6,
        batched_calls=told.batched_calls,
        batched_with=told.batched_with,
        trust=_text(told.trust),
        checked=told.checked,
        rejected=told.rejected,
        pads_taken=told.pads_taken,
        pads_waited=told.pads_waited,
    )


def _text(told: bytes) -> str:
    """Printable text, whatever was written there."""
    return "".join(letter if letter.isprintable() else "?" for letter in told.decode("utf-8", "replace"))


def upper_bound_ns(bucket: int) -> float:
    """No time that the bucket counts is as long; the last has no bound."""
    return math.inf if bucket >= layout.BUCKETS - 1 else 2.0 ** ((bucket + layout.FIRST_BUCKET) / 2)


def quantile_ns(buckets: Sequence[int], fraction: float) -> float:
    """The time that ``fraction`` of the calls do not exceed: within its bucket (a factor of 1.41) it is estimated; 0 of no calls."""
    wanted = fraction * sum(buckets)
    counted = 0
    for bucket, count in enumerate(buckets):
        if count and counted + count >= wanted:
            lower = 2.0 ** ((bucket + layout.FIRST_BUCKET - 1) / 2)
            return float(lower * math.sqrt(2.0) ** ((wanted - counted) / count))
        counted += count
    return 0.0
