"""The layout of a segment: the published ABI (``docs/memory-layout.md``), version 3.

A segment is one POSIX shared-memory object, little-endian throughout::

    0                  SegmentHeader, one page; the words in it have one writer each
    statistics_offset  channel_count x ChannelStatistics, what the two ends tell whoever looks; nothing reads it back
    channels_offset    channel_count areas of channel_bytes, each:
                           ChannelHeader        512 bytes, one cache-line pair for each word that is written often
                           submission queue     submission_depth x SubmissionFrame  (client writes, worker reads)
                           completion queue     completion_depth x CompletionFrame  (worker writes, client reads)
    arena_offset       arena_bytes of blocks, aligned to 256 bytes, placed by the client alone

Invariants (quoted by the tests by number):

L1  ``version`` is the last field of the header to be written; 0 there means "still being made".
L2  ``sequence`` is the last field of a frame to be written; position ``p`` (counted from 0) is published in slot
    ``p % depth`` by the value ``p + 1``.
L3  Every word that changes while a channel is open has exactly one writer, but for the sleeping words, which whoever rings takes down. (The
    client clears the channel area before it opens it.)
L4  Every scalar, also in an array, lies at a multiple of its own size, so an aligned 8-byte store is never seen in part.
L5  A block of statistics begins with a ``revision``: odd while its one writer writes, then even. Who reads the same even value before and after
    has read a whole block. Peers of a call read none of it.

The structures are described once, here, with ctypes; the C header (``shmbroker.memory.cheader``), the hot path's offsets and the
documentation are taken from them.
"""

from __future__ import annotations

import ctypes
import enum
from ctypes import c_char, c_int64, c_uint8, c_uint16, c_uint32, c_uint64

MAGIC = b"SHMBROKR"
LAYOUT_VERSION = 4
BYTE_ORDER_MARK = 0x01020304

ALIGNMENT = 256
"""Alignment of blocks, bytes: four cache lines, and what CUDA aligns its own allocations to."""

PAGE = 4096
MAX_DIMS = 8
MAX_TENSORS = 12
"""Tensors of one call, inputs and outputs together."""

METADATA_BYTES = 128
TEXT_BYTES = 960
"""Room for an error's text in a completion (UTF-8, cut at a character)."""

INSTANCE_BYTES = 32
OWNER_BYTES = 32

BUCKETS = 64
"""Of a histogram of call times, two for each doubling."""

FIRST_BUCKET = 19
"""Bucket ``i`` counts times t (ns) with ``(t * t).bit_length() == i + FIRST_BUCKET``, the first and last also all below and above: from 724 ns
to half an hour."""

PICTURED_BLOCKS = 64
"""Blocks that an arena's picture shows at most: the oldest half and the largest."""


class DTypeCode(enum.IntEnum):
    """How a dtype is written in a descriptor. Codes are never reused; a new one leaves the layout's version as it is: who does not know it says so."""

    FLOAT32 = 1
    FLOAT64 = 2
    FLOAT16 = 3
    BFLOAT16 = 4
    INT8 = 5
    INT16 = 6
    INT32 = 7
    INT64 = 8
    UINT8 = 9
    BOOL = 10
    FLOAT8_E4M3FN = 11
    FLOAT8_E5M2 = 12
    UINT16 = 13
    UINT32 = 14
    UINT64 = 15
    COMPLEX64 = 16
    COMPLEX128 = 17


class Space(enum.IntEnum):
    """Which memory a descriptor's offset lies in.

    ``DEVICE``: the client's arena on a GPU; offsets count from its start. ``KEPT``: the worker's own memory; the offset is the number that the client
    gave the tensor when a call kept it there, and no address at all.
    """

    SEGMENT = 0
    DEVICE = 1
    KEPT = 2


class Status(enum.IntEnum):
    """How a call ended."""

    OK = 0
    OP_ERROR = 1
    BAD_FRAME = 2
    EXPIRED = 3
    DRAINING = 4
    BUSY = 5


class PicturedBlock(ctypes.LittleEndianStructure):
    """A block that is held: where, how large, since when.

    ::

        0   offset     bytes from the start of the segment
        8   nbytes
        16  placed_ns  CLOCK_MONOTONIC
    """

    _fields_ = (
        ("offset", c_uint64),
        ("nbytes", c_uint64),
        ("placed_ns", c_uint64),
    )


class ArenaStatistics(ctypes.LittleEndianStructure):
    """What the arena holds, told by the client every 100 ms or so (L5). Blocks are listed in order of address.

    ::

        0    revision            8   published_ns (CLOCK_MONOTONIC)
        16   held_bytes          24  held_blocks         32  high_water_bytes
        40   largest_free_bytes  48  placed_blocks       56  waits
        64   full                72  copied_bytes        80  cursor
        88   block_count         96  blocks[64]
    """

    _fields_ = (
        ("revision", c_uint64),
        ("published_ns", c_uint64),
        ("held_bytes", c_uint64),
        ("held_blocks", c_uint64),
        ("high_water_bytes", c_uint64),
        ("largest_free_bytes", c_uint64),
        ("placed_blocks", c_uint64),
        ("waits", c_uint64),
        ("full", c_uint64),
        ("copied_bytes", c_uint64),
        ("cursor", c_uint64),
        ("block_count", c_uint64),
        ("blocks", PicturedBlock * PICTURED_BLOCKS),
    )


class ChannelStatistics(ctypes.LittleEndianStructure):
    """What a channel has done, told by its two ends every 100 ms or so (L5). All zero while the channel is not open.

    ::

        0    revision         of what follows, which the client writes
        8    published_ns     CLOCK_MONOTONIC      16  opened_ns; 0 when the channel is not open
        24   calls            32  errors           40  sent_bytes     48  received_bytes
        56   call_ns          64  copied_bytes     72  outstanding    80  lane[8]
        88   doorbell[8]      96  worker[32]       128 service[64]    192 buckets[64]
        704  trust[16]        720 checked          728 rejected      736 pads_taken    744 pads_waited
        752  reserved
        768  worker_revision  of what follows, which the worker writes
        776  worker_published_ns
        784  run_calls        792 failed_calls     800 compute_ns     808 queued_ns
        816  waiting_calls    824 share_ppm        832 batched_calls    840 batched_with     848 reserved
    """

    _fields_ = (
        ("revision", c_uint64),
        ("published_ns", c_uint64),
        ("opened_ns", c_uint64),
        ("calls", c_uint64),
        ("errors", c_uint64),
        ("sent_bytes", c_uint64),
        ("received_bytes", c_uint64),
        ("call_ns", c_uint64),
        ("copied_bytes", c_uint64),
        ("outstanding", c_uint64),
        ("lane", c_char * 8),
        ("doorbell", c_char * 8),
        ("worker", c_char * 32),
        ("service", c_char * 64),
        ("buckets", c_uint64 * BUCKETS),
        ("trust", c_char * 16),
        ("checked", c_uint64),
        ("rejected", c_uint64),
        ("pads_taken", c_uint64),
        ("pads_waited", c_uint64),
        ("reserved0", c_uint8 * 16),
        ("worker_revision", c_uint64),
        ("worker_published_ns", c_uint64),
        ("run_calls", c_uint64),
        ("failed_calls", c_uint64),
        ("compute_ns", c_uint64),
        ("queued_ns", c_uint64),
        ("waiting_calls", c_uint64),
        ("share_ppm", c_uint64),
        ("batched_calls", c_uint64),
        ("batched_with", c_uint64),
        ("reserved1", c_uint8 * 176),
    )


class SegmentHeader(ctypes.LittleEndianStructure):
    """The first page of a segment.

    ::

        0    magic[8]            8   version          12  byte_order
        16   total_bytes         24  arena_offset     32  arena_bytes
        40   channels_offset     48  channel_bytes    56  channel_count   60  alignment
        64   submission_depth    68  submission_slot_bytes
        72   completion_depth    76  completion_slot_bytes
        80   instance[32]        112 owner[32]
        144  maker_pid           148 owner_pid        152 made_at_ns (CLOCK_REALTIME)
        160  statistics_offset   168 statistics_bytes (of one channel)
        176  reserved
        256  client_sleeping     1 while the client is about to block on its doorbell (client writes)
        264  reserved
        512  arena               ArenaStatistics (client writes)
        2144 reserved up to 4096
    """

    _fields_ = (
        ("magic", c_char * 8),
        ("version", c_uint32),
        ("byte_order", c_uint32),
        ("total_bytes", c_uint64),
        ("arena_offset", c_uint64),
        ("arena_bytes", c_uint64),
        ("channels_offset", c_uint64),
        ("channel_bytes", c_uint64),
        ("channel_count", c_uint32),
        ("alignment", c_uint32),
        ("submission_depth", c_uint32),
        ("submission_slot_bytes", c_uint32),
        ("completion_depth", c_uint32),
        ("completion_slot_bytes", c_uint32),
        ("instance", c_char * INSTANCE_BYTES),
        ("owner", c_char * OWNER_BYTES),
        ("maker_pid", c_uint32),
        ("owner_pid", c_uint32),
        ("made_at_ns", c_uint64),
        ("statistics_offset", c_uint64),
        ("statistics_bytes", c_uint64),
        ("reserved0", c_uint8 * 80),
        ("client_sleeping", c_uint64),
        ("reserved1", c_uint8 * 248),
        ("arena", ArenaStatistics),
        ("reserved2", c_uint8 * (PAGE - 512 - ctypes.sizeof(ArenaStatistics))),
    )


class ChannelHeader(ctypes.LittleEndianStructure):
    """The words that client and worker exchange beside the queues; 128 bytes apart, so no two writers share a line pair.

    ::

        128  completions_taken   completions that the client has taken                (client writes)
        256  submissions_taken   frames that the worker has taken                     (worker writes)
        384  worker_sleeping     1 while the worker is about to block on its doorbell (worker writes)
    """

    _fields_ = (
        ("reserved0", c_uint8 * 128),
        ("completions_taken", c_uint64),
        ("reserved1", c_uint8 * 120),
        ("submissions_taken", c_uint64),
        ("reserved2", c_uint8 * 120),
        ("worker_sleeping", c_uint64),
        ("reserved3", c_uint8 * 120),
    )


class TensorDescriptor(ctypes.LittleEndianStructure):
    """Where a tensor lies and how to see it.

    ::

        0   offset      of the first element, bytes from the start of its space; the number of a kept tensor
        8   nbytes      of the elements (not of the extent that strides span)
        16  dtype   17  ndim   18  space   19  flags (0)
        24  shape[8]    elements; dimensions from ndim on are 0
        88  strides[8]  elements
    """

    _fields_ = (
        ("offset", c_uint64),
        ("nbytes", c_uint64),
        ("dtype", c_uint8),
        ("ndim", c_uint8),
        ("space", c_uint8),
        ("flags", c_uint8),
        ("reserved", c_uint32),
        ("shape", c_int64 * MAX_DIMS),
        ("strides", c_int64 * MAX_DIMS),
    )


class SubmissionFrame(ctypes.LittleEndianStructure):
    """One call on its way to the worker: a slot of the submission queue, or one message on the zmq lane.

    What changes from call to call comes first; from ``op_id`` on, calls of one op on the same blocks are the same, byte for byte, which a
    worker may use to recognise what it has checked before::

        0   sequence         L2; written last
        8   call_id          unique among the calls outstanding on the channel
        16  deadline_ns      CLOCK_MONOTONIC; 0 for none; a call not begun by then is answered EXPIRED
        24  submitted_ns     CLOCK_MONOTONIC
        32  generations[12]  of the block that each tensor lies in: another value, another block
        80  op_id            given by bind
        84  input_count      86  output_count    88  flags (0)    92  metadata_bytes
        96  tensors[12]      inputs first, then outputs
        1920 metadata[128]   msgpack, the op's per-call arguments
    """

    _fields_ = (
        ("sequence", c_uint64),
        ("call_id", c_uint64),
        ("deadline_ns", c_uint64),
        ("submitted_ns", c_uint64),
        ("generations", c_uint32 * MAX_TENSORS),
        ("op_id", c_uint32),
        ("input_count", c_uint16),
        ("output_count", c_uint16),
        ("flags", c_uint32),
        ("metadata_bytes", c_uint32),
        ("tensors", TensorDescriptor * MAX_TENSORS),
        ("metadata", c_uint8 * METADATA_BYTES),
    )


class CompletionFrame(ctypes.LittleEndianStructure):
    """How a call ended, on its way back.

    ::

        0   sequence      L2; written last
        8   call_id       of the submission
        16  status        Status
        20  reserved0     24  text_bytes     28  reserved1
        32  queued_ns     from submitted_ns until the worker took the frame
        40  compute_ns    running the op
        48  reserved2
        64  body[960]     error text, UTF-8
    """

    _fields_ = (
        ("sequence", c_uint64),
        ("call_id", c_uint64),
        ("status", c_uint32),
        ("reserved0", c_uint32),
        ("text_bytes", c_uint32),
        ("reserved1", c_uint32),
        ("queued_ns", c_uint64),
        ("compute_ns", c_uint64),
        ("reserved2", c_uint8 * 16),
        ("body", c_uint8 * TEXT_BYTES),
    )


STRUCTURES: tuple[type[ctypes.LittleEndianStructure], ...] = (
    PicturedBlock,
    ArenaStatistics,
    SegmentHeader,
    ChannelStatistics,
    ChannelHeader,
    TensorDescriptor,
    SubmissionFrame,
    CompletionFrame,
)


def offset_of(structure: type[ctypes.LittleEndianStructure], field: str) -> int:
    """Byte offset of ``field`` in ``structure``."""
    return int(getattr(structure, field).offset)


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


SUBMISSION_SLOT_BYTES = ctypes.sizeof(SubmissionFrame)
COMPLETION_SLOT_BYTES = ctypes.sizeof(CompletionFrame)
STATISTICS_BYTES = ctypes.sizeof(ChannelStatistics)
