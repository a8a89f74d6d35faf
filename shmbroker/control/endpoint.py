"""The sockets' addresses of an instance, in a folder that keeps others out."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from shmbroker.errors import BadInput, BrokerUnreachable
from shmbroker.memory.open_files import telling_exhaustion
from shmbroker.settings.load import current

SYSTEM_DIR = Path("/run/shmbroker")
"""Made by systemd (``RuntimeDirectory=``) or by a broker that runs as root."""

KNOCK_SECONDS = 0.1
"""For a connection on this machine, which is made or refused at once unless too many wait."""

MAX_PATH_BYTES = 100
"""Of a unix socket: the kernel takes 108 with the final zero, and ZeroMQ wants some."""


def runtime_dir() -> Path:
    """The folder of the sockets: ``$SHMBROKER_RUNTIME_DIR``, else ``/run/shmbroker`` where it can be used, else the user's own."""
    told = current().runtime_dir
    if told:
        return Path(told)
    if os.geteuid() == 0 or os.access(SYSTEM_DIR, os.R_OK | os.X_OK):
        return SYSTEM_DIR
    user = os.environ.get("XDG_RUNTIME_DIR")
    if user and os.access(user, os.W_OK):
        return Path(user) / "shmbroker"
    return Path(f"/tmp/shmbroker-{os.geteuid()}")


def make_private_dir(path: Path, gid: int = -1) -> None:
    """Make the folder, or check that the one there is ours; nobody else may enter it, or only members of group ``gid``.

    Members may make sockets in it, which belong to the group too (setgid), and not remove each other's (sticky).
    """
    mode = 0o3770 if gid >= 0 else 0o700
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise BadInput(
            f"the folder for sockets, {path}, cannot be made: {error.strerror}: set SHMBROKER_RUNTIME_DIR to a folder of your own"
        ) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise BadInput(f"{path} belongs to user {found.st_uid}, not to {os.geteuid()}: set SHMBROKER_RUNTIME_DIR to a folder of your own")
    if gid >= 0:
        try:
            os.chown(path, -1, gid)
        except PermissionError:
            raise BadInput(f"user {os.geteuid()} is not in group {gid} and cannot share with it: join the group first") from None
    if stat.S_IMODE(found.st_mode) != mode:  # a sandbox may forbid even to set the bits again that a service manager has set
        os.chmod(path, mode)


def socket_path(instance: str) -> Path:
    """Of the broker's control socket."""
    return runtime_dir() / f"{instance}.sock"


@contextlib.contextmanager
def private_sockets(folder: Path) -> Iterator[None]:
    """Sockets that are bound in this block are for this user alone, or for the group that may write in ``folder``."""
    umask = os.umask(0o117 if folder.stat().st_mode & stat.S_IWGRP else 0o177)
    try:
        yield
    finally:
        os.umask(umask)


def worker_socket(folder: Path, instance: str, kind: str, peer: str) -> Path:
    """Of a worker, for control requests or for the zmq lane."""
    return folder / f"{instance}.{kind}.{peer}.sock"


def worker_sockets(folder: Path, instance: str) -> Iterator[tuple[str, Path]]:
    """All workers' sockets of an instance, each with the id of its worker."""
    for path in folder.glob(f"{instance}.*.*.sock"):
        yield path.name.split(".")[2], path


def broker_endpoint(instance: str) -> str:
    """ZeroMQ endpoint of the broker of ``instance``."""
    return ipc_endpoint(socket_path(instance))


def ipc_endpoint(path: Path) -> str:
    """ZeroMQ endpoint of a unix socket."""
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise BadInput(f"{path} is too long for a unix socket ({MAX_PATH_BYTES} bytes at most): set SHMBROKER_RUNTIME_DIR to a shorter one")
    return f"ipc://{path}"


def transport_of(endpoint: str) -> str:
    """``ipc`` or ``tcp``."""
    return endpoint.partition("://")[0]


def may_listen(endpoint: str) -> bool:
    """False when surely nobody listens there: no such port or unix socket, or one that a process left behind when it died.

    Raises :class:`BrokerUnreachable` when this user may not even knock.
    """
    try:
        return _knock(endpoint) not in (errno.ENOENT, errno.ECONNREFUSED)
    except PermissionError:
        raise BrokerUnreachable(
            f"user {os.geteuid()} may not connect to {endpoint}: run as the user it belongs to, or start the broker with --group and a "
            "group that both are in"
        ) from None


def is_left_behind(endpoint: str) -> bool:
    """True when the kernel says that whoever listened there has ended. False also where the name was taken away, which proves nobody's end."""
    try:
        return _knock(endpoint) == errno.ECONNREFUSED
    except OSError:
        return False


def _knock(endpoint: str) -> int:
    """Connect and hang up: 0, or the error's number. Raises PermissionError, :class:`TooManyOpenFiles`."""
    transport, _, where = endpoint.partition("://")
    host, _, port = where.rpartition(":")
    family = socket.AF_UNIX if transport == "ipc" else socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    with telling_exhaustion(f"knocking at {endpoint}"):
        probe = socket.socket(family, socket.SOCK_STREAM)
    with probe:
        probe.settimeout(KNOCK_SECONDS)
        try:
            probe.connect(where if transport == "ipc" else (host.strip("[]"), int(port)))
        except PermissionError:
            raise
        except OSError as error:  # without a number: too many at once, so somebody is there
            return error.errno or errno.ETIMEDOUT
    return 0
