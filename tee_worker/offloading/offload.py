"""Moving a model's heavy modules to a GPU worker, in place: the model stays a Hugging Face model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from shmbroker.arena import NAME_OF, TensorSpec
from shmbroker.client import Bindable, Op
from shmbroker.errors import BadInput
from shmbroker.models import digests_of, name_without_adapter, ops, rotary_of
from shmbroker.settings import DEFAULTS
from tee_worker.offloading.attention import install_split_attention
from tee_worker.offloading.attention_weights import watch
from tee_worker.offloading.baton import Baton
from tee_worker.offloading.passing_channel import PassingChannel
from tee_worker.offloading.pipeline import Pipeline
from tee_worker.offloading.placed import place_without_parameters
from tee_worker.offloading.refusals import dropout_in, install_refusals, no_dropout
from tee_worker.offloading.remote_modules import FusedCall, RemoteLinear, SplitAttention, remote_embedding, remote_linear
from tee_worker.offloading.self_check import SelfCheck, has_weights
from tee_worker.planning.splits import Split, Splits
from tee_worker.planning.structure import Projection, Structure, structure_of
from tee_worker.trust.modes import Trust, TrustOptions
from tee_worker.trust.moves import Sealed, SealedMoves

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tee_worker.offloading.sessions import Sessions


@dataclass(frozen=True, slots=True)
class Offloaded:
    """A model whose heavy modules were moved."""

    model: PreTrainedModel
    structure: Structure
    splits: Splits
    sealed: Sealed | None = None
    """Its session with workers that are not trusted; None at trust ``plain``."""


def offload(
    model: PreTrainedModel,
    channel: Bindable,
    split: Split | Splits | str = DEFAULTS.split,
    *,
    pipeline: int = 1,
    structure: Structure | None = None,
    check: bool = True,
    trust: TrustOptions | Trust | str = Trust.PLAIN,
    second: Bindable | None = None,
) -> Offloaded:
    """Replace modules of ``model`` by calls on ``channel``; their weights, if it has any, are let go, and what stays is frozen.

    No gradient comes back through a call, so no parameter requires one afterwards; who has one require it again is refused by the first call.

    ``split``: of all layers, or of each range of them (``"fused:0-3,layer:4-29"``). ``pipeline``: how many parts of a forward pass (micro-batches of
    several sequences, chunks of one long prompt) are on their way at once, so that both sides compute at the same time.
    ``model.generate()``, caches and sampling stay Hugging Face's. The worker must hold the same model in the same dtype. ``structure``: as found
    by :func:`structure_of` for this split, if it is at hand. ``check``: where all weights are here, their digests are compared with the worker's, and a
    short prompt and one more token are computed before and after.

    ``trust``: what the worker is trusted with (docs/trust.md). Above ``plain`` the embedding stays here, all weights must be here to check by, and the
    linear layers' are let go (at ``blind`` kept as integers, unless a second worker makes the pads). ``second``: a channel of another client to a
    second worker with the same weights: it is given the pads, with each call at ``shares``, ahead of time at ``blind``.

    Raises :class:`BadInput` for a split that is not known or a model that cannot be split so, :class:`RemoteOpError` for a worker with another model:
    ``model`` is as it was then. Where the numbers differ, :class:`BadInput` names the first layer whose do, and ``model`` is to be loaded anew.
    """
    splits, options = Splits.named(split), TrustOptions.named(trust)
    options.check_floor(dealt=second is not None)
    if second is not None and options.mode is Trust.PLAIN:
        raise BadInput("a second worker is of trust 'shares' and 'blind': give trust= one of them, or leave second= out")
    if pipeline < 1:
        raise BadInput(f"pipeline {pipeline} must be 1 or more parts on their way at once")
    if isinstance(model.get_output_embeddings(), RemoteLinear):  # type: ignore[no-untyped-call]
        raise BadInput(f"this {type(model).__name__} is split already: load another one")
    structure = structure or structure_of(model, splits)
    dropout = dropout_in(_whole_modules(model, structure, splits))
    if dropout is not None and model.training:
        raise no_dropout(dropout)
    check = check and has_weights(model)
    expected = SelfCheck(model, structure.layers) if check else None
    baton = Baton()
    if pipeline > 1:
        channel = PassingChannel(channel, baton)
    sealed = sessions = None
    if options.mode is Trust.PLAIN:
        moves = _Moves(model, channel, structure, splits, check)
        moves.bind()
        moves.move()
        sessions = moves.sessions
    else:
        sealing = SealedMoves(model, channel, structure, splits, options, second)
        sealing.bind()
        sealed = sealing.move()
    try:
        if pipeline > 1:
            Pipeline(model, pipeline, baton, sessions).install()
        model.requires_grad_(False)
        watch(model, next(iter(_whole_modules(model, structure, splits)), None), structure.advice)
        install_refusals(model, structure.dtype, dropout)
        place_without_parameters(model, structure.dtype)
        if expected is not None:
            expected.compare(model, options.rounding)
    except BaseException:
        if sealed is not None:  # nobody else could
            sealed.close()
        raise
    return Offloaded(model, structure, splits, sealed)


class _Moves:
    """All that is to be replaced in one model: first everything is bound, which the worker may refuse, then everything is moved."""

    def __init__(self, model: PreTrainedModel, channel: Bindable, structure: Structure, splits: Splits, told: bool) -> None:
        """``told``: whether the worker is told the digests of the weights that are here."""
        self._model = model
        self._channel = channel
        self._structure = structure
        self._splits = splits
        self._told = told
        self._moves: list[Callable[[], None]] = []
        self._bound: set[str] = set()
        """Linear layers: one that runs several times in a pass is replaced once."""
        self.sessions: Sessions | None = None
        """Of what moves as a whole; None where nothing does."""

    def bind(self) -> None:
        """Bind every op. Raises :class:`RemoteOpError` for what the worker does not have."""
        structure, splits = self._structure, self._splits
        self._bind_embedding()
        self._bind_layers()
        for projection in structure.projections:
            if structure.moves_whole(projection.names[0], splits):
                continue
            if len(projection.names) == 1 or structure.split_of(projection.names[0], splits) is Split.LINEAR:
                for name, width in zip(projection.names, projection.out_features, strict=True):
                    self._bind_linear(ops.LINEAR, name, projection.in_features, width)
            else:
                self._bind_fused(projection)
        if Split.OP in splits.used():
            matmul = self._channel.bind(ops.MATMUL, out_spec=ops.matmul)
            products = SplitAttention(self._channel.memory, matmul, eager=structure.additive_masks)
            self._moves.append(functools.partial(install_split_attention, self._model, products, structure, splits))
        head = structure.head
        self._bind_linear(ops.LM_HEAD, head.names[0], head.in_features, head.out_features[0])

    def move(self) -> None:
        """Replace everything."""
        for move in self._moves:
            move()

    def _digests(self, module: nn.Module) -> Mapping[str, str]:
        return digests_of(module) if self._told else {}

    def _bind_embedding(self) -> None:
        name, dtype = self._structure.embedding, self._structure.dtype
        module = self._model.get_submodule(name)
        assert isinstance(module, nn.Embedding)
        op = self._channel.bind(
            ops.EMBED, out_spec=ops.embed, module=name, width=self._structure.width, dtype=NAME_OF[dtype], digests=self._digests(module)
        )
        self._moves.append(functools.partial(remote_embedding, module, name, op, dtype))

    def _bind_linear(self, op: str, name: str, in_features: int, out_features: int) -> None:
        if name in self._bound:
            return
        self._bound.add(name)
        module = self._model.get_submodule(name)
        bound = self._channel.bind(
            op,
            out_spec=ops.linear,
            module=name_without_adapter(name),
            in_features=in_features,
            out_features=out_features,
            digests=self._digests(module),
        )
        self._moves.append(functools.partial(remote_linear, module, name, bound, self._structure.dtype))

    def _bind_fused(self, projection: Projection) -> None:
        modules = [self._model.get_submodule(name) for name in projection.names]
        bound = self._channel.bind(
            ops.BATCH_LINEAR,
            out_spec=ops.batch_linear,
            modules=[name_without_adapter(name) for name in projection.names],
            in_features=projection.in_features,
            out_features=list(projection.out_features),
            digests=[self._digests(module) for module in modules],
        )
        call = FusedCall(bound, len(modules))
        for index, (name, module) in enumerate(zip(projection.names, modules, strict=True)):
            share = functools.partial(call.take, index)
            self._moves.append(functools.partial(remote_linear, module, name, share, self._structure.dtype))

    def _bind_layers(self) -> None:
        """What moves as a whole."""
        structure = self._structure
        of_layers = self._splits.of_layers(len(structure.layers))
        remote = frozenset(index for index, split in enumerate(of_layers) if split.stateful)
        if not remote:
            return
        from tee_worker.offloading.remote_layers import RemoteAttention, RemoteFeedForward, RemoteLayer, become, make_remote
        from tee_worker.offloading.sessions import Sessions

        sessions = self.sessions = Sessions(self._channel.memory, self._model.config, remote, rotary_of(self._model), structure.advice)
        for index in sorted(remote):
            layer, returns = self._model.get_submodule(structure.layers[index]), structure.returns[index]
            if of_layers[index] is Split.LAYER:
                whole = self._bind_whole(ops.FULL_LAYER, ops.full_layer, index, layer)
                self._moves.append(functools.partial(make_remote, layer, RemoteLayer, whole, index, sessions, returns.layer))
                continue
            halves = structure.halves[index]
            assert halves is not None
            attention, feed_forward = layer.get_submodule(halves.attention), layer.get_submodule(halves.feed_forward)
            attending = self._bind_whole(ops.ATTENTION_BLOCK, ops.attention_block, index, attention)
            self._moves.append(functools.partial(make_remote, attention, RemoteAttention, attending, index, sessions, returns.attention))
            feeding = self._bind_whole(ops.MLP_BLOCK, ops.mlp_block, index, feed_forward)
            self._moves.append(functools.partial(become, feed_forward, RemoteFeedForward, feeding, returns.feed_forward))

    def _bind_whole(self, op: str, out_spec: Callable[..., TensorSpec], index: int, module: nn.Module) -> Op:
        return self._channel.bind(op, out_spec=out_spec, layer=index, digests=self._digests(module))


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
