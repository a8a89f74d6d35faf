"""A client's segment as a worker has it mapped: views of it are readable until the last of them dies."""

from __future__ import annotations

import gc
import os

import torch

from shmbroker.arena.spec import TensorSpec
from shmbroker.lane.submission_reader import Descriptor, Form
from shmbroker.memory import layout, names
from shmbroker.memory.geometry import Geometry
from shmbroker.memory.segment import Segment, make_segment, unlink_segment
from shmbroker.worker.mapped_segment import MappedSegment
from tests.conftest import InChild
from tests.shared_memory import is_mapped

SMALL = Geometry(arena_bytes=16 * layout.PAGE, channel_count=2, depth=4)


def _read_a_view_after_closing(instance: str) -> None:
    name = names.segment_name(instance, names.new_id())
    maker = make_segment(name, SMALL, instance=instance, owner="test", owner_pid=os.getpid())
    mapped = MappedSegment(Segment.attach(name, hold=False))
    maker.release()
    unlink_segment(name)
    mapped.segment.words[SMALL.arena_offset // 8] = 4711
    view = mapped.view(Descriptor(SMALL.arena_offset, Form(TensorSpec((2, 2), torch.int64), (2, 1), 32, 32)))
    other = torch.frombuffer(mapped.segment.map, dtype=torch.int64)[SMALL.arena_offset // 8 :]
    array = other.numpy()
    mapped.close()
    del mapped
    gc.collect()
    assert is_mapped(name)
    assert view.tolist() == [[4711, 0], [0, 0]]
    view[1, 1] = 12
    assert (int(other[3]), int(array[3])) == (12, 12)
    del view, other
    assert is_mapped(name)
    del array
    assert not is_mapped(name)


def test_a_workers_view_of_a_segment_stays_readable_after_the_segment_is_closed(instance: str, in_child: InChild) -> None:
    """In a child, which alone would die of reading what is no longer mapped."""
    in_child(lambda: _read_a_view_after_closing(instance))
