"""A run of a split model, from its options to a model that can be called."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from shmbroker.client import Channel, Client, FailoverChannel, connect
from shmbroker.errors import BadInput
from shmbroker.models import Checkpoint, ModelSource, model_dtype
from shmbroker.models.answers import Answers, answers_file, read_answers
from tee_worker.held_signals import HeldSignals
from tee_worker.offloading.known_answers import check_answers
from tee_worker.offloading.offload import offload
from tee_worker.planning.arena_size import arena_bytes
from tee_worker.planning.own_part import own_part
from tee_worker.planning.splits import Splits
from tee_worker.planning.structure import Structure, structure_of
from tee_worker.planning.traffic import Traffic, generation_traffic
from tee_worker.run_options import RunOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AnyChannel = TypeVar("AnyChannel", bound=Channel | FailoverChannel)
Opened = Callable[[Client, RunOptions, float | None], AnyChannel]
"""Opens the channel of a run: its client, its options, and the seconds to wait for a worker that offers the service."""


@dataclass(frozen=True, slots=True)
class SplitRun(Generic[AnyChannel]):
    """A model whose heavy modules are computed by a GPU worker, and what it goes through."""

    model: PreTrainedModel
    structure: Structure
    splits: Splits
    channel: AnyChannel
    pipeline: int

    def traffic(self, prompt_tokens: int, new_tokens: int) -> Traffic:
        """What a generation of so many tokens sends and receives."""
        return generation_traffic(self.structure, self.splits, prompt_tokens=prompt_tokens, new_tokens=new_tokens, pipeline=self.pipeline)


def check(options: RunOptions) -> None:
    """Refuse what can be told to be wrong before anything is looked for or loaded. Raises :class:`BadInput`."""
    Splits.named(options.split)
    model_dtype(options.dtype)
    if not options.failover >= 0:
        raise BadInput(f"--failover {options.failover:g} must be 0 or more seconds")
    if options.local and options.instance is not None:
        raise BadInput(f"--local starts a broker of its own, and --instance {options.instance} names another: leave one of them out")


def compute_with(threads: int | None) -> None:
    """Compute with so many threads; None: torch's own choice."""
    if threads:
        torch.set_num_threads(threads)


def channel_as_asked(client: Client, options: RunOptions, wait: float | None) -> Channel | FailoverChannel:
    """One that ends with its worker where no failover is asked for."""
    if options.failover > 0:
        return failover_channel(client, options, wait)
    return client.channel(options.service, lane=options.lane, doorbell=options.doorbell, wait=wait)


def failover_channel(client: Client, options: RunOptions, wait: float | None) -> FailoverChannel:
    """One that outlives its worker: with a failover of 0 seconds, if another one is there already."""
    return client.failover_channel(options.service, lane=options.lane, doorbell=options.doorbell, wait=wait, patience=options.failover)


def _answers(options: RunOptions, source: ModelSource) -> Answers | None:
    """What the worker's weights are compared with; None where nothing is known or asked for. Raises :class:`BadInput`."""
    if not options.check or not isinstance(source, Checkpoint):
        return None
    file = Path(options.answers) if options.answers else answers_file(source)
    return read_answers(file) if options.answers or file.is_file() else None


@contextlib.contextmanager
def split_run(
    options: RunOptions,
    source: ModelSource,
    open_channel: Opened[AnyChannel],
    *,
    prompt_tokens: int,
    new_tokens: int,
    name: str = "tee-worker",
    peers: contextlib.AbstractContextManager[object] | None = None,
    wait: float | None = None,
    spare: int = 0,
    on_note: Callable[[str], None] = lambda note: None,
) -> Iterator[SplitRun[AnyChannel]]:
    """Load this side's part of ``source``, join the broker and move the rest to a GPU worker, for the length of a block.

    ``prompt_tokens``, ``new_tokens``: the longest generation that the arena must have room for; ``spare``: as of :func:`arena_bytes`. ``name``: for
    status. ``peers``: entered before the broker is joined. ``wait``: seconds for a worker to come; None: as the settings. ``on_note``: told what goes
    on. Raises :class:`ShmBrokerError`.
    """
    splits = Splits.named(options.split)
    answers = _answers(options, source)
    compute_with(options.threads)
    model = own_part(source, model_dtype(options.dtype), splits)
    structure = structure_of(model, splits)
    planned = generation_traffic(structure, splits, prompt_tokens=prompt_tokens, new_tokens=new_tokens, pipeline=options.pipeline)
    arena = arena_bytes(options.arena, planned, options.pipeline, spare=spare)
    spin_seconds = options.spin * 1e-6
    with (
        HeldSignals() as signals,
        peers or contextlib.nullcontext(),
        connect(options.instance, arena=arena, name=name, timeout=options.timeout, spin=spin_seconds, trace=options.trace) as client,
    ):
        try:
            channel = open_channel(client, options, wait)
            offload(model, channel, splits, pipeline=options.pipeline, structure=structure)
            if answers is not None:
                begun = time.perf_counter()
                count = check_answers(channel, structure, splits, answers, model.config.get_text_config().hidden_size)
                channel.forget_statistics()
                on_note(f"{count} modules of the GPU worker give the checkpoint's known answers ({time.perf_counter() - begun:.2f} s)")
            elif options.check and isinstance(source, Checkpoint):
                on_note(
                    f"the GPU worker's weights are taken as they are: 'tee-worker check --model {source.name}' once, and they are compared"
                )
            yield SplitRun(model, structure, splits, channel, options.pipeline)
        finally:
            signals.hold()  # until client and peers are closed
