"""The keys of an instance whose control messages travel over TCP: a folder, made once, whose owner is a member.

::

    DIR/                    0700
      server.key_secret     0600  key pair of the broker's and the workers' sockets
      member.key_secret     0600  key pair of whoever takes part
      server.key member.key       their public halves, for programs in other languages

The files have the format of CZMQ and pyzmq certificates; a secret file holds both halves.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.auth import create_certificates, load_certificate

from shmbroker.errors import BadInput

SERVER, MEMBER = "server", "member"
OTHERS = 0o077
"""The mode bits that let anybody but the owner in."""

KEY_CHARACTERS = 40
"""Of a CURVE key in Z85."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """Both halves of a CURVE key, Z85 text."""

    public: bytes
    secret: bytes


@dataclass(frozen=True, slots=True)
class Keys:
    """All who take part have the same: the key pair that servers show, and the one that lets a member in."""

    server: KeyPair
    member: KeyPair

    @classmethod
    def load(cls, folder: Path) -> Keys:
        """Read them. Raises :class:`BadInput` when they are missing, garbled, or not secret."""
        _check_private(folder)
        return cls(_load(folder, SERVER), _load(folder, MEMBER))


def make_keys(folder: Path) -> None:
    """Make fresh keys in ``folder``, which is made too. Raises :class:`BadInput` where keys are, or where others can read."""
    before = os.umask(OTHERS)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(folder)
        for name in (SERVER, MEMBER):
            for path in (folder / f"{name}.key", folder / f"{name}.key_secret"):
                if path.exists():
                    raise BadInput(f"{path} exists and is not overwritten: name another folder, or remove that one and stop who uses it")
        for name in (SERVER, MEMBER):
            create_certificates(folder, name)
    except OSError as error:
        raise BadInput(f"keys cannot be made in {folder}: {error.strerror}") from None
    finally:
        os.umask(before)


def _check_private(path: Path) -> None:
    try:
        found = path.stat()
    except FileNotFoundError:
        raise BadInput(f"there are no keys at {path}: make some with 'shmbroker keys --make DIR', or copy the broker's") from None
    except OSError as error:
        raise BadInput(f"keys at {path} cannot be read by user {os.geteuid()}: {error.strerror}; use a copy of your own") from None
    if found.st_uid not in (0, os.geteuid()):
        raise BadInput(f"{path} belongs to user {found.st_uid}, not to {os.geteuid()}: use a copy of your own")
    if found.st_mode & OTHERS:
        raise BadInput(
            f"{path} is open to others (mode {found.st_mode & 0o777:04o}): 'chmod go= {path}', and make the keys anew if others may have "
            "read them"
        )


def _load(folder: Path, name: str) -> KeyPair:
    path = folder / f"{name}.key_secret"
    _check_private(path)
    try:
        public, secret = load_certificate(path)
        if secret is None or len(secret) != KEY_CHARACTERS or zmq.curve_public(secret) != public:
            raise ValueError
    except OSError as error:
        raise BadInput(f"key file {path} cannot be read: {error.strerror}") from None
    except (ValueError, zmq.ZMQError):
        raise BadInput(
            f"key file {path} holds no CURVE key pair: copy the broker's folder again, or make a new one with 'shmbroker keys --make'"
        ) from None
    return KeyPair(public, secret)
