"""What an ingress and a replica tell each other of one request, as bytes."""

from __future__ import annotations

import msgspec

from tee_worker.serving.resumption import Resumption, Step


class Question(msgspec.Struct, array_like=True):
    """A request, and where to go on with its answer."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    resumption: Resumption | None = None


class Here(msgspec.Struct, tag=True, array_like=True):
    """A replica has taken the request."""

    replica: str


class Begun(msgspec.Struct, tag=True, array_like=True):
    """The head of its response; for a stream: how many answers, and whether it may go on elsewhere."""

    status: int
    headers: list[tuple[bytes, bytes]]
    created: int = 0
    answers: int = 0
    resumable: bool = False


class Part(msgspec.Struct, tag=True, array_like=True):
    """Some of its body. ``steps``: of a chunk; ``failed``: it tells of a failure that another replica need not have; ``last``: that was all."""

    data: bytes
    steps: list[Step] | None = None
    failed: bool = False
    last: bool = False


Answering = Here | Begun | Part

encode = msgspec.msgpack.Encoder().encode
question_of = msgspec.msgpack.Decoder(Question).decode
answering_of = msgspec.msgpack.Decoder(list[Answering]).decode
