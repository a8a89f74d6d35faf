"""Where the value of each setting comes from: its default, a file, or a variable.

Later sources win: defaults, /etc/shmbroker/shmbroker.toml, the user's own file (or the one that $SHMBROKER_CONFIG names, instead of both),
``SHMBROKER_*`` variables. A command's flag, or an argument in Python, wins over all of them. Only the floor of trust is otherwise: the highest of all
counts, that of /etc/shmbroker/shmbroker.toml also where $SHMBROKER_CONFIG names another file.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from shmbroker.errors import BadInput
from shmbroker.settings.kinds import TRUST_WORDS
from shmbroker.settings.schema import Settings
from shmbroker.settings.sizes import parse_bytes

PREFIX = "SHMBROKER_"
FILE_VARIABLE = "SHMBROKER_CONFIG"
SYSTEM_FILE = Path("/etc/shmbroker/shmbroker.toml")
_OF_A_COMMAND = ("SHMBROKER_API_KEY",)
"""Variables that a command reads itself: a secret is no setting, which 'shmbroker config' would print."""

DEFAULT = "default"
"""The origin of what nobody set."""

_FIELDS: Mapping[str, Any] = get_type_hints(Settings, include_extras=True)
_SIZES = ("arena", "max_bytes")
_FLOOR = "trust_floor"
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

    def take(name: str, value: Any, origin: str) -> None:
        if name == _FLOOR and name in values and TRUST_WORDS.index(value) < TRUST_WORDS.index(values[name]):
            return  # a floor is raised by whoever likes, and lowered by nobody
        values[name] = value
        origins[name] = origin

    for path in (SYSTEM_FILE, user_file()):
        if path not in files and _there(path) and _FLOOR in (found := _read(path)):
            take(_FLOOR, _converted(_FLOOR, found[_FLOOR], f"{path}: {_FLOOR}", strict=True), f"file {path}")
    for path in files:
        for name, value in _read(path).items():
            if name not in _FIELDS:
                raise BadInput(f"{path}: there is no setting {name!r}{_nearest(name)}; docs/configuration.md lists all")
            take(name, _converted(name, value, f"{path}: {name}", strict=True), f"file {path}")
    for variable, text in _variables():
        name = variable.removeprefix(PREFIX).lower()
        if name not in _FIELDS or variable != variable_of(name):
            raise BadInput(f"variable {variable} is not known{_meant(variable, text)}: unset it (docs/configuration.md lists all)")
        if text:  # an empty one is as if it were not set
            take(name, _converted(name, text, f"variable {variable}", strict=False), f"variable {variable}")
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
        if _there(path):
            yield path


def _there(path: Path) -> bool:
    """Whether it is a file. Raises :class:`BadInput` where that cannot be told of the machine's: it may set a floor."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if path != SYSTEM_FILE:
            return False
        raise BadInput(
            f"{path} may set a floor of trust and cannot be looked at ({error.strerror}): make its folder readable to all"
        ) from None


def _variables() -> Iterator[tuple[str, str]]:
    for variable, text in sorted(os.environ.items()):
        if variable.startswith(PREFIX) and variable not in (FILE_VARIABLE, *_OF_A_COMMAND):
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


_SERVICE_LINK = re.compile(r"PORT(_\d+_(TCP|UDP)\w*)?|SERVICE_(HOST|PORT\w*)")
"""What Kubernetes sets in a pod beside a service named shmbroker, after the prefix."""


def _meant(variable: str, text: str) -> str:
    """Where a variable that is none of ours may come from; its prefix, which all have, makes it like none of them."""
    name = variable.removeprefix(PREFIX)
    if _SERVICE_LINK.fullmatch(name) and ("://" in text or name != "PORT"):
        return (
            " (Kubernetes sets it for a service named shmbroker: set enableServiceLinks: false in the pod, or name the service otherwise)"
        )
    near = _near(name.lower())
    return f" (did you mean {variable_of(near)}?)" if near else ""


def _nearest(name: str) -> str:
    near = _near(name)
    return f" (did you mean {near}?)" if near else ""


def _near(name: str) -> str:
    """The setting that is written almost so, else the only one that has the word; empty where there is none."""
    close = difflib.get_close_matches(name, list(_FIELDS), n=1) or [one for one in _FIELDS if name in one.split("_")]
    return close[0] if len(close) == 1 else ""
