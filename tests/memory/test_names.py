"""Names of objects in shared memory: which are ours, and whose."""

from __future__ import annotations

import os

import pytest

from shmbroker.errors import BadInput
from shmbroker.memory import layout, names


@pytest.mark.parametrize("instance", ["default", "a", "0", "x-1", "a" * 31, "9-"])
def test_instances_of_lower_case_letters_digits_and_dashes_are_taken(instance: str) -> None:
    assert names.check_instance(instance) == instance
    assert len(instance) < layout.INSTANCE_BYTES


@pytest.mark.parametrize("instance", ["", "-a", "A", "a.b", "a/b", "..", "a b", "a\n", "ä", "a_b", "a" * 32])
def test_instances_that_could_not_be_part_of_a_name_are_refused(instance: str) -> None:
    with pytest.raises(BadInput, match="cannot be used: 1 to 31 lower-case letters"):
        names.check_instance(instance)


def test_names_of_segments_and_bells_are_parsed_back() -> None:
    owner = names.new_id()
    segment = names.parse(names.segment_name("my-1", owner).lstrip("/"))
    assert segment is not None
    assert (segment.instance, segment.kind, segment.owner) == ("my-1", "segment", owner)
    assert segment.path == f"/dev/shm/shmbroker.my-1.segment.{owner}"
    bell = names.parse(os.path.basename(names.bell_path(names.bell_name("my-1", owner))))
    assert bell is not None
    assert (bell.instance, bell.kind, bell.owner) == ("my-1", "bell", owner)
    assert bell.path == names.bell_path(names.bell_name("my-1", owner)) == f"/dev/shm/sem.shmbroker.my-1.bell.{owner}"


@pytest.mark.parametrize(
    "file",
    [
        "",
        "shmbroker",
        "shmbroker.default",
        "shmbroker.default.segment.",
        "shmbroker.default.segment.0123456789abcde",
        "shmbroker.default.segment.0123456789abcdef0",
        "shmbroker.default.segment.0123456789ABCDEF",
        "shmbroker.default.other.0123456789abcdef",
        "shmbroker..segment.0123456789abcdef",
        "shmbroker.-.segment.0123456789abcdef",
        "xshmbroker.default.segment.0123456789abcdef",
        "shmbroker.default.segment.0123456789abcdef\n",
        "shmbroker.a.b.segment.0123456789abcdef",
    ],
)
def test_names_that_are_not_ours_are_not_parsed(file: str) -> None:
    assert names.parse(file) is None


def test_ids_are_sixteen_hexadecimal_digits_and_do_not_repeat() -> None:
    ids = {names.new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(one) == 16 and int(one, 16) >= 0 for one in ids)
