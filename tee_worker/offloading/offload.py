"""Moving a model's heavy modules to a GPU worker, in place: the model stays a Hugging Face model."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from shmbroker.arena import NAME_OF
from shmbroker.client import Bindable, Op
from shmbroker.errors import BadInput
from shmbroker.models import digests_of, name_without_adapter, ops, rotary_of
from shmbroker.settings import DEFAULTS
from tee_worker.offloading.attention import install_split_attention
from tee_worker.offloading.baton import Baton
from tee_worker.offloading.passing_channel import PassingChannel
from tee_worker.offloading.pipeline import Pipeline
from tee_worker.offloading.refusals import dropout_in, install_refusals
from tee_worker.offloading.remote_modules import FusedCall, SplitAttention, remote_embedding, remote_linear
from tee_worker.offloading.self_check import SelfCheck, has_weights
from tee_worker.planning.splits import Split, Splits
from tee_worker.planning.structure import Projection, Structure, structure_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tee_worker.offloading.sessions import Sessions


@dataclass(frozen=True, slots=True)
class Offloaded:
    """A model whose heavy modules were moved."""

    model: PreTrainedModel
    structure: Structure
    splits: Splits


def offload(
    model: PreTrainedModel,
    channel: Bindable,
    split: Split | Splits | str = DEFAULTS.split,
    *,
    pipeline: int = 1,
    structure: Structure | None = None,
    check: bool = True,
) -> Offloaded:
    """Replace modules of ``model`` by calls on ``channel``; their weights, if it has any, are let go, and what stays is frozen.

    No gradient comes back through a call, so no parameter requires one afterwards; who has one require it again is refused by the first call.

    ``split``: of all layers, or of each range of them (``"fused:0-3,layer:4-29"``). ``pipeline``: how many parts of a forward pass (micro-batches of
    several sequences, chunks of one long prompt) are on their way at once, so that both sides compute at the same time.
    ``model.generate()``, caches and sampling stay Hugging Face's. The worker must hold the same model in the same dtype. Raises
    :class:`BadInput` for a split that is not known or a model that cannot be split so, :class:`RemoteOpError` for a worker with another model. ``structure``: as found
    by :func:`structure_of` for this split, if it is at hand. ``check``: where all weights are here, their digests are compared with the worker's, and a
    short prompt and one more token are computed before and after; a difference is refused, with the first layer that differs. ``model`` is not usable then.
    """
    splits = Splits.named(split)
    if pipeline < 1:
        raise BadInput(f"pipeline {pipeline} must be 1 or more parts on their way at once")
    structure = structure or structure_of(model, splits)
    check = check and has_weights(model)
    checked = SelfCheck(model, structure.layers) if check else None
    baton = Baton()
    if pipeline > 1:
        channel = PassingChannel(channel, baton)
    embed = channel.bind(
        ops.EMBED,
        out_spec=ops.embed,
        module=structure.embedding,
        width=structure.width,
        dtype=NAME_OF[structure.dtype],
        digests=digests_of(model.get_submodule(structure.embedding)),
    )
    embedding = model.get_submodule(structure.embedding)
    assert isinstance(embedding, nn.Embedding)
    remote_embedding(embedding, structure.embedding, embed, structure.dtype)
    dropout = dropout_in(_whole_modules(model, structure, splits))
    sessions = _move_layers(model, channel, structure, splits)
    for projection in structure.projections:
        if structure.moves_whole(projection.names[0], splits):
            continue
        if len(projection.names) == 1 or structure.split_of(projection.names[0], splits) is Split.LINEAR:
            for name, width in zip(projection.names, projection.out_features, strict=True):
                op = _linear(model, channel, ops.LINEAR, name, projection.in_features, width)
                remote_linear(model.get_submodule(name), name, op, structure.dtype)
        else:
            _fuse(model, channel, projection, structure.dtype)
    if Split.OP in splits.used():
        products = SplitAttention(channel.memory, channel.bind(ops.MATMUL, out_spec=ops.matmul))
        install_split_attention(model, products, structure, splits)
    head = structure.head
    op = _linear(model, channel, ops.LM_HEAD, head.names[0], head.in_features, head.out_features[0])
    remote_linear(model.get_submodule(head.names[0]), head.names[0], op, structure.dtype)
    if pipeline > 1:
        Pipeline(model, pipeline, baton, sessions).install()
    model.requires_grad_(False)
    install_refusals(model, structure.dtype, dropout)
    if checked is not None:
        checked.compare(model)
    return Offloaded(model, structure, splits)


def _whole_modules(model: PreTrainedModel, structure: Structure, splits: Splits) -> dict[str, nn.Module]:
    """What moves as a whole, by name."""
    found: dict[str, nn.Module] = {}
    for name, halves, split in zip(structure.layers, structure.halves, splits.of_layers(len(structure.layers)), strict=True):
        if split is Split.LAYER:
            found[name] = model.get_submodule(name)
        elif split is Split.BLOCK and halves is not None:
            for half in (halves.attention, halves.feed_forward):
                found[f"{name}.{half}"] = model.get_submodule(f"{name}.{half}")
    return found


def _move_layers(model: PreTrainedModel, channel: Bindable, structure: Structure, splits: Splits) -> Sessions | None:
    """Move what moves as a whole; None where nothing does."""
    of_layers = splits.of_layers(len(structure.layers))
    remote = frozenset(index for index, split in enumerate(of_layers) if split.stateful)
    if not remote:
        return None
    from tee_worker.offloading.remote_layers import RemoteAttention, RemoteFeedForward, RemoteLayer, become, make_remote
    from tee_worker.offloading.sessions import Sessions

    sessions = Sessions(channel.memory, model.config, remote, rotary_of(model))
    for index in sorted(remote):
        layer = model.get_submodule(structure.layers[index])
        if of_layers[index] is Split.LAYER:
            whole = channel.bind(ops.FULL_LAYER, out_spec=ops.full_layer, layer=index, digests=digests_of(layer))
            make_remote(layer, RemoteLayer, whole, index, sessions, structure.returns[index].layer)
            continue
        halves = structure.halves[index]
        assert halves is not None
        attention, feed_forward = layer.get_submodule(halves.attention), layer.get_submodule(halves.feed_forward)
        attending = channel.bind(ops.ATTENTION_BLOCK, out_spec=ops.attention_block, layer=index, digests=digests_of(attention))
        returns = structure.returns[index]
        make_remote(attention, RemoteAttention, attending, index, sessions, returns.attention)
        feeding = channel.bind(ops.MLP_BLOCK, out_spec=ops.mlp_block, layer=index, digests=digests_of(feed_forward))
        become(feed_forward, RemoteFeedForward, feeding, returns.feed_forward)
    return sessions


def _linear(model: PreTrainedModel, channel: Bindable, op: str, name: str, in_features: int, out_features: int) -> Op:
    return channel.bind(
        op,
        out_spec=ops.linear,
        module=name_without_adapter(name),
        in_features=in_features,
        out_features=out_features,
        digests=digests_of(model.get_submodule(name)),
    )


def _fuse(model: PreTrainedModel, channel: Bindable, projection: Projection, dtype: torch.dtype) -> None:
    bound = channel.bind(
        ops.BATCH_LINEAR,
        out_spec=ops.batch_linear,
        modules=[name_without_adapter(name) for name in projection.names],
        in_features=projection.in_features,
        out_features=list(projection.out_features),
        digests=[digests_of(model.get_submodule(name)) for name in projection.names],
    )
    call = FusedCall(bound, len(projection.names))
    for index, name in enumerate(projection.names):
        remote_linear(model.get_submodule(name), name, functools.partial(call.take, index), dtype)
