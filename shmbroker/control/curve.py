"""A ZeroMQ context whose sockets stay on this machine: unix sockets, or with keys loopback TCP under CURVE, and nothing else.

Who makes a socket of it need not think of keys. A socket that binds becomes a CURVE server which lets in holders of the member's key only; one
that connects becomes a client which talks to a holder of the server's key only. CURVE: https://rfc.zeromq.org/spec/26; who is let in is asked by
ZAP: https://rfc.zeromq.org/spec/27.
"""

from __future__ import annotations

import ipaddress
import re
import threading
from typing import Any

import zmq
from zmq.utils import z85

from shmbroker.control.keys import Keys
from shmbroker.errors import BadInput

ANY_PORT = "tcp://127.0.0.1:*"
"""Where a worker binds: the kernel chooses the port, and the worker tells it."""

_TCP = re.compile(r"tcp://(?:\[(?P<six>[^\]]+)\]|(?P<four>[^:\[\]]+)):(?P<port>\d+|\*)")
_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_ZAP_DOMAIN = b"shmbroker"


def is_loopback(host: str) -> bool:
    """Whether ``host`` is a numeric address of this machine's loopback interface."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class CurveSocket(zmq.Socket[bytes]):
    """Becomes a CURVE server or client when it is bound or connected to TCP."""

    context: CurveContext

    def bind(self, addr: str) -> Any:
        """Listen. Raises :class:`BadInput` for what others than this machine's members could reach. A socket that cannot is closed."""
        keys = self._keys_for(addr)
        if keys is not None:
            self.context.guard(keys)
            self.setsockopt(zmq.CURVE_SERVER, 1)
            self.setsockopt(zmq.CURVE_SECRETKEY, keys.server.secret)
            self.setsockopt(zmq.ZAP_DOMAIN, _ZAP_DOMAIN)
            self.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without whom to ask, nobody is let in
        try:
            return super().bind(addr)
        except zmq.ZMQError:
            self.close()
            raise

    def connect(self, addr: str) -> Any:
        """Connect. Raises :class:`BadInput` for what lies outside this machine. A socket that cannot is closed."""
        keys = self._keys_for(addr)
        if keys is not None:
            self.setsockopt(zmq.CURVE_SERVERKEY, keys.server.public)
            self.setsockopt(zmq.CURVE_PUBLICKEY, keys.member.public)
            self.setsockopt(zmq.CURVE_SECRETKEY, keys.member.secret)
        return super().connect(addr)

    def _keys_for(self, addr: str) -> Keys | None:
        keys = self.context.keys
        if keys is None and addr.startswith("ipc://"):
            return None
        match = _TCP.fullmatch(addr)
        if keys is None or match is None or not is_loopback(match["six"] or match["four"]):
            self.close()
            raise BadInput(f"{addr!r} is no {'unix socket' if keys is None else 'loopback TCP address'}, as this instance's sockets are")
        self.setsockopt(zmq.IPV6, match["six"] is not None)
        return keys


class CurveContext(zmq.Context[zmq.Socket[bytes]]):
    """``keys``: for TCP; None for unix sockets."""

    keys: Keys | None
    _socket_class = CurveSocket
    _guard: threading.Thread | None

    def __init__(self, keys: Keys | None = None) -> None:
        super().__init__()
        self.keys = keys
        self._guard = None

    def guard(self, keys: Keys) -> None:
        """Have a thread answer who may enter, from now until the context ends. A second time does nothing."""
        if self._guard is not None:
            return
        asked = zmq.Context(shadow=self).socket(zmq.REP)  # not among those that destroy() closes: it is another thread's
        asked.setsockopt(zmq.LINGER, 0)
        asked.bind(_ZAP_ENDPOINT)
        self._guard = threading.Thread(target=_let_in, args=(asked, z85.decode(keys.member.public)), name="shmbroker-zap", daemon=True)
        self._guard.start()


def _let_in(asked: zmq.Socket[bytes], member: bytes) -> None:
    """Answer ZAP requests: 200 for the holder of the member's key, 400 for everybody else. The end of the context ends it."""
    while True:
        try:
            _, request, _, _, _, mechanism, *credentials = asked.recv_multipart()
            known = mechanism == b"CURVE" and credentials == [member]
            verdict = (b"200", b"OK") if known else (b"400", b"no member")
            asked.send_multipart([b"1.0", request, *verdict, b"", b""])
        except zmq.ContextTerminated:
            asked.close()
            return
