"""The control protocol: typed messages, msgpack on the wire, one version number for all of them.

Who asks whom::

    client, worker -> broker   Hello, Heartbeat, Goodbye, MakeSegment, MakeBell, FindService, GetStatus
    broker -> worker, client   PeerGone
    client -> worker           AskChannels, OpenChannel, CloseChannel, OpenDeviceArena, Bind, AskOutSpec

Every request is answered once, by its answer or by ``Refused``; heartbeats and PeerGone are not answered.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from shmbroker.errors import ProtocolMismatch

PROTOCOL_VERSION = 5

MAX_MESSAGE_BYTES = 1 << 20
"""No control message comes near this; a longer one is refused before it is read."""


Text = Annotated[str, msgspec.Meta(max_length=256)]
"""What a peer tells of itself and the broker passes on: so short that no peer can make the answers to others too long."""

Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
"""Of anything."""


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages; the tag on the wire is the class's name."""


class ProcessId(msgspec.Struct, frozen=True):
    """A process for good: a pid alone may be given again."""

    pid: Annotated[int, msgspec.Meta(ge=1, le=(1 << 31) - 1)]
    start_time: Count
    """Clock ticks after boot (``/proc/PID/stat``)."""
    namespace: Count
    """Inode of the pid namespace: in another one, pids mean other processes."""


class ChannelInfo(msgspec.Struct, frozen=True):
    """An open channel, as its client sees it."""

    service: Text
    worker: Text
    lane: Text
    doorbell: Text
    control: Text
    """Transport of the control channel: ipc or tcp."""
    calls: Count = 0
    sent_bytes: Count = 0
    """Of inputs, handed over through shared memory."""
    received_bytes: Count = 0
    """Of outputs."""
    socket_bytes: Count = 0
    trust: Text = ""


class ArenaInfo(msgspec.Struct, frozen=True):
    """Occupancy of an arena, bytes."""

    total_bytes: Count
    held_bytes: Count
    largest_free_bytes: Count
    blocks: Count


class PeerStats(msgspec.Struct, frozen=True):
    """What a process tells of itself with every heartbeat."""

    calls: Count = 0
    errors: Count = 0
    channels: Annotated[tuple[ChannelInfo, ...], msgspec.Meta(max_length=1024)] = ()
    arena: ArenaInfo | None = None


class Hello(Message, frozen=True):
    """I am here. Sent at start and whenever the broker is a new one; lists all that the broker must know to adopt the sender."""

    role: Text
    """client or worker."""
    peer: str
    """The sender's id."""
    process: ProcessId
    name: Text
    version: Text
    services: Annotated[tuple[Text, ...], msgspec.Meta(max_length=64)] = ()
    endpoint: Text = ""
    """Where a worker takes control requests of clients."""
    device: Text = ""
    segment: Text = ""


class Welcome(Message, frozen=True):
    """Answer to Hello. ``epoch`` is another for another broker process."""

    epoch: str


class Heartbeat(Message, frozen=True):
    """I still am."""

    peer: str
    stats: PeerStats


class HeartbeatSeen(Message, frozen=True):
    """Answer to Heartbeat; a peer that meets a foreign epoch, or is not ``known``, says Hello again."""

    epoch: str
    known: bool


class Goodbye(Message, frozen=True):
    """I am leaving in good order."""

    peer: str


class MakeSegment(Message, frozen=True):
    """Make a segment for me."""

    peer: str
    process: ProcessId
    """Until it says Hello, what is made for it is given back when this process ends."""
    arena_bytes: int
    channel_count: int
    depth: int


class MakeBell(Message, frozen=True):
    """Make a semaphore for me to sleep on."""

    peer: str
    process: ProcessId


class Made(Message, frozen=True):
    """The object's POSIX name; the broker holds it until the peer says Hello."""

    name: str


class FindService(Message, frozen=True):
    """Who offers this service?"""

    service: str


class WorkerInfo(msgspec.Struct, frozen=True):
    """A worker, as the broker introduces it."""

    peer: str
    name: str
    process: ProcessId
    endpoint: str
    device: str


class Found(Message, frozen=True):
    """Workers that offer the service, longest registered first; and all services there are."""

    workers: tuple[WorkerInfo, ...]
    services: tuple[str, ...]


class GetStatus(Message, frozen=True):
    """Tell me everything."""


class PeerStatus(msgspec.Struct, frozen=True):
    """One process that the broker knows."""

    role: str
    peer: str
    name: str
    pid: int
    services: tuple[str, ...]
    device: str
    segment: str
    segment_bytes: int
    age_seconds: float
    silent_seconds: float
    """Since its last heartbeat."""
    stats: PeerStats
    version: str = ""
    """Of shmbroker, as it told; empty from a broker that does not pass it on."""
    namespace: int = 0
    """Of pids, as in :class:`ProcessId`."""


class OutdatedPeer(msgspec.Struct, frozen=True):
    """A process that speaks another version of this protocol, as far as that can be known."""

    role: str
    """client or worker; empty where nothing tells."""
    peer: str
    name: str
    pid: int
    """0 where nothing tells."""
    version: int
    """Of the control protocol."""


class StatusReport(Message, frozen=True):
    """All that the broker knows."""

    instance: str
    endpoint: str
    pid: int
    version: str
    uptime_seconds: float
    shm_free_bytes: int
    peers: tuple[PeerStatus, ...]
    outdated: tuple[OutdatedPeer, ...] = ()
    """Those that live and cannot join, since they speak another version."""


class PeerGone(Message, frozen=True):
    """Broker to everyone: this process is gone, and what was its own is reaped."""

    peer: str


class AskChannels(Message, frozen=True):
    """How many channels are open on you?"""


class ChannelCount(Message, frozen=True):
    """Answer to AskChannels; and to OpenChannel, where more are open than it allows: then none was opened."""

    channels: Count


class OpenChannel(Message, frozen=True):
    """Map my segment and serve channel area ``index`` of it."""

    client: Text
    client_name: Text
    process: ProcessId
    segment: Text
    index: int
    service: Text
    lane: str
    doorbell: Text
    bell: Text
    at_most: Count | None = None
    """Open it only while no more channels than so many are open: a client that has compared several workers knows none with fewer."""


class ChannelOpened(Message, frozen=True):
    """Answer to OpenChannel: lane and doorbell as agreed, and what the client needs to use them."""

    channel: int
    lane: str
    doorbell: str
    bell: str
    endpoint: str
    token: bytes
    ops: tuple[str, ...]
    identity: str = ""
    """Workers of one identity answer alike: one may take the other's place."""


class CloseChannel(Message, frozen=True):
    """I have no more calls on this channel."""

    channel: int


class ChannelClosed(Message, frozen=True):
    """Answer to CloseChannel: no frame of the channel is run any more. Until it is ``over`` it can be asked again."""

    over: bool
    """Whether none is being run either: only then does nobody write into its client's memory."""


class Done(Message, frozen=True):
    """It is done."""


class OpenDeviceArena(Message, frozen=True):
    """My tensors lie in this device allocation too: open it by its CUDA IPC handle. Answered by Done; ends with the client's last channel."""

    channel: int
    handle: Annotated[bytes, msgspec.Meta(max_length=256)]
    nbytes: Annotated[int, msgspec.Meta(ge=1, le=(1 << 48))]


class Bind(Message, frozen=True):
    """Give op ``op`` with these static arguments a number."""

    channel: int
    op: str
    static: dict[str, Any]


class Bound(Message, frozen=True):
    """Answer to Bind. Without an ``out_spec`` of its own, the client asks for the outputs' shapes."""

    op_id: Annotated[int, msgspec.Meta(ge=1, le=(1 << 32) - 1)]
    """Not 0, which calls about kept tensors have."""
    in_place: bool = False
    """Whether the op writes into its inputs."""


class SpecInfo(msgspec.Struct, frozen=True):
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: str


class AskOutSpec(Message, frozen=True):
    """What are the outputs of this bound op, given such inputs?"""

    channel: int
    op_id: int
    inputs: tuple[SpecInfo, ...]
    arguments: dict[str, Any]
    """Of the call."""


class OutSpecs(Message, frozen=True):
    """Answer to AskOutSpec. ``single``: the op returns one tensor rather than a sequence."""

    outputs: tuple[SpecInfo, ...]
    single: bool


class Refused(Message, frozen=True):
    """The request could not be done: the error's type and text."""

    type_name: str
    text: str


AnyMessage = (
    Hello | Welcome | Heartbeat | HeartbeatSeen | Goodbye | MakeSegment | MakeBell | Made | FindService | Found | GetStatus
    | StatusReport | PeerGone | AskChannels | ChannelCount | OpenChannel | ChannelOpened | CloseChannel | ChannelClosed
    | OpenDeviceArena | Done | Bind | Bound | AskOutSpec | OutSpecs | Refused
)  # fmt: skip


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """What travels: protocol version and number of the request, then the message, decoded only once the version is known."""

    version: int
    request: int
    body: msgspec.Raw


_encoder = msgspec.msgpack.Encoder()
_envelope_decoder = msgspec.msgpack.Decoder(Envelope)
_body_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message, request: int = 0) -> bytes:
    """The bytes of one message."""
    return _encoder.encode(Envelope(PROTOCOL_VERSION, request, msgspec.Raw(_encoder.encode(message))))


def open_envelope(data: bytes) -> Envelope:
    """The envelope alone, of whatever version. Raises ValueError for what is no control message at all."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a control message of {len(data)} bytes; at most {MAX_MESSAGE_BYTES}")
    try:
        return _envelope_decoder.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"not a control message: {error}") from None


def read_body(envelope: Envelope) -> AnyMessage:
    """The message in an envelope. Raises :class:`ProtocolMismatch` for another version, ValueError for an unreadable message."""
    if envelope.version != PROTOCOL_VERSION:
        raise ProtocolMismatch(
            f"the peer speaks version {envelope.version} of the control protocol, this program version {PROTOCOL_VERSION}: run the same "
            "release of shmbroker at both ends"
        )
    try:
        return _body_decoder.decode(envelope.body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"a control message that cannot be read: {error}") from None
