"""Asking a GPU worker for its known answers: a TEE worker that has no weights sees so whether the worker holds the right ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from shmbroker.arena import NAME_OF
from shmbroker.client import Bindable
from shmbroker.errors import BadInput
from shmbroker.models import ops
from shmbroker.models.answers import Answers, answer_of, fixed_input, fixed_mask, fixed_positions, fixed_rows
from tee_worker.planning.splits import Split, Splits
from tee_worker.planning.structure import Structure

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference allowed, as a share of an output's largest value: weights and sums are rounded otherwise, on a GPU in other places too."""


def check_answers(channel: Bindable, structure: Structure, splits: Splits, answers: Answers, width: int) -> int:
    """Compare what the worker of ``channel`` gives for fixed inputs with what is known; returns of how many modules. ``width``: of hidden states.

    Raises :class:`BadInput` with the first module that differs, or of which no answer is known, :class:`RemoteOpError` for a worker without it.
    """
    tolerance = TOLERANCE.get(structure.dtype, TOLERANCE[torch.bfloat16])
    count = 0
    for name, ask in _asked(channel, structure, splits, width):
        expected = answers.answers.get(name)
        if expected is None:
            raise BadInput(
                f"no answer of {name} is known: the answers are of another model ({answers.model}): run 'tee-worker check' again"
            )
        difference = expected.difference(answer_of(ask()))
        if not difference <= tolerance:
            raise BadInput(
                f"known answers: {name} of the GPU worker gives other numbers than the checkpoint's (they differ by {difference:.2g} of the "
                "largest): start it with the same weights, or, if these were changed, run 'tee-worker check' again"
            )
        count += 1
    return count


def _asked(channel: Bindable, structure: Structure, splits: Splits, width: int) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Every module that is computed elsewhere, once, with a call of it."""
    dtype, memory = structure.dtype, channel.memory

    def linear(op: str, name: str, in_features: int, out_features: int) -> Callable[[], torch.Tensor]:
        bound = channel.bind(op, out_spec=ops.linear, module=name, in_features=in_features, out_features=out_features)
        return lambda: bound(fixed_input(1, in_features).to(dtype))

    def layer(op: str, index: int) -> Callable[[], torch.Tensor]:
        hidden = fixed_input(1, fixed_positions().shape[1], width).to(dtype)
        if op == ops.MLP_BLOCK:
            feeding = channel.bind(op, out_spec=ops.mlp_block, layer=index)
            return lambda: feeding(hidden)
        bound = channel.bind(op, out_spec=ops.full_layer, layer=index)
        session = torch.zeros(ops.SESSION_WORDS, dtype=torch.int64)
        return lambda: bound(hidden, fixed_positions(), session, memory.copy_in(fixed_mask(dtype)))

    embed = channel.bind(ops.EMBED, out_spec=ops.embed, module=structure.embedding, width=structure.width, dtype=NAME_OF[dtype])
    yield structure.embedding, lambda: embed(fixed_rows(structure.rows))
    for index, split in enumerate(splits.of_layers(len(structure.layers))):
        name, halves = structure.layers[index], structure.halves[index]
        if split is Split.LAYER:
            yield name, layer(ops.FULL_LAYER, index)
        elif split is Split.BLOCK and halves is not None:
            yield f"{name}.{halves.attention}", layer(ops.ATTENTION_BLOCK, index)
            yield f"{name}.{halves.feed_forward}", layer(ops.MLP_BLOCK, index)
    seen: set[str] = set()
    for projection in structure.projections:
        if structure.moves_whole(projection.names[0], splits):
            continue
        for name, out_features in zip(projection.names, projection.out_features, strict=True):
            if name not in seen:
                seen.add(name)
                yield name, linear(ops.LINEAR, name, projection.in_features, out_features)
    head = structure.head
    yield head.names[0], linear(ops.LM_HEAD, head.names[0], head.in_features, head.out_features[0])
