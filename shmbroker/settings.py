"""Every setting: its default, and what files and variables make of it.

A leaf like :mod:`shmbroker.errors`: any part may import it. Later sources win: defaults, /etc/shmbroker/shmbroker.toml, the user's own file (or the
one that $SHMBROKER_CONFIG names, instead of both), ``SHMBROKER_*`` variables. A command's flag, or an argument in Python, wins over all of them.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from shmbroker.errors import BadInput
from shmbroker.sizes import parse_bytes

PREFIX = "SHMBROKER_"
FILE_VARIABLE = "SHMBROKER_CONFIG"
SYSTEM_FILE = Path("/etc/shmbroker/shmbroker.toml")
DEFAULT = "default"
"""The origin of what nobody set."""

Seconds = Annotated[float, msgspec.Meta(ge=0)]
Microseconds = Annotated[float, msgspec.Meta(ge=0)]
Size = int | str


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All settings, with their defaults. An empty text, or a 0 where the comment says so, means that nothing is set."""

    # where the broker is
    instance: str = "default"
    control: str = "ipc"
    """``ipc`` for unix sockets, or ``tcp://127.0.0.1:PORT``."""
    keys: str = ""
    """Folder of the keys for control over TCP."""
    runtime_dir: str = ""
    """Folder of the sockets; found by itself where empty."""

    segments: str = ""
    """``path:`` and a folder or file that holds the segments; empty: POSIX shared memory."""

    # the broker
    group: str = ""
    """Name or number of a group that shares memory and sockets; empty: this user alone."""
    max_bytes: Size = ""
    """Shared memory that one process may have made; empty: no quota."""
    max_clients: Annotated[int, msgspec.Meta(ge=1)] = 256
    """A client costs its broker three open files, of the 1024 that a process may have by default."""

    # clients
    arena: Size = "256M"
    channels: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 16
    """Channels of one client: one for each worker it talks to, with room."""
    depth: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 64
    """Calls in flight on one channel; a power of two."""
    timeout: Seconds = 30.0
    """Of a call that does not give one: far above any op, far below anybody's patience."""
    place_timeout: Seconds = 5.0
    """How long to wait for room in a full arena."""
    wait: Seconds = 5.0
    """How long to wait for a worker that is still starting."""
    failover: Seconds = 30.0
    """How long to wait for a worker that takes over: loading weights takes seconds."""
    lane: Literal["auto", "shm", "zmq"] = "auto"
    doorbell: Literal["auto", "sem", "poll"] = "auto"

    # both sides
    service: str = "gpu"
    spin: Microseconds = 50.0
    """How long to look before sleeping: about what sleeping and being woken costs (46 us on the reference machine)."""
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: Annotated[int, msgspec.Meta(ge=0)] = 0
    """CPU threads to compute with; 0: torch's own choice."""
    split: str = "fused"

    # every program
    metrics_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    """Loopback port for metrics; 0: none."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    cache: str = ""
    """Folder of the embedded model; the user's cache folder where empty."""
    pure_python: bool = False
    """Use no compiled parts."""


DEFAULTS = Settings()

OWN_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "tee-worker": {"log_level": "warning"},
    "tee-worker generate": {"arena": "what the run needs", "timeout": 60.0},
    "tee-worker prefill": {"arena": "what the run needs", "timeout": 120.0, "split": "op"},
    "tee-worker serve": {"arena": "what the longest context needs", "timeout": 60.0},
}
"""Commands whose own default is another, where the setting is not set: they print text, or their calls are longer."""

_FIELDS: Mapping[str, Any] = get_type_hints(Settings, include_extras=True)
_SIZES = ("arena", "max_bytes")
_ZERO_IS_NOTHING = ("threads", "metrics_port")


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings, and where each came from: ``default``, ``file ...`` or ``variable ...``."""

    settings: Settings
    origins: Mapping[str, str]
    files: tuple[Path, ...]
    """Those that were read."""

    def chosen(self) -> dict[str, Any]:
        """The settings that somebody set, to something."""
        named = {name: getattr(self.settings, name) for name, origin in self.origins.items() if origin != DEFAULT}
        return {name: value for name, value in named.items() if value != "" and not (value == 0 and name in _ZERO_IS_NOTHING)}


def current() -> Settings:
    """The settings as files and variables are now. Raises :class:`BadInput` for an unknown name or a value of the wrong type."""
    return load().settings


def load() -> Loaded:
    """:func:`current`, with the origins."""
    values: dict[str, Any] = {}
    origins = dict.fromkeys(_FIELDS, DEFAULT)
    files = tuple(_files())
    for path in files:
        for name, value in _read(path).items():
            if name not in _FIELDS:
                raise BadInput(f"{path}: there is no setting {name!r}{_nearest(name, _FIELDS)}; docs/configuration.md lists all")
            values[name] = _converted(name, value, f"{path}: {name}", strict=True)
            origins[name] = f"file {path}"
    for variable, text in _variables():
        name = variable.removeprefix(PREFIX).lower()
        if name not in _FIELDS or variable != variable_of(name):
            raise BadInput(
                f"variable {variable} is not known{_nearest(variable, map(variable_of, _FIELDS))}: unset it (docs/configuration.md lists all)"
            )
        if text:  # an empty one is as if it were not set
            values[name] = _converted(name, text, f"variable {variable}", strict=False)
            origins[name] = f"variable {variable}"
    return Loaded(Settings(**values), origins, files)


def variable_of(name: str) -> str:
    """``SHMBROKER_ARENA`` for ``arena``."""
    return PREFIX + name.upper()


def user_file() -> Path:
    """``~/.config/shmbroker/shmbroker.toml``, or below $XDG_CONFIG_HOME."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(home) / "shmbroker" / "shmbroker.toml"


def _files() -> Iterator[Path]:
    told = os.environ.get(FILE_VARIABLE)
    if told:
        yield Path(told)
        return
    for path in (SYSTEM_FILE, user_file()):
        if os.path.isfile(path):
            yield path


def _variables() -> Iterator[tuple[str, str]]:
    for variable, text in sorted(os.environ.items()):
        if variable.startswith(PREFIX) and variable != FILE_VARIABLE:
            yield variable, text


def _read(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"the settings in {path} cannot be read: {error.strerror}; name another file by ${FILE_VARIABLE}") from None
    try:
        values = msgspec.toml.decode(content)
    except (msgspec.DecodeError, ValueError) as error:
        raise BadInput(f'{path} is not TOML: {error}; write lines like  arena = "512M"') from None
    assert isinstance(values, dict)
    return values


def _converted(name: str, value: object, where: str, *, strict: bool) -> Any:
    try:
        converted = msgspec.convert(value, _FIELDS[name], strict=strict)
        if name in _SIZES and converted != "":
            parse_bytes(converted)
    except (msgspec.ValidationError, BadInput):
        raise BadInput(f"{where} cannot be {value!r}: it is {_kind(name)}") from None
    return converted


def _kind(name: str) -> str:
    """What a setting takes, in words."""
    kind = _FIELDS[name]
    if name in _SIZES:
        return "a size, e.g. 4096 or '512M'"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if kind is bool:
        return "true or false (1 or 0)"
    if kind is str:
        return "a text"
    bounds = next((one for one in getattr(kind, "__metadata__", ()) if isinstance(one, msgspec.Meta)), msgspec.Meta())
    word = "a whole number" if get_args(kind)[0] is int else "a number"
    return f"{word} of at least {bounds.ge}" if bounds.le is None else f"{word} from {bounds.ge} to {bounds.le}"


def _nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""
