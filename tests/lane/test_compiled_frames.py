"""What does not fit into a frame is refused by the compiled ends and those in Python alike, and leaves the queue as it was; what fits is the same."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmbroker.lane.frames import FrameTemplate
from shmbroker.memory import layout
from tests.lane.kinds_of_ends import (
    DEPTH,
    KINDS,
    SLEEPING,
    TEMPLATE,
    UINT32_MAX,
    UINT64_MAX,
    Pair,
    completion,
    make,
    module_of,
    segment_for,
    submission,
    template_of,
    with_words,
)


class Index:
    """An integer that is no int."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __index__(self) -> int:
        return self.number


class BadIndex:
    def __index__(self) -> int:
        raise LookupError("no number")


NUMBERS: dict[str, tuple[Any, type[Exception]]] = {
    "negative": (-1, ValueError),
    "far below": (-(1 << 70), ValueError),
    "beyond 64 bits": (1 << 64, ValueError),
    "far beyond": (1 << 20000, ValueError),
    "a fraction": (1.5, TypeError),
    "a whole float": (1.0, TypeError),
    "a text": ("1", TypeError),
    "bytes": (b"1", TypeError),
    "None": (None, TypeError),
    "a list": ([1], TypeError),
    "negative by __index__": (Index(-1), ValueError),
    "beyond by __index__": (Index(1 << 64), ValueError),
    "an __index__ that raises": (BadIndex(), LookupError),
}
HALVES: dict[str, tuple[Any, type[Exception]]] = {**NUMBERS, "beyond 32 bits": (1 << 32, ValueError)}


SUBMISSIONS: dict[str, tuple[tuple[Any, ...], type[Exception]]] = {
    **{f"{name}: {what}": (submission(**{name: value}), error)
       for name in ("call_id", "deadline_ns", "submitted_ns") for what, (value, error) in NUMBERS.items()},
    **{f"offset {i}: {what}": (submission(offsets=[value, 256][:: 1 - 2 * i]), error)
       for i in (0, 1) for what, (value, error) in NUMBERS.items()},
    **{f"generation {i}: {what}": (submission(generations=[value, 1][:: 1 - 2 * i]), error)
       for i in (0, 1) for what, (value, error) in HALVES.items()},
    "too few offsets": (submission(offsets=[256]), ValueError),
    "too few generations": (submission(generations=[1]), ValueError),
    "too few of both": (submission(offsets=[], generations=[]), ValueError),
    "too many offsets": (submission(offsets=[256] * 3), ValueError),
    "too many generations": (submission(generations=[1] * 3), ValueError),
    "too many of both": (submission(offsets=[256] * 3, generations=[1] * 3), ValueError),
    "far too many of both": (submission(offsets=[256] * 99, generations=[1] * 99), ValueError),
    "too many of both, with metadata": (submission(template=template_of(2, b"x"), offsets=[1] * 3, generations=[1] * 3), ValueError),
    "some for no tensors": (submission(template=template_of(0)), ValueError),
    "offsets that are a number": (submission(offsets=256), TypeError),
    "offsets that are None": (submission(offsets=None), TypeError),
    "offsets that are an iterator": (submission(offsets=iter([256, 512])), TypeError),
    "generations that are a number": (submission(generations=8), TypeError),
    "generations that are None": (submission(generations=None), TypeError),
    "a template that is a number": (submission(template=7), AttributeError),
    "a template that is None": (submission(template=None), AttributeError),
    "no generations": (submission()[:-1], TypeError),
    "something more": ((*submission(), 1), TypeError),
}  # fmt: skip
COMPLETIONS: dict[str, tuple[Any, type[Exception]]] = {
    **{f"{name}: {what}": (completion(**{name: value}), error)
       for name in ("call_id", "queued_ns", "compute_ns") for what, (value, error) in NUMBERS.items()},
    **{f"status: {what}": (completion(status=value), error) for what, (value, error) in HALVES.items()},
    "a body too long by one": (completion(body=bytes(layout.TEXT_BYTES + 1)), ValueError),
    "a body far too long": (completion(body=bytes(1 << 20)), ValueError),
    "a body that is a text": (completion(body="why"), TypeError),
    "a body that is an empty text": (completion(body=""), TypeError),
    "a body that is a number": (completion(body=3), TypeError),
    "a body that is None": (completion(body=None), TypeError),
    "a body that is a list": (completion(body=[1, 2]), TypeError),
    "a body that is an empty list": (completion(body=[]), TypeError),
    "four parts": (completion()[:-1], ValueError),
    "six parts": ((*completion(), 1), ValueError),
    "no parts": ((), ValueError),
    "a number": (5, TypeError),
    "None": (None, TypeError),
}  # fmt: skip

GOOD_SUBMISSIONS: dict[str, tuple[Any, ...]] = {
    "the least": submission(call_id=0, deadline_ns=0, submitted_ns=0, offsets=[0, 0], generations=[0, 0]),
    "the most": submission(
        call_id=UINT64_MAX, deadline_ns=UINT64_MAX, submitted_ns=UINT64_MAX, offsets=[UINT64_MAX] * 2, generations=[UINT32_MAX] * 2
    ),
    "beyond 63 bits": submission(call_id=1 << 63, offsets=[1 << 63, (1 << 63) - 1]),
    "booleans": submission(call_id=True, deadline_ns=False),
    "integers of NumPy": submission(call_id=np.int64(5), offsets=[np.uint64(256), np.int32(512)], generations=[np.uint8(8), 9]),
    "__index__": submission(submitted_ns=Index(7), generations=[Index(8), Index(UINT32_MAX)]),
    "tuples": submission(offsets=(256, 512), generations=(8, 9)),
    "no tensors": submission(template=template_of(0), offsets=[], generations=[]),
    "no tensors, with metadata": submission(template=template_of(0, b"x"), offsets=[], generations=[]),
    "the most tensors": submission(
        template=template_of(layout.MAX_TENSORS, bytes(range(layout.METADATA_BYTES))), offsets=[*range(12)], generations=[*range(12)]
    ),
}
GOOD_COMPLETIONS: dict[str, tuple[Any, ...]] = {
    "the least": completion(call_id=0, status=0, queued_ns=0, compute_ns=0, body=b""),
    "the most": completion(
        call_id=UINT64_MAX, status=UINT32_MAX, queued_ns=UINT64_MAX, compute_ns=UINT64_MAX, body=b"\xff" * layout.TEXT_BYTES
    ),
    "integers of NumPy": completion(call_id=np.uint64(5), status=np.int8(1), queued_ns=np.int64(6)),
    "a boolean": completion(status=True),
    "no text": completion(body=b""),
    "no text, and not the same object": completion(body=bytes(bytearray())),
}


def without_sequence(taken: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    """What was taken, less the number of its slot where there is one: a submission's last part is its whole frame."""
    return taken if taken is None or len(taken[-1]) < layout.SUBMISSION_SLOT_BYTES else (*taken[:-1], taken[-1][8:])


def check_refused(pair: Pair, error: type[Exception], good: tuple[Any, ...], bad: tuple[Any, ...]) -> None:
    """A bad frame between two good ones."""
    assert pair.send(*good)
    pair.sleep()
    before = pair.sequences()
    for _ in range(2 * DEPTH):
        with pytest.raises(error):
            pair.send(*bad)
    assert pair.sequences() == before
    assert pair.rung == 0, "the peer was rung for, and nothing was published"
    first = pair.receiver.take()
    assert first is not None
    assert not pair.receiver.ready()
    assert pair.receiver.take() is None
    for _ in range(DEPTH):  # also through the slot that was begun
        assert pair.send(*good)
        assert without_sequence(pair.receiver.take()) == without_sequence(first)


@pytest.mark.parametrize("case", SUBMISSIONS)
def test_a_submission_that_does_not_fit_is_refused_by_both_with_one_error_and_leaves_the_queue_as_it_was(
    ends: ModuleType, case: str
) -> None:
    bad, error = SUBMISSIONS[case]
    check_refused(Pair(ends, "Submission"), error, submission(), bad)


@pytest.mark.parametrize("case", COMPLETIONS)
def test_a_completion_that_does_not_fit_is_refused_by_both_with_one_error_and_leaves_the_queue_as_it_was(
    ends: ModuleType, case: str
) -> None:
    bad, error = COMPLETIONS[case]
    check_refused(Pair(ends, "Completion"), error, (completion(),), (bad,))


@pytest.mark.parametrize("case", GOOD_SUBMISSIONS)
def test_a_submission_that_fits_is_taken_as_it_was_given(ends: ModuleType, case: str) -> None:
    template, call_id, deadline_ns, submitted_ns, offsets, generations = good = GOOD_SUBMISSIONS[case]
    pair = Pair(ends, "Submission")
    for _ in range(DEPTH):  # in the last slot too
        assert pair.send(*good) is True
    for _ in range(DEPTH):
        taken = pair.receiver.take()
        assert taken[:3] == (int(call_id), int(deadline_ns), int(submitted_ns))
        frame = layout.SubmissionFrame.from_buffer_copy(taken[4])
        assert [tensor.offset for tensor in frame.tensors[: len(offsets)]] == [number.__index__() for number in offsets]
        assert list(frame.generations[: len(offsets)]) == [number.__index__() for number in generations]
        assert template.packed[layout.offset_of(layout.SubmissionFrame, "op_id") - 8 :][:16] in taken[3]


@pytest.mark.parametrize("case", GOOD_COMPLETIONS)
def test_a_completion_that_fits_is_taken_as_it_was_given(ends: ModuleType, case: str) -> None:
    good = GOOD_COMPLETIONS[case]
    pair = Pair(ends, "Completion")
    for _ in range(DEPTH):
        assert pair.send(good) is True
    for _ in range(DEPTH):
        taken = pair.receiver.take()
        assert tuple(taken) == good
        assert [type(part) for part in taken] == [int, int, int, int, bytes]


number = st.one_of(
    st.integers(0, UINT64_MAX), st.integers(-(1 << 66), 1 << 66), st.sampled_from([0, 1, UINT32_MAX, 1 << 32, 1 << 63, UINT64_MAX, 1 << 64]),
    st.booleans(), st.none(), st.floats(), st.text(max_size=2), st.binary(max_size=2),
)  # fmt: skip
numbers = st.lists(number, max_size=4).flatmap(lambda values: st.sampled_from([values, tuple(values)]))


def outcome(pair: Pair, arguments: tuple[Any, ...]) -> object:
    """What comes out of the other end, or the class of what is raised."""
    try:
        sent = pair.send(*arguments)
    except Exception as error:
        assert not pair.receiver.ready()
        return type(error)
    return sent, pair.receiver.take()


@settings(deadline=None, max_examples=300)
@given(template=st.sampled_from([template_of(0), template_of(1), TEMPLATE, template_of(3, b"metadata")]),
       ids=st.tuples(number, number, number), offsets=numbers, generations=numbers)  # fmt: skip
def test_both_kinds_make_the_same_of_any_submission(template: FrameTemplate, ids: tuple[Any, ...], offsets: Any, generations: Any) -> None:
    of_python, of_c = (outcome(Pair(module_of(kind), "Submission"), (template, *ids, offsets, generations)) for kind in KINDS)
    assert of_python == of_c


@settings(deadline=None, max_examples=300)
@given(st.lists(number, max_size=5).map(tuple) | st.tuples(number, number, number, number, st.binary(max_size=layout.TEXT_BYTES + 2)))
def test_both_kinds_make_the_same_of_any_completion(completion: tuple[Any, ...]) -> None:
    of_python, of_c = (outcome(Pair(module_of(kind), "Completion"), (completion,)) for kind in KINDS)
    assert of_python == of_c


@pytest.mark.parametrize("depth", [1, 2, DEPTH])
@pytest.mark.parametrize(("what", "good", "bad"), [
    ("Submission", submission(), submission(call_id=-1, offsets=None)), ("Completion", (completion(),), ((1, 2),)),
])  # fmt: skip
def test_a_full_queue_is_noticed_before_anything_else(
    ends: ModuleType, what: str, good: tuple[Any, ...], bad: tuple[Any, ...], depth: int
) -> None:
    pair = Pair(ends, what, depth)
    assert all([pair.send(*good) for _ in range(depth)])
    pair.sleep()
    before = bytes(pair.segment.map)
    assert pair.send(*good) is False
    assert pair.send(*bad) is False
    assert bytes(pair.segment.map) == before
    assert pair.rung == 0
    assert all([pair.receiver.take() for _ in range(depth)])


@pytest.mark.parametrize(("what", "good"), [("Submission", submission()), ("Completion", (completion(),))])
def test_a_frame_is_published_before_its_doorbell_fails(ends: ModuleType, what: str, good: tuple[Any, ...]) -> None:
    segment = with_words(segment_for(what))

    def ring() -> None:
        raise LookupError("no bell")

    sender = make(ends, f"{what}Sender", segment, ring=ring)
    receiver = make(ends, f"{what}Receiver", segment)
    segment.words[SLEEPING // 8] = 1
    with pytest.raises(LookupError):
        sender.submit(*good) if what == "Submission" else sender.complete(*good)
    assert receiver.take() is not None
    assert segment.words[SLEEPING // 8] == 0


def test_offsets_that_change_while_they_are_read_are_refused(compiled_ends: ModuleType) -> None:
    """An integer's own code may do anything, so also to the list that it stands in."""

    class Shrinks:
        def __index__(self) -> int:
            offsets.clear()
            return 256

    class Sends:
        def __index__(self) -> int:
            while pair.send(*submission()):
                pass
            return 256

    pair = Pair(compiled_ends, "Submission")
    offsets: list[Any] = [Shrinks(), object()]
    with pytest.raises(ValueError, match="0 offsets and 2 generations for a template of 2 tensors"):
        pair.send(*submission(offsets=offsets))
    assert pair.sequences() == [0] * DEPTH
    assert pair.send(*submission(offsets=[Sends(), 0])) is False, "the queue has become full meanwhile"
    assert pair.sequences() == [1, 2, 3, 4]


@pytest.mark.parametrize("packed", [b"", bytes(87), bytes(2041), b"\xff" * 2040, bytes(76) + b"\x01" + bytes(11), "text", None], ids=repr)
def test_what_is_no_template_is_refused(compiled_ends: ModuleType, packed: Any) -> None:
    """Lengths and counts of another's making never lead out of the slot."""
    pair = Pair(compiled_ends, "Submission")
    for count in (0, 1, 2, 12, 13):
        with pytest.raises((ValueError, TypeError)):
            pair.send(SimpleNamespace(packed=packed), 1, 0, 1, [0] * count, [0] * count)
    assert pair.sequences() == [0] * DEPTH
