"""The analytic model: calls and bytes of a forward pass under a split, known before anything runs. What is counted must equal it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from shmbroker.arena import TensorSpec
from shmbroker.models import ops
from tee_worker.planning.attention_products import product_count
from tee_worker.planning.pass_parts import parts_of
from tee_worker.planning.splits import Split, Splits
from tee_worker.planning.structure import Structure
from tee_worker.trust.modes import PLAIN, Trust, TrustOptions


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


def forward_calls(
    structure: Structure,
    split: Split | Splits | str,
    *,
    batch: int,
    tokens: int,
    cached: int,
    head_tokens: int,
    trust: TrustOptions = PLAIN,
) -> Iterator[PlannedCall]:
    """The calls of one forward pass over ``tokens`` new tokens after ``cached`` earlier ones; the head sees the last ``head_tokens``."""
    splits = Splits.named(split)
    dtype = structure.dtype
    if trust.ring:
        yield from _sealed_calls(structure, splits, batch * tokens, batch * head_tokens, trust.hide_lengths)
        return

    def rows(width: int, count: int = tokens) -> TensorSpec:
        return TensorSpec((batch, count, width), dtype)

    hidden = rows(structure.width)
    if trust.mode is Trust.PLAIN:
        yield PlannedCall(ops.EMBED, (TensorSpec((batch, tokens), torch.int64),), (hidden,))
    positions, session = TensorSpec((batch, tokens), torch.int64), TensorSpec((ops.SESSION_WORDS,), torch.int64)
    additive = structure.additive_masks or Split.OP in splits.used()
    for one, window in zip(splits.of_layers(len(structure.layers)), structure.windows, strict=True):
        if one.stateful:
            mask = _mask(dtype, window, additive=additive, batch=batch, tokens=tokens, cached=cached)
            op = ops.FULL_LAYER if one is Split.LAYER else ops.ATTENTION_BLOCK
            yield PlannedCall(op, (hidden, positions, session, *mask), (hidden,))
        if one is Split.BLOCK:
            yield PlannedCall(ops.MLP_BLOCK, (hidden,), (hidden,))
    for projection in structure.projections:
        if structure.moves_whole(projection.names[0], splits):
            continue
        inputs = (rows(projection.in_features),)
        outputs = tuple(rows(width) for width in projection.out_features)
        if len(outputs) == 1 or structure.split_of(projection.names[0], splits) is Split.LINEAR:
            yield from (PlannedCall(ops.LINEAR, inputs, (output,)) for output in outputs)
        else:
            yield PlannedCall(ops.BATCH_LINEAR, inputs, outputs)
    for attention in structure.attentions:
        if structure.split_of(attention.name, splits) is not Split.OP:
            continue
        count = product_count(attention.heads, attention.key_value_heads, tokens)
        queries = TensorSpec((batch, count, attention.heads // count * tokens, attention.head_dim), dtype)
        length = tokens + (cached if attention.window is None else min(cached, attention.window - 1))
        keys = TensorSpec((batch, count, attention.head_dim, length), dtype)
        values = TensorSpec((batch, count, length, attention.value_dim), dtype)
        scores = ops.matmul(queries, keys)
        yield PlannedCall(ops.MATMUL, (queries, keys), (scores,))
        yield PlannedCall(ops.MATMUL, (scores, values), (ops.matmul(scores, values),))
    if head_tokens:
        head = structure.head
        yield PlannedCall(ops.LM_HEAD, (rows(head.in_features, head_tokens),), (rows(head.out_features[0], head_tokens),))


def _sealed_calls(structure: Structure, splits: Splits, rows: int, head_rows: int, multiple: int) -> Iterator[PlannedCall]:
    """Products of integers alone; rows are rounded up to a ``multiple``."""

    def call(in_features: int, widths: Sequence[int], count: int) -> PlannedCall:
        rounded = -(-count // multiple) * multiple
        return PlannedCall(
            ops.RING_LINEAR, (TensorSpec((rounded, in_features), torch.int32),), (TensorSpec((rounded, sum(widths)), torch.int32),)
        )

    for projection in structure.projections if rows else ():
        fused = len(projection.names) == 1 or structure.split_of(projection.names[0], splits) is not Split.LINEAR
        for widths in [projection.out_features] if fused else [(width,) for width in projection.out_features]:
            yield call(projection.in_features, widths, rows)
    if head_rows:
        yield call(structure.head.in_features, structure.head.out_features, head_rows)


def _mask(dtype: torch.dtype, window: int | None, *, additive: bool, batch: int, tokens: int, cached: int) -> tuple[TensorSpec, ...]:
    """The mask that a layer's attention is given, when nothing is padded (``transformers.masking_utils``)."""
    length = tokens + (cached if window is None else min(cached, window - 1))
    if additive:
        return (TensorSpec((batch, 1, tokens, length), dtype),)
    causal_alone = (tokens == 1 or length == tokens) and (window is None or length < window)
    return () if causal_alone else (TensorSpec((batch, 1, tokens, length), torch.bool),)


def generation_traffic(
    structure: Structure,
    split: Split | Splits | str,
    *,
    prompt_tokens: int,
    new_tokens: int,
    batch: int = 1,
    pipeline: int = 1,
    trust: TrustOptions = PLAIN,
) -> Traffic:
    """Traffic of a greedy generation with a KV cache: one pass over the prompt, then one for each new token but the last.

    ``pipeline``: how many parts of a pass are on their way at once (:mod:`tee_worker.offloading.pipeline`).
    """
    splits = Splits.named(split)
    traffic = Traffic()
    for step in range(new_tokens):
        tokens, cached = (prompt_tokens, 0) if step == 0 else (1, prompt_tokens + step - 1)
        for part in parts_of(batch, tokens, pipeline):
            for call in forward_calls(
                structure, splits, batch=part.rows, tokens=part.tokens, cached=cached + part.first_token, head_tokens=0, trust=trust
            ):
                traffic.add(call)
        for call in _head_calls(structure, batch, trust):
            traffic.add(call)
    return traffic


def _head_calls(structure: Structure, batch: int, trust: TrustOptions) -> Iterator[PlannedCall]:
    """For the last token of each sequence."""
    if trust.ring:
        yield from _sealed_calls(structure, Splits.named(Split.FUSED), 0, batch, trust.hide_lengths)
        return
    head = structure.head
    last, logits = (TensorSpec((batch, 1, width), structure.dtype) for width in (head.in_features, head.out_features[0]))
    yield PlannedCall(ops.LM_HEAD, (last,), (logits,))
