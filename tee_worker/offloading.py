"""Moving a model's heavy modules to a GPU worker, in place: the model stays a Hugging Face model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from shmbroker import model_ops
from shmbroker.channel import Channel
from shmbroker.errors import BadInput
from shmbroker.failover import FailoverChannel
from shmbroker.memory.spec import NAME_OF
from tee_worker import attention
from tee_worker.remote_modules import FusedCall, FusedLinear, RemoteEmbedding, RemoteLinear, SplitAttention, remote_embedding
from tee_worker.splits import Split
from tee_worker.structure import Projection, Structure, structure_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Offloaded:
    """A model whose heavy modules were moved."""

    model: PreTrainedModel
    structure: Structure
    split: Split


def offload(
    model: PreTrainedModel, channel: Channel | FailoverChannel, split: Split | str = Split.FUSED, *, structure: Structure | None = None
) -> Offloaded:
    """Replace modules of ``model`` by calls on ``channel``; their weights, if it has any, are let go.

    ``model.generate()``, caches and sampling stay Hugging Face's. The worker must hold the same model in the same dtype. Raises
    :class:`BadInput` for a split that is not known, a model that cannot be split so, or a worker with another model. ``structure``: as found
    by :func:`structure_of`, if it is at hand.
    """
    split = Split.named(split)
    structure = structure or structure_of(model)
    embed = channel.bind(
        model_ops.EMBED,
        out_spec=model_ops.embed,
        module=structure.embedding,
        width=structure.width,
        dtype=NAME_OF[structure.dtype],
    )
    embedding = model.get_submodule(structure.embedding)
    assert isinstance(embedding, nn.Embedding)
    rows = RemoteEmbedding(embed, structure.width)
    _replace(model, structure.embedding, remote_embedding(embedding, rows, structure.dtype))
    if split is Split.LAYER:
        _move_layers(model, channel, structure)
    for projection in () if split is Split.LAYER else structure.projections:
        if split is Split.LINEAR or len(projection.names) == 1:
            for name, width in zip(projection.names, projection.out_features, strict=True):
                _replace(model, name, _linear(channel, model_ops.LINEAR, name, projection.in_features, width))
        else:
            _fuse(model, channel, projection)
    if split is Split.OP:
        attention.register()
        modules = dict(model.named_modules())
        split_attention = SplitAttention(channel.client, channel.bind(model_ops.MATMUL, out_spec=model_ops.matmul))
        for part in structure.attentions:
            setattr(modules[part.name], attention.ATTRIBUTE, split_attention)
        model.set_attn_implementation(attention.NAME)
    head = structure.head
    _replace(model, head.names[0], _linear(channel, model_ops.LM_HEAD, head.names[0], head.in_features, head.out_features[0]))
    return Offloaded(model, structure, split)


def _move_layers(model: PreTrainedModel, channel: Channel | FailoverChannel, structure: Structure) -> None:
    from tee_worker.remote_layers import Sessions, make_remote

    if not structure.layers:
        raise BadInput(
            f"split 'layer': the decoder layers of {type(model).__name__} could not be told from its other modules; use split 'op'"
        )
    sessions = Sessions(channel.client, channel.bind(model_ops.FULL_LAYER, out_spec=model_ops.full_layer), len(structure.layers))
    for index, name in enumerate(structure.layers):
        make_remote(model.get_submodule(name), index, sessions)


def _linear(channel: Channel | FailoverChannel, op: str, name: str, in_features: int, out_features: int) -> RemoteLinear:
    bound = channel.bind(op, out_spec=model_ops.linear, module=name, in_features=in_features, out_features=out_features)
    return RemoteLinear(bound, in_features, out_features)


def _fuse(model: PreTrainedModel, channel: Channel | FailoverChannel, projection: Projection) -> None:
    bound = channel.bind(
        model_ops.BATCH_LINEAR,
        out_spec=model_ops.batch_linear,
        modules=list(projection.names),
        in_features=projection.in_features,
        out_features=list(projection.out_features),
    )
    call = FusedCall(bound, len(projection.names))
    for index, (name, width) in enumerate(zip(projection.names, projection.out_features, strict=True)):
        _replace(model, name, FusedLinear(call, index, projection.in_features, width))


def _replace(model: PreTrainedModel, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
