"""What a command's options say of trust, and the whole model that the modes above ``plain`` check by."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from shmbroker.errors import BadInput
from shmbroker.models import Checkpoint, ModelSource, model_digest
from tee_worker.planning.splits import Splits
from tee_worker.run_options import RunOptions
from tee_worker.trust.modes import Arithmetic, Trust, TrustOptions, arithmetic_named, mode_named
from tee_worker.trust.moves import check_split

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def trust_of(options: RunOptions) -> TrustOptions:
    """The mode that is asked for. Raises :class:`BadInput`."""
    return TrustOptions(
        mode=mode_named(options.trust),
        arithmetic=arithmetic_named(options.arithmetic),
        bits=options.bits,
        pads=options.pads,
        hide_lengths=options.hide_lengths,
        same_host_shares=options.same_host_shares,
    )


def second_service(options: RunOptions) -> str | None:
    """The service of the second worker; None where there is one worker."""
    return options.second or options.pads_from


def check_trust(options: RunOptions, splits: Splits) -> None:
    """Refuse what does not fit together before anything is looked for or loaded. Raises :class:`BadInput`."""
    trust = trust_of(options)
    second = second_service(options)
    trust.check_floor(dealt=second is not None)
    check_split(splits, trust)
    mode = trust.mode
    if mode is Trust.PLAIN and options.model_digest:
        raise BadInput(
            "--model-digest is compared above --trust plain alone: at plain the model is not loaded here as a whole; leave it out, or give --trust verify"
        )
    if mode is not Trust.PLAIN and options.answers:
        raise BadInput(f"--answers is of --trust plain: at {mode.value} every result is checked")
    if options.same_host_shares and second is None:
        raise BadInput("--same-host-shares is of two workers: give --second or --pads-from, or leave it out")
    if options.second is not None and mode is not Trust.SHARES:
        raise BadInput(f"--second is of --trust shares; --trust is {mode.value}")
    if options.pads_from is not None and mode is not Trust.BLIND:
        raise BadInput(f"--pads-from is of --trust blind; --trust is {mode.value}")
    if mode is Trust.SHARES and second is None:
        raise BadInput("--trust shares needs a second worker: --second SERVICE")
    if second is not None and second == options.service:
        raise BadInput(
            f"both workers offer service {second!r}: one could take over from the other; start the second with another --service"
        )
    if second is not None and not options.same_host_shares:
        raise BadInput(
            "both workers are on this host: together they see everything, and so does whoever controls the host; to try it out all the same, give "
            "--same-host-shares"
        )
    if trust.arithmetic is Arithmetic.FLOAT and options.dtype != "float32":
        raise BadInput(
            f"--arithmetic float needs results in float32, not {options.dtype}: give both sides --dtype float32, or use --arithmetic exact"
        )
    if mode is not Trust.PLAIN and getattr(options, "model", None) and not options.model_digest:
        raise BadInput(
            f"--trust {mode.value} needs --model-digest: without it whoever can write to the model's files chooses what is checked; 'tee-worker digest "
            f"--model {getattr(options, 'model', '')}', run where the files are trusted, prints it"
        )


def _own_memory(model: PreTrainedModel) -> PreTrainedModel:
    """The model with all its numbers in memory of this process: as loaded, they lie in files that others can write to."""
    for tensor in [*model.parameters(), *model.buffers()]:  # of tied ones, one
        tensor.data = tensor.detach().clone()
    return model


def whole_model(source: ModelSource, dtype: torch.dtype, digest: str | None) -> PreTrainedModel:
    """All of ``source``, as the digest says, if there is one. Raises :class:`BadInput` for another model."""
    model = _own_memory(source.model(dtype))
    if digest is not None:
        found = model_digest(model)
        if found != digest:
            raise BadInput(
                f"model {source.name!r} is another than --model-digest says: it is {found}, not {digest}; the files were changed, or the digest was made "
                "with another --dtype or release of transformers"
            )
    elif isinstance(source, Checkpoint):
        raise BadInput(f"model {source.name!r} is not pinned: give --model-digest")
    return model
