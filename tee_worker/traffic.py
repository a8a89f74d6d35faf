"""The analytic model: calls and bytes of a forward pass under a split, known before anything runs. What is counted must equal it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from shmbroker import model_ops
from shmbroker.memory.spec import TensorSpec
from tee_worker.splits import Split
from tee_worker.structure import Structure


@dataclass(frozen=True, slots=True)
class PlannedCall:
    """One call: its op, inputs and outputs."""

    op: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(slots=True)
class Traffic:
    """Sums over calls. Bytes of inputs (``sent``) and outputs (``received``) as handed over through shared memory."""

    calls: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    largest: PlannedCall | None = None
    largest_tensor: TensorSpec | None = None
    calls_by_op: dict[str, int] = field(default_factory=dict)

    def add(self, call: PlannedCall) -> None:
        """Count one more call."""
        self.calls += 1
        self.calls_by_op[call.op] = self.calls_by_op.get(call.op, 0) + 1
        self.sent_bytes += sum(spec.nbytes for spec in call.inputs)
        self.received_bytes += sum(spec.nbytes for spec in call.outputs)
        for spec in (*call.inputs, *call.outputs):
            if self.largest_tensor is None or spec.nbytes > self.largest_tensor.nbytes:
                self.largest, self.largest_tensor = call, spec


def forward_calls(structure: Structure, split: Split, *, batch: int, tokens: int, cached: int, head_tokens: int) -> Iterator[PlannedCall]:
    """The calls of one forward pass over ``tokens`` new tokens after ``cached`` earlier ones; the head sees the last ``head_tokens``."""
    dtype = structure.dtype

    def rows(width: int, count: int = tokens) -> TensorSpec:
        return TensorSpec((batch, count, width), dtype)

    yield PlannedCall(model_ops.EMBED, (TensorSpec((batch, tokens), torch.int64),), (rows(structure.width),))
    if split is Split.LAYER:
        hidden, positions = rows(structure.width), TensorSpec((1, tokens), torch.int64)
        for window in structure.windows:
            mask = _mask(structure, window, batch=batch, tokens=tokens, cached=cached)
            yield PlannedCall(model_ops.FULL_LAYER, (hidden, positions, *mask), (hidden,))
    for projection in () if split is Split.LAYER else structure.projections:
        inputs = (rows(projection.in_features),)
        outputs = tuple(rows(width) for width in projection.out_features)
        if split is Split.LINEAR or len(outputs) == 1:
            yield from (PlannedCall(model_ops.LINEAR, inputs, (output,)) for output in outputs)
        else:
            yield PlannedCall(model_ops.BATCH_LINEAR, inputs, outputs)
    if split is Split.OP:
        for attention in structure.attentions:
            queries = TensorSpec((batch, attention.heads, tokens, attention.head_dim), dtype)
            length = tokens + (cached if attention.window is None else min(cached, attention.window - 1))
            keys = TensorSpec((batch, attention.heads, attention.head_dim, length), dtype)
            values = TensorSpec((batch, attention.heads, length, attention.value_dim), dtype)
            scores = model_ops.matmul(queries, keys)
            yield PlannedCall(model_ops.MATMUL, (queries, keys), (scores,))
            yield PlannedCall(model_ops.MATMUL, (scores, values), (model_ops.matmul(scores, values),))
    head = structure.head
    yield PlannedCall(model_ops.LM_HEAD, (rows(head.in_features, head_tokens),), (rows(head.out_features[0], head_tokens),))


def _mask(structure: Structure, window: int | None, *, batch: int, tokens: int, cached: int) -> tuple[TensorSpec, ...]:
    """The mask that a layer's attention is given, when nothing is padded (``transformers.masking_utils``)."""
    length = tokens + (cached if window is None else min(cached, window - 1))
    if structure.additive_masks:
        return (TensorSpec((batch, 1, tokens, length), structure.dtype),)
    causal_alone = (tokens == 1 or length == tokens) and (window is None or length < window)
    return () if causal_alone else (TensorSpec((batch, 1, tokens, length), torch.bool),)


def generation_traffic(structure: Structure, split: Split, *, prompt_tokens: int, new_tokens: int, batch: int = 1) -> Traffic:
    """Traffic of a greedy generation with a KV cache: one pass over the prompt, then one for each new token but the last."""
    traffic = Traffic()
    for step in range(new_tokens):
        tokens, cached = (prompt_tokens, 0) if step == 0 else (1, prompt_tokens + step - 1)
        for call in forward_calls(structure, split, batch=batch, tokens=tokens, cached=cached, head_tokens=1):
            traffic.add(call)
    return traffic
