"""The same on lane zmq: frames of any length and content, with any token."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

import shmbroker
from shmbroker.control import messages as m
from shmbroker.lane.completion_frames import read_completion
from shmbroker.lane.zmq_lane import COMPLETE, READY, SUBMIT
from shmbroker.memory import layout
from shmbroker.memory.layout import Status, SubmissionFrame
from tests.hostile.conftest import HonestClient
from tests.hostile.mutation import Mutator
from tests.hostile.peer import Footprint, valid_frame
from tests.hostile.wire import Wire, opening

SEED = 20240607
FRAMES = 2000
ANSWER_MS = 20_000


class ByHand:
    """Both sockets of a client on lane zmq."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, token: bytes) -> None:
        self._sockets = [self._connect(context, endpoint, identity + token) for identity in (SUBMIT, COMPLETE)]
        self.submissions, self.completions = self._sockets
        self.completions.send(READY)
        assert self.answer() == READY

    @staticmethod
    def _connect(context: zmq.Context[zmq.Socket[bytes]], endpoint: str, identity: bytes) -> zmq.Socket[bytes]:
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, identity)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(endpoint)
        return socket

    def answer(self) -> bytes:
        assert self.completions.poll(ANSWER_MS), "no answer"
        return self.completions.recv()

    def close(self) -> None:
        for socket in self._sockets:
            socket.close()


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)  # also when the test failed and left its sockets open


def test_frames_of_any_length_and_content_are_answered_once_each(
    client: shmbroker.Client, honest: HonestClient, worker: Footprint, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    # Opened by hand, so that these are the first sockets of their names: others would be turned away until the first are seen to be closed.
    wire = Wire(context, client.channel("test").endpoint)
    opened = wire.ask(opening(client, index=1, lane="zmq", doorbell="socket"))
    assert isinstance(opened, m.ChannelOpened)
    bound = wire.ask(m.Bind(opened.channel, "double", {}))
    assert isinstance(bound, m.Bound)
    op_id = bound.op_id
    by_hand = ByHand(context, opened.endpoint, opened.token)
    start = client.segment.geometry.arena_offset
    arena = range(start, client.segment.geometry.total_bytes)
    valid = valid_frame(op_id, [(start, 1, (4, 4), (4, 1)), (start + 4096, 1, (4, 4), (4, 1))], 1)
    frames = Mutator([valid], arena, SEED).batch(FRAMES)
    random = np.random.default_rng(SEED)
    statuses = set()
    for frame in frames:
        whole = frame.tobytes()
        sent = whole[: int(random.integers(len(whole) + 1))] if random.random() < 0.3 else whole
        by_hand.submissions.send(sent)
        completion = read_completion(by_hand.answer())
        assert completion is not None
        assert completion.call_id == int.from_bytes(sent[8:16], "little")
        statuses.add(completion.status)
    assert {Status.OK, Status.BAD_FRAME} <= statuses
    for parts in ([b""], [bytes(SubmissionFrame())] * 3, [b"", b""]):
        by_hand.submissions.send_multipart(parts)
    stranger = ByHand(context, opened.endpoint, secrets.token_bytes(16))
    stranger.submissions.send(bytes(valid))  # a token that no channel has
    by_hand.submissions.send(bytes(layout.SUBMISSION_SLOT_BYTES + 1))  # ends this connection
    stranger.close()
    by_hand.close()
    honest.check()
    assert isinstance(wire.ask(m.CloseChannel(opened.channel)), m.ChannelClosed)


@settings(deadline=None, max_examples=500, derandomize=True)
@given(st.binary(max_size=1100))
def test_a_completion_of_any_bytes_is_one_within_its_bounds_or_none(frame: bytes) -> None:
    completion = read_completion(frame)
    assert completion is None or len(completion.body) <= max(0, len(frame) - 64)
