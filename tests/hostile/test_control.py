"""Control messages that no peer should send: broker and worker refuse or ignore them, and no peer can speak for another."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shmbroker
from shmbroker.control import messages as m
from shmbroker.control.liveness import process_of, this_process
from shmbroker.memory import names
from tests.hostile.conftest import HonestClient
from tests.hostile.peer import Footprint, repeating
from tests.hostile.wire import Wire, opening
from tests.processes import wait_until, worker_process

GROWTH_BYTES = 8 << 20
"""What a broker or a worker may hold more after some thousand messages: answers on their way, and what malloc keeps."""


@pytest.fixture(scope="module")
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.term()


@pytest.fixture
def to_broker(broker: shmbroker.LocalBroker, honest: HonestClient, context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[Wire]:
    wire = Wire(context, f"ipc://{broker.environment['SHMBROKER_RUNTIME_DIR']}/{broker.instance}.sock")
    yield wire
    wire.close()


def worker_info(to_broker: Wire, service: str = "test") -> m.WorkerInfo:
    found = to_broker.ask(m.FindService(service))
    assert isinstance(found, m.Found)
    return found.workers[0]


@pytest.fixture
def to_worker(to_broker: Wire, context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[Wire]:
    wire = Wire(context, worker_info(to_broker).endpoint)
    yield wire
    wire.close()


@pytest.fixture(params=["broker", "worker"])
def wire(request: pytest.FixtureRequest, to_broker: Wire, to_worker: Wire) -> Wire:
    return to_broker if request.param == "broker" else to_worker


@pytest.fixture(autouse=True)
def _nobody_grows(worker: Footprint, broker: shmbroker.LocalBroker, honest: HonestClient) -> Iterator[None]:
    both = worker, Footprint(broker.pid)
    before = [one.private_bytes() for one in both]
    yield
    assert [one.private_bytes() - had < GROWTH_BYTES for one, had in zip(both, before, strict=True)] == [True, True]


ME = "00000000deadbeef"
PROCESS = m.ProcessId(os.getpid(), 1, 1)
STATS = m.PeerStats(1, 2, (m.ChannelInfo("s", "w", "shm", "sem", "ipc"),), m.ArenaInfo(1, 1, 1, 1))

MESSAGES: list[m.Message] = [
    m.Hello("worker", ME, PROCESS, "name", "1", ("service",), "ipc://nowhere", "cpu"),
    m.Heartbeat(ME, STATS),
    m.Goodbye(ME),
    m.MakeSegment(ME, PROCESS, 4097, 1, 2),  # refused for its size, so that no mutation of it makes one
    m.MakeBell("no id", PROCESS),
    m.FindService("test"),
    m.GetStatus(),
    m.OpenChannel(ME, "name", PROCESS, f"/shmbroker.x.segment.{ME}", 0, "test", "shm", "sem", f"/shmbroker.x.bell.{ME}"),
    m.AskChannels(),
    m.ChannelCount(3),
    m.CloseChannel(1),
    m.ChannelClosed(True),
    m.OpenDeviceArena(1, b"\0" * 64, 4096),
    m.Bind(1, "double", {"a": [1, "x", None, {"b": 2.5}]}),
    m.AskOutSpec(1, 1, (m.SpecInfo((1, 2), "float32"),), {"a": 1}),
    m.Welcome("e"),
    m.HeartbeatSeen("e", True),
    m.Made("/shmbroker.x"),
    m.Found((m.WorkerInfo(ME, "w", PROCESS, "ipc://x", "cpu"),), ("a",)),
    m.PeerGone(ME),
    m.ChannelOpened(1, "shm", "sem", "b", "e", b"t", ("o",)),
    m.Done(),
    m.Bound(1),
    m.OutSpecs((m.SpecInfo((1,), "float32"),), True),
    m.Refused("ValueError", "text"),
]
"""One of each, none of which does anything."""

by_name = pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)


def test_each_kind_of_message_is_among_them() -> None:
    kinds = {type(message) for message in MESSAGES}
    assert {kind.__name__ for kind in m.AnyMessage.__args__} - {kind.__name__ for kind in kinds} == {"StatusReport"}


@by_name
def test_a_message_cut_anywhere_is_refused(wire: Wire, message: m.Message) -> None:
    whole = m.encode(message, 7)
    for length in range(len(whole)):
        (answer,) = wire.say(whole[:length])
        assert isinstance(answer, m.Refused)


ODD: list[Any] = [
    None,
    -1,
    1 << 63,
    -(1 << 63),
    (1 << 64) - 1,
    "",
    "x" * 2000,
    "\0\n\x1b[2J",
    [],
    [[]],
    {},
    {"a": 1},
    b"\xff",
    1.5,
    float("nan"),
    True,
]


def _fields(told: Any) -> Iterator[tuple[Callable[[Any], None], Any]]:
    """Every place in nested lists and dictionaries, as a function that puts something else there, and what is there."""
    items = told.items() if isinstance(told, dict) else enumerate(told) if isinstance(told, list) else ()
    for key, value in list(items):
        yield lambda odd, key=key: told.__setitem__(key, odd), value
        yield from _fields(value)


@by_name
def test_a_field_of_another_type_or_size_is_refused_or_answered(wire: Wire, message: m.Message) -> None:
    told = msgspec.msgpack.decode(msgspec.msgpack.encode(message))
    if isinstance(message, m.MakeSegment):
        del told["arena_bytes"]  # no mutation of it may make one
    for put, value in list(_fields(told)):
        for odd in ODD:
            put(odd)
            answers = wire.say(msgspec.msgpack.encode([m.PROTOCOL_VERSION, 7, told]))
            assert len(answers) <= 1
        put(value)


@by_name
def test_a_message_of_another_version_is_refused_with_both_versions(wire: Wire, message: m.Message) -> None:
    for version in (0, m.PROTOCOL_VERSION + 1, -1, (1 << 64) - 1):
        (answer,) = wire.say(msgspec.msgpack.encode([version, 7, message]))
        assert isinstance(answer, m.Refused)
        assert answer.type_name == "ProtocolMismatch"
        assert f"version {version}" in answer.text


def _deep(levels: int, opening: bytes = b"\x91") -> bytes:
    return opening * levels + b"\xc0"


@pytest.mark.parametrize("levels", [100, 10_000, 900_000])
@pytest.mark.parametrize("around", [b"", b"\x93\x02\x07", b"\x93\x02\x07\x84\xa4type\xa4Bind\xa7channel\x01\xa2op\xa1x\xa6static\x81\xa1a"])
def test_a_message_nested_however_deep_is_refused(wire: Wire, levels: int, around: bytes) -> None:
    (answer,) = wire.say(around + _deep(levels))
    assert isinstance(answer, m.Refused)


def test_a_message_over_the_limit_is_refused_and_a_far_longer_one_ends_its_connection_alone(wire: Wire) -> None:
    (answer,) = wire.say(m.encode(m.FindService("x" * m.MAX_MESSAGE_BYTES)))
    assert isinstance(answer, m.Refused)
    assert "at most 1048576" in answer.text
    wire.send(bytes(16 << 20))
    wire.renew()
    assert len(wire.say(m.encode(m.CloseChannel(0)))) == 1


@pytest.mark.parametrize("count", [2, 3, 100])
def test_a_message_of_more_parts_than_one_is_ignored(wire: Wire, count: int) -> None:
    assert wire.say(*[m.encode(m.GetStatus())] * count) == []


def test_a_long_text_comes_back_shortened_and_reaches_nobody_else(wire: Wire) -> None:
    for message in (
        m.Bind(1, "x" * 500_000, {}),
        m.Goodbye("\0" * 500_000),
        m.FindService("\0" * 500_000),
        m.Hello("client", "\0" * 900_000, PROCESS, "", ""),
    ):
        for answer in wire.say(m.encode(message)):
            assert len(m.encode(answer)) < 20_000


encodings = st.sampled_from([m.encode(message, 7) for message in MESSAGES])


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid encoding with some bytes changed, taken out, put in, doubled, or moved into another message."""
    data = bytearray(draw(encodings))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 4)):
            case 0:
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case 1:
                del data[at : at + draw(st.integers(1, 8))]
            case 2:
                data[at:at] = draw(st.binary(max_size=8))
            case 3:
                data[at:at] = data[: draw(st.integers(0, len(data)))]
            case _:
                data[at:] = draw(encodings)[at:]
    return bytes(data)


@settings(deadline=None, max_examples=300, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(mutated() | st.binary(max_size=300), min_size=1, max_size=20))
def test_mutated_messages_are_refused_ignored_or_answered(to_broker: Wire, to_worker: Wire, messages: list[bytes]) -> None:
    for data in messages:
        assert len(to_broker.say(data)) <= 1
        assert len(to_worker.say(data)) <= 1


# --- decoders --------------------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=1000, derandomize=True)
@given(mutated() | st.binary(max_size=400))
def test_a_decoder_raises_documented_errors_only(data: bytes) -> None:
    try:
        envelope = m.open_envelope(data)
        body = m.read_body(envelope)
    except (ValueError, shmbroker.ProtocolMismatch):
        return
    assert m.read_body(m.open_envelope(m.encode(body, envelope.request))) == body


@pytest.mark.parametrize("levels", [1100, 100_000])
def test_a_decoder_is_not_led_into_any_depth(levels: int) -> None:
    head = b"\x93" + bytes([m.PROTOCOL_VERSION]) + b"\x07"
    for data in (
        _deep(levels),
        head + _deep(levels),
        head + b"\x84\xa4type\xa4Bind\xa7channel\x01\xa2op\xa1x\xa6static\x81\xa1a" + _deep(levels),
    ):
        with pytest.raises(ValueError):
            m.read_body(m.open_envelope(data))


# --- speaking for others ---------------------------------------------------------------------------------------------------------------


def test_nobody_says_goodbye_for_another(to_broker: Wire, honest: HonestClient) -> None:
    victim = worker_info(to_broker)
    assert to_broker.say(m.encode(m.Goodbye(victim.peer))) == []
    assert worker_info(to_broker) == victim


def test_nobody_says_hello_in_the_name_of_another_who_lives(to_broker: Wire) -> None:
    victim = worker_info(to_broker)
    for process in (this_process(), victim.process, m.ProcessId((1 << 31) - 1, 1, this_process().namespace)):
        answer = to_broker.ask(m.Hello("worker", victim.peer, process, "impostor", "1", (), "ipc://elsewhere"))
        assert isinstance(answer, m.Refused)
    assert worker_info(to_broker) == victim


def test_nobody_beats_for_another(to_broker: Wire) -> None:
    victim = worker_info(to_broker)
    answer = to_broker.ask(m.Heartbeat(victim.peer, m.PeerStats(calls=123_456_789_123)))
    assert isinstance(answer, m.HeartbeatSeen)
    assert not answer.known
    status = to_broker.ask(m.GetStatus())
    assert isinstance(status, m.StatusReport)
    assert all(peer.stats.calls != 123_456_789_123 for peer in status.peers)


def test_nobody_makes_the_objects_of_another(to_broker: Wire, client: shmbroker.Client) -> None:
    for request in (m.MakeSegment(client.id, this_process(), 4096, 1, 2), m.MakeBell(client.id, this_process())):
        assert isinstance(to_broker.ask(request), m.Refused)


@pytest.mark.parametrize("field", ["role", "name", "version", "endpoint", "device", "services"])
@pytest.mark.parametrize("text", ["x" * 1000, "\x1b[2J", "a\nb", "\0"], ids=["long", "escape", "two lines", "zero"])
def test_what_a_peer_tells_of_itself_is_short_and_printable(to_broker: Wire, field: str, text: str) -> None:
    """For it is told to others."""
    fields: dict[str, Any] = {"role": "client", "name": "n", "version": "1", "endpoint": "", "device": "", "services": ()}
    fields[field] = (text,) if field == "services" else text
    assert isinstance(to_broker.ask(m.Hello(peer=names.new_id(), process=this_process(), **fields)), m.Refused)


@pytest.mark.parametrize("segment", ["/a\0b", "/etc/passwd", "../../etc/passwd", "/shmbroker.x.segment.0123456789abcdef"])
def test_a_peer_names_no_other_file_as_its_segment(to_broker: Wire, segment: str) -> None:
    assert isinstance(to_broker.ask(m.Hello("client", names.new_id(), this_process(), "n", "1", segment=segment)), m.Refused)
    assert isinstance(to_broker.ask(m.GetStatus()), m.StatusReport)


@pytest.fixture
def victim(broker: shmbroker.LocalBroker, worker: Footprint) -> Iterator[shmbroker.Client]:
    """Another honest client, whose ids are known to the hostile one."""
    with shmbroker.connect(arena="1M", channels=4, name="victim") as victim:
        double = victim.channel("test").bind("double")
        yield victim
        for number in range(1, 50):  # forms that the worker has not met: its view of the segment is still whole
            x = victim.empty((number,)).fill_(number)
            assert double(x).tolist() == [2.0 * number] * number


def test_no_segment_of_another_can_be_opened(to_worker: Wire, client: shmbroker.Client, victim: shmbroker.Client) -> None:
    for changes in (
        {"segment": victim.segment.name},
        {"segment": victim.segment.name, "bell": names.bell_name(victim.instance, victim.id)},
        {"client": victim.id},
        {"bell": names.bell_name(victim.instance, victim.id)},
    ):
        assert isinstance(to_worker.ask(opening(client, **changes)), m.Refused)


def test_an_area_that_is_open_is_not_opened_by_another_process(to_worker: Wire, victim: shmbroker.Client) -> None:
    (channel,) = victim.channels
    answer = to_worker.ask(opening(victim, index=channel.index, process=process_of(1)))
    assert isinstance(answer, m.Refused)
    assert "is open for process" in answer.text


def test_who_opens_in_the_name_of_another_and_dies_closes_nothing_of_the_others(
    to_worker: Wire, victim: shmbroker.Client, worker: Footprint
) -> None:
    ended = subprocess.Popen(["true"])
    process = process_of(ended.pid)
    ended.wait()
    opened = to_worker.ask(opening(victim, index=0, process=process))
    assert isinstance(opened, m.ChannelOpened)
    wait_until(lambda: isinstance(to_worker.ask(m.Bind(opened.channel, "double", {})), m.Refused))  # it is noticed


def test_numbers_of_channels_cannot_be_guessed(to_worker: Wire, victim: shmbroker.Client) -> None:
    for number in [*range(-10, 200), (1 << 62), (1 << 63) - 1]:
        assert isinstance(to_worker.ask(m.CloseChannel(number)), m.Refused)
        assert isinstance(to_worker.ask(m.Bind(number, "double", {})), m.Refused)
        assert isinstance(to_worker.ask(m.AskOutSpec(number, 1, (), {})), m.Refused)


# --- out of order ----------------------------------------------------------------------------------------------------------------------


def test_requests_for_a_channel_before_it_is_open_or_after_it_is_closed_are_refused(to_worker: Wire, client: shmbroker.Client) -> None:
    opened = to_worker.ask(opening(client))
    assert isinstance(opened, m.ChannelOpened)
    assert isinstance(to_worker.ask(m.AskOutSpec(opened.channel, 1, (), {})), m.Refused)
    assert isinstance(to_worker.ask(m.Bind(opened.channel, "double", {})), m.Bound)
    assert isinstance(to_worker.ask(m.CloseChannel(opened.channel)), m.ChannelClosed)
    for late in (m.CloseChannel(opened.channel), m.Bind(opened.channel, "double", {}), m.AskOutSpec(opened.channel, 1, (), {})):
        assert isinstance(to_worker.ask(late), m.Refused)


def test_an_area_opened_again_has_one_channel_the_last(to_worker: Wire, client: shmbroker.Client, worker: Footprint) -> None:
    last = to_worker.ask(opening(client))
    assert isinstance(last, m.ChannelOpened)
    files = worker.files()
    for _ in range(50):
        before, last = last, to_worker.ask(opening(client))
        assert isinstance(last, m.ChannelOpened)
        assert isinstance(to_worker.ask(m.CloseChannel(before.channel)), m.Refused)
    wait_until(lambda: worker.files() <= files)
    assert isinstance(to_worker.ask(m.CloseChannel(last.channel)), m.ChannelClosed)


NAMES = ["", "/", "/x\0y", "/" + "x" * 250, "/../../etc/passwd", "/dev/shm/x", "x", "/shmbroker.x.segment.0123456789abcdef"]


def test_openings_that_fail_leave_nothing_open(to_worker: Wire, client: shmbroker.Client, worker: Footprint) -> None:
    files = worker.files()
    changes: list[dict[str, Any]] = [{"segment": name} for name in NAMES] + [{"bell": name} for name in NAMES]
    changes += [{"index": index} for index in (-1, 4, 1 << 62)] + [{"client": name} for name in NAMES]
    changes += [{"service": "other"}, {"lane": "x"}, {"doorbell": "x"}, {"doorbell": "socket"}]
    for _ in range(10):
        for change in changes:
            assert isinstance(to_worker.ask(opening(client, **change)), m.Refused), change
    assert worker.files() == files


def test_questions_of_shapes_that_no_frame_could_carry_are_refused(to_worker: Wire, client: shmbroker.Client) -> None:
    opened = to_worker.ask(opening(client))
    assert isinstance(opened, m.ChannelOpened)
    bound = to_worker.ask(m.Bind(opened.channel, "double", {}))
    assert isinstance(bound, m.Bound)
    one = m.SpecInfo((1,), "float32")
    questions = [((one,) * 13, {}), ((one,), {"a": "x" * 1000}), ((m.SpecInfo((1,), "complex"),), {}), ((m.SpecInfo((-1,), "int8"),), {})]
    questions += [((m.SpecInfo((1 << 62, 1 << 62), "int8"),), {}), ((m.SpecInfo((1,) * 1000, "int8"),), {}), ((one,), {"nonsense": 1})]
    for inputs, arguments in questions:
        answer = to_worker.ask(m.AskOutSpec(opened.channel, bound.op_id, inputs, arguments))
        assert isinstance(answer, m.Refused)
        assert answer.type_name in ("BadInput", "RemoteOpError")
    assert isinstance(to_worker.ask(m.CloseChannel(opened.channel)), m.ChannelClosed)


@contextlib.contextmanager
def flooded(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> Iterator[None]:
    """Requests without end, and none of the answers taken."""
    sockets = [context.socket(zmq.DEALER) for _ in range(2)]
    data = m.encode(m.CloseChannel(0), 1)
    for socket in sockets:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(endpoint)

    def flood() -> None:
        for socket in sockets:
            with contextlib.suppress(zmq.Again):
                for _ in range(100):
                    socket.send(data, zmq.NOBLOCK)

    with repeating(flood):
        yield
    for socket in sockets:
        socket.close()


def test_a_worker_that_is_flooded_with_requests_still_stops_when_told(to_broker: Wire, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    with worker_process("flooded") as process, flooded(context, worker_info(to_broker, "flooded").endpoint):
        process.terminate()
        assert process.wait(300) == 0


def test_a_broker_that_is_flooded_with_requests_still_notices_a_death(
    broker: shmbroker.LocalBroker, to_broker: Wire, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    with worker_process("mortal") as process, flooded(context, to_broker.endpoint):
        process.kill()
        process.wait()

        def gone() -> bool:
            found = to_broker.ask(m.FindService("mortal"))
            return isinstance(found, m.Found) and not found.workers

        wait_until(gone)
