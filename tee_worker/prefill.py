"""The prototype's measurement: one prefill with a split model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from shmbroker.errors import BadInput
from shmbroker.models import model_dtype, model_source
from tee_worker.analytic import compare
from tee_worker.own_peers import own_peers, some_broker_answers
from tee_worker.prefill_outcome import Outcome
from tee_worker.private_memory import private_bytes
from tee_worker.run_options import PrefillOptions
from tee_worker.split_run import channel_as_asked, check, split_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPARE_TENSORS = 2
"""Room in the arena beyond what a run needs, in largest tensors: no call that is measured is to wait for a block."""


def prefill(options: PrefillOptions, on_note: Callable[[str], None] = lambda note: None) -> Outcome:
    """Run one prefill. Where no broker is named and none runs, one is started for it, and a worker. Raises :class:`ShmBrokerError`."""
    check(options)
    source = model_source(options.model, options.shape, options.seed)
    if options.tokens < 1:
        raise BadInput(f"--tokens {options.tokens} must be 1 or more")
    peers = None
    if options.local or not some_broker_answers(options):
        weights = ("--model", options.model) if options.model else ("--shape", str(options.shape), "--seed", str(options.seed))
        peers = own_peers(options, on_note, *weights)
    with split_run(
        options,
        source,
        channel_as_asked,
        prompt_tokens=options.tokens,
        new_tokens=1,
        peers=peers,
        spare=SPARE_TENSORS,
        on_note=on_note,
    ) as running:
        generator = torch.Generator().manual_seed(options.seed)
        ids = torch.randint(0, running.model.config.vocab_size, (1, options.tokens), generator=generator)
        _run(running.model, ids[:, :1])  # whatever is done once is done now
        running.channel.forget_statistics()
        begun = time.perf_counter()
        logits = _run(running.model, ids)
        seconds = time.perf_counter() - begun
        report = running.channel.report()
        private = private_bytes()
        trust = running.trust_report()
    whole_seconds = difference = reach = None
    if options.compare:
        on_note("the same in this process alone ...")
        whole = source.model(model_dtype(options.dtype))
        begun = time.perf_counter()
        expected = _run(whole, ids)
        whole_seconds = time.perf_counter() - begun
        difference = float((expected.float() - logits.float()).abs().max())
        reach = float(expected.float().max() - expected.float().min())
    return Outcome(
        model=source.name,
        split=str(running.splits),
        dtype=options.dtype,
        tokens=options.tokens,
        seconds=seconds,
        report=report,
        analytic=compare(running.traffic(options.tokens, 1), report),
        private_bytes=private,
        trust=trust,
        whole_seconds=whole_seconds,
        largest_difference=difference,
        logits_range=reach,
    )


def _run(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, use_cache=True, logits_to_keep=1).logits
    return logits.clone()
