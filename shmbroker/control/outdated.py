"""Peers that speak another version of the control protocol: what can be read of their messages all the same, and how they are told of."""

from __future__ import annotations

import msgspec

from shmbroker.control.messages import PROTOCOL_VERSION, Envelope, OutdatedPeer

_MOST_CHARACTERS = 100
"""Of what a message says that was never checked."""


class _Process(msgspec.Struct):
    pid: int = 0


class _Sender(msgspec.Struct):
    """What a message of any version may tell of who sent it: these fields have been so named since version 1."""

    peer: str = ""
    role: str = ""
    name: str = ""
    process: _Process | None = None


_decoder = msgspec.msgpack.Decoder(_Sender)


def sender_of(envelope: Envelope, pid: int = 0) -> OutdatedPeer:
    """Who sent a message of another version, as far as it and ``pid`` (by its connection) tell. Never raises: the rest is empty, or 0."""
    try:
        told = _decoder.decode(envelope.body)
    except (msgspec.DecodeError, RecursionError):
        told = _Sender()
    if not pid and told.process is not None and 0 < told.process.pid < 1 << 31:
        pid = told.process.pid
    return OutdatedPeer(_plain(told.role), _plain(told.peer), _plain(told.name), pid, envelope.version)


def _plain(text: str) -> str:
    return text if text.isprintable() and len(text) <= _MOST_CHARACTERS else ""


def in_words(peer: OutdatedPeer) -> str:
    """``worker pid 4711 speaks version 2: restart it``, for log, ``status`` and ``doctor``."""
    who = f"{peer.role or 'process'} {f'pid {peer.pid}' if peer.pid else peer.peer}"
    if peer.version > PROTOCOL_VERSION:
        return f"{who} speaks version {peer.version} of the control protocol, the broker {PROTOCOL_VERSION}: restart the broker with its release"
    return f"{who} speaks version {peer.version}: restart it (the broker speaks version {PROTOCOL_VERSION} of the control protocol)"
