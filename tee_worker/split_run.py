"""A run of a split model, from its options to a model that can be called."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec
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
from tee_worker.trust.modes import PLAIN, Trust, TrustOptions
from tee_worker.trust.moves import Sealed
from tee_worker.trust.run import check_trust, second_service, trust_of, whole_model
from tee_worker.trust.session import TrustReport, plain_report

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
    trust: TrustOptions = PLAIN
    sealed: Sealed | None = None

    def trust_report(self) -> TrustReport:
        """What the mode means, and what came of it so far."""
        return plain_report() if self.sealed is None else self.sealed.session.report()

    def traffic(self, prompt_tokens: int, new_tokens: int) -> Traffic:
        """What a generation of so many tokens sends and receives."""
        return generation_traffic(
            self.structure, self.splits, prompt_tokens=prompt_tokens, new_tokens=new_tokens, pipeline=self.pipeline, trust=self.trust
        )


def check(options: RunOptions) -> None:
    """Refuse what can be told to be wrong before anything is looked for or loaded. Raises :class:`BadInput`."""
    splits = Splits.named(options.split)
    model_dtype(options.dtype)
    check_trust(options, splits)
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
    splits, trust = Splits.named(options.split), trust_of(options)
    answers = _answers(options, source) if trust.mode is Trust.PLAIN else None
    compute_with(options.threads)
    if trust.mode is Trust.PLAIN:
        model = own_part(source, model_dtype(options.dtype), splits)
    else:
        model = whole_model(source, model_dtype(options.dtype), options.model_digest)
    structure = structure_of(model, splits)
    planned = generation_traffic(
        structure, splits, prompt_tokens=prompt_tokens, new_tokens=new_tokens, pipeline=options.pipeline, trust=trust
    )
    arena = arena_bytes(options.arena, planned, options.pipeline, spare=spare)
    spin_seconds = options.spin * 1e-6
    with (
        HeldSignals() as signals,
        peers or contextlib.nullcontext(),
        connect(options.instance, arena=arena, name=name, timeout=options.timeout, spin=spin_seconds, trace=options.trace) as client,
        contextlib.ExitStack() as stack,
    ):
        try:
            channel = open_channel(client, options, wait)
            second = None
            if (service := second_service(options)) is not None:
                # Of its own, so that neither worker maps what the other is given.
                other = stack.enter_context(
                    connect(options.instance, arena=arena, name=f"{name} second", timeout=options.timeout, spin=spin_seconds)
                )
                second = open_channel(other, msgspec.structs.replace(options, service=service), wait)
            moved = offload(model, channel, splits, pipeline=options.pipeline, structure=structure, check=False, trust=trust, second=second)
            if moved.sealed is not None:
                stack.callback(moved.sealed.close)
            if answers is not None:
                begun = time.perf_counter()
                count = check_answers(channel, structure, splits, answers, model.config.get_text_config().hidden_size)
                channel.forget_statistics()
                on_note(f"{count} modules of the GPU worker give the checkpoint's known answers ({time.perf_counter() - begun:.2f} s)")
            elif trust.mode is not Trust.PLAIN:
                on_note(f"trust {trust}: {trust.told()}")
            elif options.check and isinstance(source, Checkpoint):
                on_note(
                    f"the GPU worker's weights are taken as they are: 'tee-worker check --model {source.name}' once, and they are compared"
                )
            yield SplitRun(model, structure, splits, channel, options.pipeline, trust, moved.sealed)
        finally:
            signals.hold()  # until client and peers are closed
