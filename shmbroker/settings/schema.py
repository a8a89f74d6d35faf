"""What settings there are: name, type and default of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from shmbroker.settings.kinds import DoorbellWord, LaneWord, TrustWord

Seconds = Annotated[float, msgspec.Meta(ge=0)]
"""A duration as most settings have it."""

Microseconds = Annotated[float, msgspec.Meta(ge=0)]
"""A duration as ``spin`` has it."""

Size = int | str
"""Bytes, or a text that :func:`parse_bytes` reads."""


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
    lane: LaneWord = "auto"
    """What carries the frames."""
    doorbell: DoorbellWord = "auto"
    """What wakes a waiting process, on lane shm."""

    # both sides
    service: str = "gpu"
    spin: Microseconds = 50.0
    """How long to look before sleeping: about what sleeping and being woken costs (46 us on the reference machine)."""
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: Annotated[int, msgspec.Meta(ge=0)] = 0
    """CPU threads to compute with; 0: torch's own choice."""
    split: str = "fused"

    # trust in the GPU worker
    trust_floor: TrustWord = "plain"
    """The least trust mode that may be started: of all files and variables the highest counts, and no flag lowers it."""

    # workers
    tracebacks: bool = True
    """Carry an op's traceback to the client that called it; the worker logs it in any case."""

    # every program
    metrics_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    """Loopback port for metrics; 0: none."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    cache: str = ""
    """Folder of the embedded model; the user's cache folder where empty."""
    pure_python: bool = False
    """Use no compiled parts."""


DEFAULTS = Settings()
"""What stands where nobody set anything."""

OWN_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "tee-worker": {"log_level": "warning"},
    "tee-worker generate": {"arena": "what the run needs", "timeout": 60.0},
    "tee-worker prefill": {"arena": "what the run needs", "timeout": 120.0, "failover": 0.0, "split": "op"},
    "tee-worker ray": {"arena": "what the longest context needs", "timeout": 60.0, "failover": 120.0},
    "tee-worker serve": {"arena": "what the longest context needs", "timeout": 60.0},
}
"""Commands whose own default is another, where the setting is not set: they print text, their calls are longer, or what they measure is one worker."""


def default_for(command: str, name: str) -> Any:
    """The default of setting ``name`` for ``command``: its own where it has one, else everybody's."""
    return OWN_DEFAULTS.get(command, {}).get(name, getattr(DEFAULTS, name))
