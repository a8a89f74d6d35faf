"""Names in shared memory: whether those of the living are there, and whether systemd will take them away when somebody logs out."""

from __future__ import annotations

import configparser
import os
import pwd
import re
from collections.abc import Iterator
from pathlib import Path

from shmbroker.commands.doctor.check import Check, content, ok, warn
from shmbroker.control import messages as m
from shmbroker.memory import names
from shmbroker.memory.stores import store

LOGIND_FILES = ("/usr/lib/systemd/logind.conf", "/run/systemd/logind.conf", "/etc/systemd/logind.conf")
"""Main files of logind.conf(5); drop-ins lie beside them, in a folder of the same name with ``.d``."""

LINGER = "/var/lib/systemd/linger"
SYSTEMD_RUNS = "/run/systemd/system"
_LOGIN_DEFS = "/etc/login.defs"
_LAST_SYSTEM_USER = 999
"""Where /etc/login.defs says nothing."""

_REMEDY = "loginctl enable-linger {user}; or run the broker as a system user, as the units do; or RemoveIPC=no in /etc/systemd/logind.conf"


def checks(instance: str, report: m.StatusReport | None) -> Iterator[Check]:
    """All of this family. ``report``: of the broker, if one answers."""
    yield _logout(_owner(report))
    if report is not None:
        yield _missing(instance, report)


def _owner(report: m.StatusReport | None) -> int:
    """The user whose the objects are: the broker makes them; without one, whoever asks would."""
    try:
        return os.stat(f"/proc/{report.pid}").st_uid if report is not None else os.geteuid()
    except OSError:
        return os.geteuid()


def _logout(uid: int) -> Check:
    """What happens to the objects of user ``uid`` when its last session ends (logind.conf(5), ``RemoveIPC=``)."""
    if not os.path.isdir(SYSTEMD_RUNS):
        return ok("logout", "no systemd runs here that would take names out of shared memory")
    if uid <= last_system_user():
        return ok("logout", f"user {uid} is a system user: systemd-logind leaves its shared memory alone")
    user = _name_of(uid)
    if not removes_ipc():
        return ok("logout", "systemd-logind leaves shared memory alone (RemoveIPC=no)")
    if os.path.exists(f"{LINGER}/{user}"):
        return ok("logout", f"user {user} lingers: its shared memory outlives its sessions")
    return warn(
        "logout",
        f"when the last session of user {user} ends, systemd-logind removes what it has in {names.SHM_DIR} under living processes (RemoveIPC=yes)",
        _REMEDY.format(user=user),
        user=user,
    )


def _missing(instance: str, report: m.StatusReport) -> Check:
    """Of processes that the broker knows, the names that are not there."""
    missing = []
    for peer in report.peers:
        paths = [names.bell_path(names.bell_name(instance, peer.peer))]
        if peer.segment:
            paths.append(store().path(peer.segment))
        missing += [(peer, path) for path in paths if not os.path.exists(path)]
    if not missing:
        return ok("names", f"those of all {len(report.peers)} processes are in shared memory", missing=[])
    told = ", ".join(sorted({f"{peer.role} {peer.name} (pid {peer.pid})" for peer, _ in missing}))
    remedy = _REMEDY.format(user=_name_of(_owner(report)))
    return warn(
        "names",
        f"{len(missing)} names were taken away under living processes: {told}; open channels work on, and names are made anew when a channel is opened",
        f"it is most likely systemd-logind, at a logout: {remedy}",
        missing=[path for _, path in missing],
    )


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def last_system_user() -> int:
    """The highest number of a system user (``SYS_UID_MAX``)."""
    found = re.search(r"^\s*SYS_UID_MAX\s+(\d+)", content(_LOGIN_DEFS), re.MULTILINE)
    return int(found[1]) if found else _LAST_SYSTEM_USER


def removes_ipc() -> bool:
    """What ``RemoveIPC=`` is set to: yes, unless a file says something else; drop-ins by name, and those in /etc win."""
    drop_ins = {path.name: path for main in LOGIND_FILES for path in sorted(Path(f"{main}.d").glob("*.conf"))}
    present = [main for main in LOGIND_FILES if os.path.exists(main)]
    value = "yes"
    for path in [*present[-1:], *(str(drop_ins[name]) for name in sorted(drop_ins))]:
        parser = configparser.ConfigParser(strict=False, interpolation=None, allow_no_value=True)
        try:
            parser.read_string(content(path))
        except configparser.Error:
            continue
        value = parser.get("Login", "RemoveIPC", fallback="") or value
    return value.strip().lower() in ("yes", "true", "1", "on", "y", "t")
