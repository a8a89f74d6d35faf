"""The texts of systemd units for broker and workers, with the paths of this installation."""

from __future__ import annotations

import os
import re
import stat
import sys
import sysconfig
from importlib import resources
from pathlib import Path

from shmbroker.errors import BadInput

PACKAGED = resources.files(__package__)
"""The units as they lie in the package."""

UNITS = ("shmbroker.target", "shmbroker.service", "shmbroker-metrics.socket", "gpu-worker@.service", "tee-worker@.service")
USERS = "shmbroker-users.conf"
"""For systemd-sysusers."""

SYSTEM_FOLDER = Path("/etc/systemd/system")
USERS_FOLDER = Path("/etc/sysusers.d")
HOMES = ("/home", "/root", "/run/user")
"""What ``ProtectHome=`` hides."""

TEMPORARY = ("/tmp", "/var/tmp")
"""What ``PrivateTmp=`` hides."""

_NOT_FOR_A_USER = re.compile(
    r"^(#.*\n)*(User|Group|CapabilityBoundingSet|AmbientCapabilities|Protect\w+|Private\w+|Device\w+|IPAddress\w+|LimitMEMLOCK)=.*\n",
    re.MULTILINE,
)
"""What a user's own service manager may not do without privileges, with the comments before."""


def texts(*, user: bool = False) -> dict[str, str]:
    """The files by name, for this installation; ``user``: for a user's own service manager. Raises :class:`BadInput`."""
    names = UNITS if user else (*UNITS, USERS)
    return {name: _adapted((PACKAGED / name).read_text(), user) for name in names}


def install(made: dict[str, str], folder: Path, users_folder: Path) -> list[Path]:
    """Write the files. Returns their paths. Raises :class:`BadInput` when they cannot be written."""
    written = []
    for name, text in made.items():
        path = (users_folder if name == USERS else folder) / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError as error:
            raise BadInput(f"{path} cannot be written: {error.strerror}: run as root, or give --user or --dest") from None
        written.append(path)
    return written


def user_folder() -> Path:
    """Where a user's service manager looks for units."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd" / "user"


def program_folders() -> list[Path]:
    """What a service reads of this installation: interpreter, packages, console scripts."""
    all_of_them = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parents[1], Path(__file__).resolve().parents[2]}
    return sorted(folder for folder in all_of_them if not any(above in all_of_them for above in folder.parents))


def closed_folders(folders: list[Path]) -> list[Path]:
    """Those that not every user may enter, of the folders and those above them; but a folder that a unit binds is found without those above."""
    every = {above for folder in folders for above in (folder, *([] if _hidden(folder) else folder.parents))}
    return sorted(folder for folder in every if not folder.stat().st_mode & stat.S_IXOTH)


def _adapted(text: str, user: bool) -> str:
    text = re.sub(r"^ExecStart=/usr/bin/(\S+)", lambda found: f"ExecStart={_console_script(found[1])}", text, flags=re.MULTILINE)
    if user:
        text = re.sub(_NOT_FOR_A_USER, "", text)
        return (
            text.replace("WantedBy=multi-user.target", "WantedBy=default.target")
            .replace(" --group shmbroker", "")
            .replace("=3770", "=0700")
        )
    hidden = [folder for folder in program_folders() if _hidden(folder)]
    if hidden:
        bound = f"# The programs lie where this sandbox has empty folders.\nBindReadOnlyPaths={' '.join(map(_nameable, hidden))}"
        text = text.replace("ProtectHome=yes", f"ProtectHome=tmpfs\n{bound}")
    return text


def _hidden(folder: Path) -> bool:
    return any(folder.is_relative_to(top) for top in (*HOMES, *TEMPORARY))


def _console_script(name: str) -> str:
    path = Path(sysconfig.get_path("scripts")) / name
    if not os.access(path, os.X_OK):
        raise BadInput(f"there is no program {path}: install the package with pip into the Python that runs this, {sys.executable}")
    return _nameable(path)


def _nameable(path: Path) -> str:
    if re.search(r"[^\w./+@~-]", str(path)):
        raise BadInput(f"{path} has characters that a unit cannot name: install the package into another folder")
    return str(path)
