"""How a process reaches the broker of its instance: by unix socket, or by loopback TCP with keys."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path

from shmbroker.control.curve import CurveContext, is_loopback
from shmbroker.control.endpoint import broker_endpoint
from shmbroker.control.keys import Keys
from shmbroker.errors import BadInput
from shmbroker.settings.load import current

CONTROL_VARIABLE = "SHMBROKER_CONTROL"
KEYS_VARIABLE = "SHMBROKER_KEYS"

UNIX = "ipc"
"""What SHMBROKER_CONTROL says where unix sockets are meant, as they are by default."""

_ADDRESS = re.compile(r"tcp://(\[[^\[\]]+\]|[^:/\[\]]+):(\d{1,5}|\*)")
_MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class Access:
    """The broker's endpoint, and the keys that open it where it is TCP."""

    endpoint: str
    keys: Keys | None = None

    @classmethod
    def of(cls, instance: str, control: str | None = None, keys: str | None = None) -> Access:
        """By ``control`` (``ipc`` or ``tcp://127.0.0.1:PORT``) and the folder ``keys``, else by the settings (docs/configuration.md).

        Raises :class:`BadInput` for TCP without keys, for an address that is not loopback, and for keys that cannot be used.
        """
        settings = current()
        control = control or settings.control
        if control == UNIX:
            if keys:
                raise BadInput("keys are for control over TCP: give --control tcp://127.0.0.1:PORT too")
            return cls(broker_endpoint(instance))
        endpoint = loopback_endpoint(control)
        folder = keys or settings.keys
        if not folder:
            raise BadInput(
                f"control over TCP ({control}) needs keys: make them with 'shmbroker keys --make DIR', then give --keys DIR to "
                f"'shmbroker serve' and set {KEYS_VARIABLE}=DIR for all who take part"
            )
        return cls(endpoint, Keys.load(Path(folder)))

    @property
    def tcp(self) -> bool:
        """Whether it is TCP, with keys; else a unix socket."""
        return self.keys is not None

    def context(self) -> CurveContext:
        """A context for all sockets of this process: each speaks CURVE where they are TCP."""
        return CurveContext(self.keys)


def loopback_endpoint(address: str) -> str:
    """``tcp://HOST:PORT`` with a numeric host. Raises :class:`BadInput` unless that is on the loopback interface and the port is a number."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise BadInput(f"control address {address!r} cannot be read: write tcp://127.0.0.1:PORT, or {UNIX} for unix sockets")
    host, port = match[1].strip("[]"), match[2]
    if host == "*":
        raise BadInput(f"control address {address!r} would listen to the network: write tcp://127.0.0.1:PORT")
    if port == "*" or not 0 < int(port) <= _MAX_PORT:
        raise BadInput(f"control address {address!r} has no port that others could be told beforehand: name one from 1 to {_MAX_PORT}")
    try:
        found = [(family, str(where[0])) for family, _, _, _, where in socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError):
        raise BadInput(f"control address {address!r}: host {host!r} cannot be resolved: write tcp://127.0.0.1:PORT") from None
    for _, numeric in found:
        if not is_loopback(numeric):
            raise BadInput(
                f"control address {address!r} means {numeric}, which is not a loopback address (127.0.0.0/8 or ::1): shmbroker never listens "
                "to the network; write tcp://127.0.0.1:PORT"
            )
    family, numeric = min(found, key=lambda one: one[0] != socket.AF_INET)  # both ends choose alike where a name has several
    return f"tcp://{numeric}:{int(port)}" if family == socket.AF_INET else f"tcp://[{numeric}]:{int(port)}"
