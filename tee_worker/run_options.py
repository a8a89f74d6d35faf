"""What the commands that run a split model can be asked for. Needs no torch, so that the command line can show the defaults before it is loaded."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from shmbroker.settings import DEFAULTS, default_for

LONGEST_CONTEXT = 4096
"""Tokens that ``serve`` makes room for unless more are asked for: at split ``op`` the arena grows with their square."""


API_KEY_VARIABLE = "SHMBROKER_API_KEY"

LOOPBACK = ("127.0.0.1", "localhost", "::1")

MOST_AT_ONCE = 8
"""Sequences that ``serve`` computes together unless another number is asked for, where the split allows it."""


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What every run can be asked for: what is one call, who computes it, and how calls travel. Defaults are the settings'."""

    command: ClassVar[str]
    """Whose own defaults count."""

    split: str = DEFAULTS.split
    pipeline: int = 1
    """Parts of a pass on their way at once."""
    dtype: str = DEFAULTS.dtype
    threads: int | None = DEFAULTS.threads or None
    """CPU threads to compute with; None: torch's own choice."""
    local: bool = False
    """Whether a broker and a GPU worker are started for this run alone."""
    instance: str | None = None
    """Which broker; None: as files and variables say."""
    service: str = DEFAULTS.service
    lane: str = DEFAULTS.lane
    doorbell: str = DEFAULTS.doorbell
    arena: str | None = None
    """A size, as people write it; None: what the run needs."""
    failover: float = DEFAULTS.failover
    """Seconds to wait for a worker that takes over from one that died; 0: fail."""
    timeout: float = DEFAULTS.timeout
    """Seconds that one call may take."""
    spin: float = DEFAULTS.spin
    """Microseconds to look for an answer before sleeping."""
    check: bool = True
    """Whether the GPU worker's weights are compared with known answers, where there are any."""
    answers: str | None = None
    """A file of known answers; None: beside the model, if it is there."""
    trace: str | None = None
    """A file for the trace of every call."""
    trust: str = "plain"
    """What the GPU worker is trusted with; the following are of the modes above ``plain``."""
    arithmetic: str = "exact"
    bits: int = 12
    pads: int = 64
    pads_from: str | None = None
    """The service of a second worker that makes pads ahead of time."""
    second: str | None = None
    """The service of a second worker that is given the other share."""
    same_host_shares: bool = False
    model_digest: str | None = None
    """Of the model, as ``tee-worker digest`` prints it."""
    hide_lengths: int = 1


class GenerateOptions(RunOptions, frozen=True, kw_only=True):
    """What a generation is asked for."""

    command: ClassVar[str] = "tee-worker generate"

    model: str
    prompt: str
    chat: bool = False
    """Whether the prompt is put into the model's chat template."""
    max_new_tokens: int = 64
    timeout: float = default_for(command, "timeout")


class PrefillOptions(RunOptions, frozen=True, kw_only=True):
    """What is measured: a model of ``model``, or of a known ``shape`` with random weights."""

    command: ClassVar[str] = "tee-worker prefill"

    model: str | None = None
    shape: str | None = None
    seed: int = 0
    """Of the random weights, and of the prompt."""
    tokens: int = 1024
    compare: bool = False
    """Whether the same is done in this process alone."""
    split: str = default_for(command, "split")
    failover: float = default_for(command, "failover")
    timeout: float = default_for(command, "timeout")


class ServeOptions(RunOptions, frozen=True, kw_only=True):
    """What is served, and how."""

    command: ClassVar[str] = "tee-worker serve"

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    """0: any free one."""
    served_model_name: str | None = None
    """What requests call the model; None: its folder's name."""
    max_context: int | None = None
    """Tokens of prompt and answer together; None: the model's, ``LONGEST_CONTEXT`` at most."""
    max_concurrency: int | None = None
    """Sequences that are computed at once; None: ``MOST_AT_ONCE``, or 1 where the split or the model does not allow it."""
    api_key: str | None = None
    """That requests must carry; None: none."""
    timeout: float = default_for(command, "timeout")


def default_of(options: type[msgspec.Struct], name: str) -> Any:
    """The default of one option."""
    return next(field.default for field in msgspec.structs.fields(options) if field.name == name)
