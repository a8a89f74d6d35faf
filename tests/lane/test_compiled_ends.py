"""The compiled parts and those in Python do the same, and refuse the same; a channel may have one kind at each end."""

from __future__ import annotations

import gc
import importlib
import sys
import threading
from array import array
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shmbroker
from shmbroker.arena.spec import TensorSpec
from shmbroker.lane.frames import FrameTemplate
from shmbroker.memory import compiled, layout
from tests.processes import run, wait_until, worker_process

KINDS = {"python": "shmbroker.lane.python_ends", "compiled": "shmbroker.lane._ends"}
ENDS = ("SubmissionSender", "SubmissionReceiver", "CompletionSender", "CompletionReceiver")
DEPTH = 4
TAKEN, SLEEPING, SLOTS = 0, 8, 64
"""Offsets in a segment of one queue."""

UINT32_MAX, UINT64_MAX = (1 << 32) - 1, (1 << 64) - 1


def module_of(kind: str) -> ModuleType:
    if kind == "compiled":
        pytest.importorskip("shmbroker.lane._ends", reason="built without a C compiler")
    return importlib.import_module(KINDS[kind])


@pytest.fixture(params=KINDS)
def ends(request: pytest.FixtureRequest) -> ModuleType:
    """The module of each kind."""
    return module_of(str(request.param))


@pytest.fixture
def compiled_ends() -> ModuleType:
    return module_of("compiled")


def slot_bytes(name: str) -> int:
    return layout.SUBMISSION_SLOT_BYTES if name.startswith("Submission") else layout.COMPLETION_SLOT_BYTES


def segment_for(name: str, depth: int = DEPTH) -> Any:
    """What an end needs of a segment, in private memory that ends with the last slot: a sanitizer sees what is written behind it."""
    memory = array("B", [0]) * (SLOTS + depth * slot_bytes(name))  # a bytearray would have a byte more than it says
    return SimpleNamespace(map=memory, geometry=SimpleNamespace(depth=depth))


def with_words(segment: Any) -> Any:
    segment.words = memoryview(segment.map).cast("Q")
    return segment


def arguments_of(name: str, segment: Any, **changed: Any) -> dict[str, Any]:
    """What an end is made with."""
    made: dict[str, Any] = {"segment": segment, "offset": SLOTS, "taken_offset": TAKEN}
    if name.endswith("Sender"):
        made |= {"sleeping_offset": SLEEPING, "ring": lambda: None}
    return {**made, **changed}


def make(ends: ModuleType, name: str, segment: Any, **changed: Any) -> Any:
    return getattr(ends, name)(**arguments_of(name, segment, **changed))


def uses(name: str) -> dict[str, Callable[[Any], object]]:
    """Each method of an end, called as it should be."""
    return {
        "SubmissionSender": {"submit": lambda end: end.submit(TEMPLATE, 1, 0, 1, [0, 0], [1, 1]), "nudge": lambda end: end.nudge()},
        "SubmissionReceiver": {"take": lambda end: end.take(), "ready": lambda end: end.ready()},
        "CompletionSender": {"complete": lambda end: end.complete((1, 0, 0, 0, b""))},
        "CompletionReceiver": {"take": lambda end: end.take(), "ready": lambda end: end.ready()},
    }[name]


def template_of(tensors: int, metadata: bytes = b"") -> FrameTemplate:
    form = (TensorSpec((3, 5), torch.float32), (5, 1))
    return FrameTemplate(7, [form] * (tensors - 1), [form] * min(tensors, 1), metadata)


TEMPLATE = template_of(2)

CLIENT = """
import sys, gc, torch, shmbroker
from shmbroker.lane.ends import COMPILED
assert COMPILED == (sys.argv[1] == "compiled"), "the wrong kind is used"
with shmbroker.connect(arena="8M", depth=4) as client:
    channel = client.channel("test")
    # To ask the worker has it load what torch's meta device needs: under a sanitizer, for longer than an answer may take.
    double, fail = channel.bind("double", out_spec=lambda x: x), channel.bind("fail", out_spec=lambda x: x)
    for spin in (50e-6, 0.0):
        for number in range(300):
            x = client.empty((1000,)).fill_(number)
            assert torch.equal(double(x), x * 2)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.bool):
        x = torch.ones(33).to(dtype)
        y = channel.bind("contiguous", out_spec=lambda x: x)(x)
        assert y.dtype is dtype and torch.equal(y.view(torch.uint8), x.view(torch.uint8))
    captured = double.capture(client.empty((1000,)).fill_(3))
    for _ in range(300):
        assert captured.replay()[0] == 6
    futures = [double.submit(torch.full((10,), float(i))) for i in range(100)]
    assert [future.result()[0].item() for future in futures] == [2.0 * i for i in range(100)]
    try:
        fail(torch.ones(1))
    except shmbroker.RemoteOpError as error:
        assert "worker" in str(error)
    else:
        raise AssertionError("no error came")
    del x, y, captured, futures
    gc.collect()
    assert client.arena.occupancy().blocks == 0
print("all well")
"""

PURE = {"python": "1", "compiled": ""}


@pytest.mark.parametrize("client_kind", PURE)
@pytest.mark.parametrize("worker_kind", PURE)
def test_a_channel_may_have_compiled_parts_at_either_end(broker: shmbroker.LocalBroker, worker_kind: str, client_kind: str) -> None:
    if "compiled" in (worker_kind, client_kind):
        pytest.importorskip("shmbroker.lane._ends", reason="built without a C compiler")
    with worker_process(SHMBROKER_PURE_PYTHON=PURE[worker_kind]):
        done = run(sys.executable, "-c", CLIENT, client_kind, SHMBROKER_PURE_PYTHON=PURE[client_kind])
    assert (done.returncode, done.stdout) == (0, "all well\n"), done.stderr


def test_these_tests_run_with_the_compiled_parts_where_there_are_any() -> None:
    """Else a build that fails silently would go unnoticed."""
    from shmbroker.lane import ends

    pytest.importorskip("shmbroker.lane._ends", reason="built without a C compiler")
    assert ends.COMPILED == compiled.WANTED


# --- making ---------------------------------------------------------------------------------------------------------------------------


def raises_for_never_made(compiled_ends: ModuleType, name: str, end: Any) -> None:
    for use in uses(name).values():
        with pytest.raises(RuntimeError, match="never made"):
            use(end)
    if name.endswith("Receiver"):
        with pytest.raises(RuntimeError, match="never made"):
            compiled_ends.spin((end,), 0.0)


@pytest.mark.parametrize("name", ENDS)
def test_an_end_that_was_never_made_raises(compiled_ends: ModuleType, name: str) -> None:
    kind = getattr(compiled_ends, name)
    assert {method for method in vars(kind) if not method.startswith("_")} == set(uses(name)), "a method that this test does not know"
    raises_for_never_made(compiled_ends, name, kind.__new__(kind))


BEYOND = 1 << 64
MISTAKES: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "slots that end behind the segment": ({"offset": SLOTS + 8}, ValueError),
    "slots that begin behind it": ({"offset": 1 << 20}, ValueError),
    "slots between words": ({"offset": SLOTS - 4}, ValueError),
    "slots before it": ({"offset": -8}, ValueError),
    "slots beyond 64 bits": ({"offset": BEYOND + SLOTS}, ValueError),
    "slots at a fraction": ({"offset": 1.5}, TypeError),
    "slots at a text": ({"offset": "64"}, TypeError),
    "taken behind the segment": ({"taken_offset": 1 << 20}, ValueError),
    "taken between words": ({"taken_offset": 4}, ValueError),
    "taken before it": ({"taken_offset": -8}, ValueError),
    "taken beyond 64 bits": ({"taken_offset": BEYOND}, ValueError),
    "taken at a fraction": ({"taken_offset": 8.0}, TypeError),
    "sleeping behind the segment": ({"sleeping_offset": 1 << 20}, ValueError),
    "sleeping between words": ({"sleeping_offset": 12}, ValueError),
    "sleeping before it": ({"sleeping_offset": -8}, ValueError),
    "sleeping beyond 64 bits": ({"sleeping_offset": BEYOND}, ValueError),
    "no argument of that name": ({"depth": 4}, TypeError),
}
BAD_SEGMENTS: dict[str, tuple[Callable[[Any], None], type[Exception]]] = {
    "no map": (lambda segment: delattr(segment, "map"), AttributeError),
    "a map that is no buffer": (lambda segment: setattr(segment, "map", 5), TypeError),
    "no geometry": (lambda segment: delattr(segment, "geometry"), AttributeError),
    "no depth": (lambda segment: delattr(segment.geometry, "depth"), AttributeError),
    "a depth of 0": (lambda segment: setattr(segment.geometry, "depth", 0), ValueError),
    "a depth below 0": (lambda segment: setattr(segment.geometry, "depth", -4), ValueError),
    "a depth that is no power of two": (lambda segment: setattr(segment.geometry, "depth", 3), ValueError),
    "a depth beyond the segment": (lambda segment: setattr(segment.geometry, "depth", 1 << 40), ValueError),
    "a depth whose bytes are beyond 64 bits": (lambda segment: setattr(segment.geometry, "depth", 1 << 60), ValueError),
    "a depth that is a text": (lambda segment: setattr(segment.geometry, "depth", "4"), TypeError),
    "an empty map": (lambda segment: setattr(segment, "map", bytearray()), ValueError),
    "a map of less than a word": (lambda segment: setattr(segment, "map", bytearray(4)), ValueError),
}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_end_is_not_made_where_it_does_not_lie_in_the_segment(ends: ModuleType, name: str, mistake: str) -> None:
    changed, error = MISTAKES[mistake]
    if "sleeping_offset" in changed and name.endswith("Receiver"):
        error = TypeError  # it has no such argument
    with pytest.raises(error):
        make(ends, name, with_words(segment_for(name)), **changed)


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("mistake", BAD_SEGMENTS)
def test_an_end_is_not_made_of_what_is_no_segment(ends: ModuleType, name: str, mistake: str) -> None:
    spoil, error = BAD_SEGMENTS[mistake]
    segment = with_words(segment_for(name))
    spoil(segment)
    with pytest.raises(error):
        make(ends, name, segment)


@pytest.mark.parametrize("name", ENDS)
def test_a_making_that_failed_leaves_nothing_half_made(compiled_ends: ModuleType, name: str) -> None:
    kind = getattr(compiled_ends, name)
    end = kind.__new__(kind)
    for changed, _ in MISTAKES.values():
        segment = segment_for(name)
        with pytest.raises((ValueError, TypeError)):
            end.__init__(**arguments_of(name, segment, **changed))
        raises_for_never_made(compiled_ends, name, end)
        segment.map.append(0)  # which raises BufferError while anything has it
    for spoil, error in BAD_SEGMENTS.values():
        segment = segment_for(name)
        memory = segment.map
        spoil(segment)
        with pytest.raises(error):
            end.__init__(**arguments_of(name, segment))
        raises_for_never_made(compiled_ends, name, end)
        memory.append(0)
    end.__init__(**arguments_of(name, segment_for(name)))
    for use in uses(name).values():
        use(end)


@pytest.mark.parametrize("name", ENDS)
def test_an_end_is_made_once_and_keeps_its_segment(compiled_ends: ModuleType, name: str) -> None:
    first, second = segment_for(name), segment_for(name)
    end = make(compiled_ends, name, first)
    with pytest.raises(RuntimeError, match="made once"):
        end.__init__(**arguments_of(name, second))
    second.map.append(0)
    for use in uses(name).values():
        use(end)
    with pytest.raises(BufferError):
        first.map.append(0)
    del end
    first.map.append(0)


def test_an_end_that_makes_itself_meanwhile_is_made_once(compiled_ends: ModuleType) -> None:
    """Reading a segment's attributes may run any code."""
    kind = compiled_ends.CompletionReceiver
    end = kind.__new__(kind)
    inner, outer = segment_for("CompletionReceiver"), segment_for("CompletionReceiver")

    class Nested:
        map = outer.map

        @property
        def geometry(self) -> object:
            end.__init__(**arguments_of("CompletionReceiver", inner))
            return outer.geometry

    with pytest.raises(RuntimeError, match="made once"):
        end.__init__(**arguments_of("CompletionReceiver", Nested()))
    assert end.take() is None
    outer.map.append(0)


# --- what does not fit ----------------------------------------------------------------------------------------------------------------


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


def submission(**changed: Any) -> tuple[Any, ...]:
    arguments = {"template": TEMPLATE, "call_id": 5, "deadline_ns": 6, "submitted_ns": 7, "offsets": [256, 512], "generations": [8, 9]}
    return tuple({**arguments, **changed}.values())


def completion(**changed: Any) -> tuple[Any, ...]:
    return tuple({"call_id": 5, "status": 1, "queued_ns": 6, "compute_ns": 7, "body": b"why", **changed}.values())


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


class Pair:
    """Both ends of one queue."""

    def __init__(self, ends: ModuleType, what: str, depth: int = DEPTH) -> None:
        self.segment = with_words(segment_for(what, depth))
        self.rung = 0
        sender = make(ends, f"{what}Sender", self.segment, ring=self.ring)
        self.send: Callable[..., bool] = sender.submit if what == "Submission" else lambda completion: sender.complete(completion)
        self.receiver = make(ends, f"{what}Receiver", self.segment)

    def ring(self) -> None:
        self.rung += 1

    def sequences(self) -> list[int]:
        """What is published in each slot."""
        step = (len(self.segment.map) - SLOTS) // self.segment.geometry.depth
        return [self.segment.words[at // 8] for at in range(SLOTS, len(self.segment.map), step)]

    def sleep(self) -> None:
        self.segment.words[SLEEPING // 8] = 1


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


# --- spin -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0, 0.0, -1.0, float("nan"), 1e-4, float("inf"), 1 << 40], ids=str)
@pytest.mark.parametrize("what", ["Submission", "Completion"])
def test_spin_looks_once_at_least(ends: ModuleType, what: str, seconds: float) -> None:
    pair, other = Pair(ends, what), Pair(ends, "Completion")
    pair.send(*(submission() if what == "Submission" else (completion(),)))
    assert ends.spin((other.receiver, pair.receiver), seconds) is True
    assert pair.receiver.ready(), "nothing is taken"


def test_spin_looks_at_every_receiver(ends: ModuleType) -> None:
    pairs = [Pair(ends, "Completion", 1) for _ in range(100)]
    receivers = tuple(pair.receiver for pair in pairs)
    assert ends.spin(receivers, 0) is False
    pairs[-1].send(completion())
    assert ends.spin(receivers, 0) is True
    assert ends.spin((), 0) is False


@pytest.mark.parametrize("seconds", ["1", None, b"1"])
def test_spin_takes_no_time_that_is_none(ends: ModuleType, seconds: Any) -> None:
    with pytest.raises(TypeError):
        ends.spin((Pair(ends, "Completion").receiver,), seconds)


def test_a_spin_ends_within_a_second_however_long_it_may_last(ends: ModuleType) -> None:
    assert ends.spin((Pair(ends, "Completion").receiver,), 1e300) is False


@pytest.mark.parametrize("strange", [None, 5, "receiver", object()])
def test_spin_takes_no_strangers(compiled_ends: ModuleType, strange: object) -> None:
    pair = Pair(compiled_ends, "Completion")
    pair.send(completion())
    for receivers in ((pair.receiver, strange), (strange,) * 100, [pair.receiver]):
        with pytest.raises(TypeError):
            compiled_ends.spin(receivers, 0)


def test_a_segment_stays_mapped_while_a_spin_looks_at_it(compiled_ends: ModuleType) -> None:
    segment = segment_for("CompletionReceiver")
    waiting = [(make(compiled_ends, "CompletionReceiver", segment),)]
    thread = threading.Thread(target=lambda: compiled_ends.spin(waiting.pop(), 1.0))
    thread.start()
    wait_until(lambda: not waiting)
    gc.collect()  # nobody but spin has the receiver now
    try:
        segment.map.append(0)
    except BufferError:
        pass
    else:
        assert not thread.is_alive()
    thread.join()
    segment.map.append(0)
