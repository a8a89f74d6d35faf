"""The compiled parts and those in Python do the same, and refuse the same; a channel may have one kind at each end."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

import shmbroker
from shmbroker.memory import compiled
from tests.lane.kinds_of_ends import ENDS, SLOTS, Pair, arguments_of, completion, make, segment_for, submission, uses, with_words
from tests.processes import run, wait_until, worker_process

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


# --- before_sleep, after_sleep --------------------------------------------------------------------------------------------------------------


def words_of(count: int) -> memoryview:
    return memoryview(bytearray(8 * count)).cast("Q")


def test_the_words_to_sleep_under_go_up_and_down_and_no_others(ends: ModuleType) -> None:
    near, far = words_of(3), words_of(2)
    ends.before_sleep([(near, 1), (far, 0)])
    assert (near.tolist(), far.tolist()) == ([0, 1, 0], [1, 0])
    ends.after_sleep([(near, 1), (far, 0)])
    assert (near.tolist(), far.tolist()) == ([0, 0, 0], [0, 0])
    ends.before_sleep(())
    ends.fence()


@pytest.mark.parametrize("step", ["before_sleep", "after_sleep"])
@pytest.mark.parametrize("index", [3, 1 << 61, 1 << 70])
def test_a_word_that_is_not_in_its_memory_is_refused(ends: ModuleType, step: str, index: int) -> None:
    words = words_of(3)
    words[0] = words[2] = 7
    with pytest.raises((IndexError, OverflowError)):
        getattr(ends, step)([(words, index)])
    assert words.tolist() == [7, 0, 7]


STRANGE_WORDS = {
    "nothing": None,
    "a number": 5,
    "no pair": [None],
    "an empty pair": [()],
    "no index": [(words_of(1),)],
    "read-only": [(b"12345678", 0)],
    "a text": [("12345678", 0)],
    "a text for an index": [(words_of(1), "0")],
}


@pytest.mark.parametrize("what", STRANGE_WORDS)
def test_what_is_no_word_is_refused(ends: ModuleType, what: str) -> None:
    for step in (ends.before_sleep, ends.after_sleep):
        with pytest.raises((TypeError, ValueError, BufferError)):
            step(STRANGE_WORDS[what])


def test_a_memory_that_was_let_go_of_is_refused(ends: ModuleType) -> None:
    words = words_of(1)
    words.release()
    with pytest.raises(ValueError, match="released"):
        ends.before_sleep([(words, 0)])


def test_a_list_that_an_index_empties_meanwhile_ends_the_step(compiled_ends: ModuleType) -> None:
    sleeping: list[Any] = []

    class Emptying:
        def __index__(self) -> int:
            sleeping.clear()
            return 0

    words = words_of(1)
    sleeping += [(words, Emptying()), (words, 5)]
    compiled_ends.before_sleep(sleeping)
    assert words[0] == 1
