"""ZMTP as whoever is connected to speaks it on a unix socket: version 3.0 with mechanism NULL (https://rfc.zeromq.org/spec/23).

::

    greeting  FF, 8 bytes, 7F | major, minor | mechanism, 20 bytes | as-server | 31 zeros      64 bytes, each way
    READY     a command, each way, whose properties tell the kind of socket
    message   frames: flags (1 more, 2 long, 4 command) | length, 1 byte or 8 | bytes
"""

from __future__ import annotations

from collections.abc import Iterator

_GREETING_BYTES = 64
_MECHANISM = slice(12, 32)
_NULL = b"NULL".ljust(20, b"\0")
_MAJOR = 3
_MORE, _LONG, _COMMAND = 1, 2, 4
_SHORT_BYTES = 255

GREETING = b"\xff" + bytes(8) + b"\x7f" + bytes((_MAJOR, 0)) + _NULL + bytes(32)


def _property(name: bytes, value: bytes) -> bytes:
    return bytes((len(name),)) + name + len(value).to_bytes(4, "big") + value


def _frame(flags: int, body: bytes) -> bytes:
    if len(body) > _SHORT_BYTES:
        return bytes((flags | _LONG,)) + len(body).to_bytes(8, "big") + body
    return bytes((flags, len(body))) + body


READY = _frame(_COMMAND, b"\x05READY" + _property(b"Socket-Type", b"ROUTER") + _property(b"Identity", b""))


def message(body: bytes) -> bytes:
    """A message of one frame."""
    return _frame(0, body)


class Reader:
    """Takes the bytes of one connection, gives its messages. ``most_bytes``: of a message."""

    __slots__ = ("_buffer", "_greeted", "_most_bytes", "_parts", "spoke")

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._buffer = bytearray()
        self._greeted = False
        self._parts: list[bytes] = []
        self.spoke = False
        """Whether a message has come."""

    def messages(self, data: bytes) -> Iterator[list[bytes]]:
        """The messages, each as its frames, that are whole with ``data``. Raises ValueError for what is not ZMTP, or too long."""
        buffer = self._buffer
        buffer += data
        if not self._greeted:
            if buffer[:1] != b"\xff" or (len(buffer) > 10 and not (buffer[9] == 0x7F and buffer[10] >= _MAJOR)):
                raise ValueError("no greeting of ZMTP 3")
            if len(buffer) < _GREETING_BYTES:
                return
            if buffer[_MECHANISM] != _NULL:
                raise ValueError("another mechanism than NULL")
            del buffer[:_GREETING_BYTES]
            self._greeted = True
        while (frame := self._frame()) is not None:
            flags, body = frame
            if flags & _COMMAND:
                continue  # READY, which tells nothing that is needed
            self._parts.append(body)
            if not flags & _MORE:
                parts, self._parts = self._parts, []
                self.spoke = True
                yield parts

    def _frame(self) -> tuple[int, bytes] | None:
        """The next frame, once it is there."""
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        flags = buffer[0]
        begin = 9 if flags & _LONG else 2
        if len(buffer) < begin:
            return None
        length = int.from_bytes(buffer[1:begin], "big")
        if flags & ~(_MORE | _LONG | _COMMAND):
            raise ValueError(f"flags {flags:#x} of a frame")
        if length + sum(map(len, self._parts)) > self._most_bytes or len(self._parts) > _SHORT_BYTES:
            raise ValueError(f"a message of more than {self._most_bytes} bytes")
        if len(buffer) < begin + length:
            return None
        body = bytes(buffer[begin : begin + length])
        del buffer[: begin + length]
        return flags, body
