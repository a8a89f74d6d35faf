"""One segment: a POSIX shared-memory object with a header, made by the broker and mapped by its client and by workers."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import time

from shmbroker.errors import SegmentError, SharedMemoryFull
from shmbroker.memory import layout, names
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.hold import Hold
from shmbroker.memory.stores import VARIABLE, SegmentStore, store


class Segment:
    """A mapped segment. ``map`` covers all of it, ``words`` is the same memory as native 64-bit words.

    Whatever views ``map`` keeps the memory mapped, so :meth:`close` never takes memory from under a living tensor.
    """

    __slots__ = ("geometry", "hold", "map", "name", "owner", "words")

    def __init__(self, name: str, geometry: Geometry, owner: str, mapping: mmap.mmap, hold: Hold | None) -> None:
        self.name = name
        self.geometry = geometry
        self.owner = owner
        self.map = mapping
        self.hold = hold
        self.words = memoryview(mapping).cast("Q")

    @classmethod
    def attach(cls, name: str, *, hold: bool) -> Segment:
        """Map the segment ``name``; every size is checked against the file's true size before it is believed.

        A client holds its segment (``hold=True``) for life. A worker does not: it must not keep a dead client's memory alive.
        Raises :class:`SegmentError` when it is gone, still being made, or of another layout.
        """
        fd = _open(name)
        held: Hold | None = None
        try:
            # A lock belongs to the open file, and a mapping keeps its file open: the hold needs an open file of its own to end before it.
            if hold:
                held = Hold(_open(name))
            geometry, owner = read_header(name, fd)
            # Populating maps every page now: a first touch later would cost a fault for each 4 KiB, about 0.1 us apiece.
            populate = getattr(mmap, "MAP_POPULATE", 0)
            mapping = mmap.mmap(fd, geometry.total_bytes, flags=mmap.MAP_SHARED | populate)
        except FileNotFoundError:
            raise SegmentError(f"segment {name} was reaped before it could be held: connect again") from None
        except BlockingIOError:
            raise SegmentError(f"segment {name} is locked by another process, which only a reaper does, and briefly: try again") from None
        except BaseException:
            if held is not None:
                held.release()
            raise
        finally:
            os.close(fd)
        return cls(name, geometry, owner, mapping, held)

    def is_named(self) -> bool:
        """Whether others can map it by its name; not so once that was taken away. Of a segment that is held."""
        return self.hold is not None and self.hold.is_at(store().path(self.name))

    def close(self) -> None:
        """Give up the hold. The memory is unmapped when the last view of it dies.

        ``mmap.close()`` is never called: NumPy arrays over a mapping do not keep it from being closed, and the next read would be a crash.
        """
        if self.hold is not None:
            self.hold.release()
            self.hold = None
        if hasattr(self, "map"):
            del self.words, self.map


def _open(name: str) -> int:
    where = store()
    try:
        return where.open(name)
    except FileNotFoundError:
        raise SegmentError(
            f"segment {name} does not exist in {where} (its client or the broker is gone, or ${VARIABLE} is not the same for all): connect again"
        ) from None
    except PermissionError:
        raise SegmentError(
            f"segment {name} may not be opened by user {os.geteuid()}: run as the user it belongs to, or start the broker with "
            "--group and a group that both are in"
        ) from None


def make_segment(name: str, geometry: Geometry, *, instance: str, owner: str, owner_pid: int, mode: int = 0o600, gid: int = -1) -> Hold:
    """Make, size and publish a segment; the returned hold keeps the reaper away until its client holds it too.

    Raises :class:`SharedMemoryFull` when the file system has not enough room, leaving nothing behind.
    """
    if len(owner.encode()) >= layout.OWNER_BYTES or len(instance.encode()) >= layout.INSTANCE_BYTES:
        raise ValueError(f"owner {owner!r} or instance {instance!r} is longer than the header has room for")
    where = store()
    while True:
        # fault: before segment made
        fd = where.create(name, mode)
        # fault: after segment made
        try:
            hold = Hold(fd)
            break
        except FileNotFoundError:
            continue  # the reaper met the fresh object before its lock was on: nothing was in it yet
        except BaseException:
            unlink_segment(name)
            raise
    try:
        if where.folder is not None:
            os.fchmod(fd, mode)  # the creation mode was cut by the umask
            if gid >= 0:
                os.fchown(fd, -1, gid)
        _reserve(fd, geometry.total_bytes, where)
        with mmap.mmap(fd, layout.PAGE) as page:
            header = layout.SegmentHeader.from_buffer(page)
            header.version = 0  # in a file that held a segment before
            header.magic = layout.MAGIC
            header.byte_order = layout.BYTE_ORDER_MARK
            header.total_bytes = geometry.total_bytes
            header.arena_offset = geometry.arena_offset
            header.arena_bytes = geometry.arena_bytes
            header.statistics_offset = geometry.statistics_offset
            header.statistics_bytes = layout.STATISTICS_BYTES
            header.channels_offset = geometry.channels_offset
            header.channel_bytes = geometry.channel_bytes
            header.channel_count = geometry.channel_count
            header.alignment = layout.ALIGNMENT
            header.submission_depth = header.completion_depth = geometry.depth
            header.submission_slot_bytes = layout.SUBMISSION_SLOT_BYTES
            header.completion_slot_bytes = layout.COMPLETION_SLOT_BYTES
            header.instance = instance.encode()
            header.owner = owner.encode()
            header.maker_pid = os.getpid()
            header.owner_pid = owner_pid
            header.made_at_ns = time.time_ns()
            # fault: before header published
            header.version = layout.LAYOUT_VERSION  # L1: last
            # fault: after header published
            del header
    except BaseException:
        unlink_segment(name)
        hold.release()
        raise
    return hold


def unlink_segment(name: str) -> None:
    """Take the name away; who has it mapped keeps the memory. A name already gone is fine."""
    store().unlink(name)


def _reserve(fd: int, nbytes: int, where: SegmentStore) -> None:
    """Make sure that every page exists now: a page that is missing later is a SIGBUS in whoever touches it."""
    found = os.fstat(fd)
    if where.folder is None and (found.st_size >= nbytes or not stat.S_ISREG(found.st_mode)):
        return  # a device's memory is as large as it is: mapping it tells
    space = os.fstatvfs(fd)
    free = space.f_bavail * space.f_frsize
    try:
        if free < nbytes:
            raise OSError(errno.ENOSPC, "checked beforehand")
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise
        total = space.f_blocks * space.f_frsize
        raise SharedMemoryFull(
            f"{where} is too small: a segment of {nbytes} bytes was asked for, {free} of {total} bytes are free; ask for a "
            f"smaller --arena, run 'shmbroker gc', or enlarge it (docker: --shm-size={-(-nbytes // 2**30) + 1}g; else: "
            f"mount -o remount,size={-(-(nbytes + total - free) // 2**20) + 64}m {where})"
        ) from None


def read_header(name: str, fd: int) -> tuple[Geometry, str]:
    """Geometry and owner of the segment that ``fd`` is open on, every size checked. Nothing stays mapped: its client may cut the file short.

    Raises :class:`SegmentError` when it is still being made, of another layout, spoilt, or of another instance than its name says.
    """
    found = os.fstat(fd)
    true_bytes = found.st_size
    fixed = store().folder is None  # a file or device that may be larger than the segment in it
    if true_bytes < layout.PAGE and stat.S_ISREG(found.st_mode):
        raise SegmentError(f"segment {name} is still being made ({true_bytes} bytes so far): try again")
    if fixed:  # a device may be mapped, not read
        with mmap.mmap(fd, layout.PAGE, prot=mmap.PROT_READ) as page:
            header = layout.SegmentHeader.from_buffer_copy(page)
    else:
        header = layout.SegmentHeader.from_buffer_copy(os.pread(fd, layout.PAGE, 0).ljust(layout.PAGE, b"\0"))
    if header.version == 0:
        raise SegmentError(f"segment {name} is still being made: try again")
    if header.magic != layout.MAGIC or header.byte_order != layout.BYTE_ORDER_MARK:
        raise SegmentError(f"segment {name} is not one of shmbroker's (magic {header.magic!r}, byte order {header.byte_order:#x})")
    if header.version != layout.LAYOUT_VERSION:
        raise SegmentError(
            f"segment {name} has layout version {header.version}, this program speaks {layout.LAYOUT_VERSION}: run the same "
            "release of shmbroker at both ends"
        )
    try:
        geometry = Geometry(header.arena_bytes, header.channel_count, header.submission_depth)
    except ValueError as error:
        raise SegmentError(f"segment {name} has a spoilt header: {error}") from None
    told = (
        header.total_bytes,
        header.arena_offset,
        header.statistics_offset,
        header.statistics_bytes,
        header.channels_offset,
        header.channel_bytes,
        header.completion_depth,
        header.submission_slot_bytes,
        header.completion_slot_bytes,
        header.alignment,
    )
    expected = (
        geometry.total_bytes,
        geometry.arena_offset,
        geometry.statistics_offset,
        layout.STATISTICS_BYTES,
        geometry.channels_offset,
        geometry.channel_bytes,
        geometry.depth,
        layout.SUBMISSION_SLOT_BYTES,
        layout.COMPLETION_SLOT_BYTES,
        layout.ALIGNMENT,
    )
    fits = geometry.total_bytes == true_bytes or (fixed and (geometry.total_bytes < true_bytes or not stat.S_ISREG(found.st_mode)))
    if told != expected or not fits:
        raise SegmentError(f"segment {name} has a spoilt header: sizes {told}, expected {expected} in {true_bytes} bytes")
    named = names.parse(name.lstrip("/"))
    if named is not None and header.instance != named.instance.encode():
        raise SegmentError(
            f"segment {name} was made for instance {header.instance.decode('ascii', 'replace')!r}: two brokers share a file for segments; give each "
            f"another ${VARIABLE}"
        )
    return geometry, header.owner.decode("ascii", "replace")
