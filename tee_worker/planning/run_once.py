"""Running a model once without its weights, to see what each of its modules is given and gives.

For one forward pass every linear layer and embedding is replaced by one that returns zeros of the right shape and notes what it was given; parameters
that are elsewhere are zeros that take no memory.
"""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shmbroker.errors import BadInput
from shmbroker.models import LayerHalves, adapters, features, is_linear, missing_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE = "shmbroker_probe"

_LARGE = 1 << 20
"""Elements of a parameter that is stood in for without memory. Some models look at small ones in ways that need it; of linear layers together it would be
the model's size."""

LONGEST_REASON = 200
"""Characters of another library's words that are passed on."""


ABOUT_OUTPUTS = frozenset(
    {"use_cache", "cache_position", "output_hidden_states", "return_dict", "logits_to_keep", "num_items_in_batch", "labels", "tokenizer"}
)
"""Arguments that change nothing of what a layer computes: whether there is a cache is seen by the cache, where it ends by its length; a tokenizer is
generation's, for texts at which to stop."""

_OF_ATTENTION = frozenset({"position_ids", "sliding_window", "output_attentions", "is_causal", "s_aux"})
"""Those of an attention that are in its other arguments (positions in query and key, windows and causality in the mask), or computed."""


@dataclass(frozen=True, slots=True)
class Attention:
    """The sizes of one attention module."""

    name: str
    heads: int
    key_value_heads: int
    head_dim: int
    value_dim: int
    window: int | None = None
    """Earlier tokens that its cache keeps, and one; None for all."""
    unknown: tuple[str, ...] = ()
    """Arguments that it was given beyond those that attention is known to have."""
    masked: bool = True
    """Whether it was given a mask over several tokens."""


@dataclass(frozen=True, slots=True)
class LinearNote:
    """One call of a linear layer. The tensor is kept, so that no two of them can have the same id."""

    name: str
    module: nn.Module
    given: torch.Tensor
    version: int


@dataclass(frozen=True, slots=True)
class CallNote:
    """One call of a layer, or of one of its halves."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass(slots=True)
class Notes:
    """What was seen."""

    linears: list[LinearNote] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    calls: dict[nn.Module, CallNote] = field(default_factory=dict)
    """Of layers and their halves: the last one of each."""
    read: set[nn.Module] = field(default_factory=set)
    """Those of which more than the first value that they return is computed with."""


def run_once(model: PreTrainedModel, layers: Sequence[nn.Module], halves: Sequence[LayerHalves | None]) -> Notes:
    """A pass over two tokens, with a cache where the model has one. Raises :class:`BadInput` for a model that cannot be run so."""
    notes = Notes()
    watched = list(layers)
    for layer, found in zip(layers, halves, strict=True):
        watched += [] if found is None else [layer.get_submodule(found.attention), layer.get_submodule(found.feed_forward)]
    training = model.training
    model.train(False)  # so that nothing is drawn at random
    try:
        with _stand_ins(model), _noting(model, notes), _watching(watched, notes), torch.no_grad():
            # Two tokens: one alone takes short cuts in some models.
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=True)
    except BadInput:
        raise
    except Exception as error:  # a model's own code can raise anything
        words = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_REASON]
        raise BadInput(
            f"{type(model).__name__} cannot be run without its weights to find its parts: {_where(model, error)}: {words}"
        ) from error
    finally:
        model.train(training)
    return notes


def _where(model: PreTrainedModel, error: BaseException) -> str:
    """The innermost module that an error passed through."""
    names = {id(module): name for name, module in model.named_modules()}
    found = [names[id(here)] for frame, _ in traceback.walk_tb(error.__traceback__) if id(here := frame.f_locals.get("self")) in names]
    return (found[-1] if found else "") or "the model itself"


@contextlib.contextmanager
def _watching(modules: Sequence[nn.Module], notes: Notes) -> Iterator[None]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        notes.calls[module] = CallNote(args, kwargs, output)
        return (output[0], *_watched(output[1:], module, notes)) if type(output) is tuple else output

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Watched(torch.Tensor):
    """Notes that it is computed with."""

    on_use: Callable[[], None]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            for one in [*args, *(kwargs or {}).values()]:
                if isinstance(one, _Watched):
                    one.on_use()
            return function(*args, **(kwargs or {}))


def _watched(values: Any, module: nn.Module, notes: Notes) -> Any:
    """``values`` with tensors that note that they are computed with."""
    if isinstance(values, torch.Tensor):
        with torch._C.DisableTorchFunctionSubclass():
            made = values.detach().as_subclass(_Watched)
        made.on_use = lambda: notes.read.add(module)
        return made
    return tuple(_watched(one, module, notes) for one in values) if type(values) is tuple else values


@contextlib.contextmanager
def _stand_ins(model: PreTrainedModel) -> Iterator[None]:
    """For the duration, parameters that were not loaded here, or are to be moved, are zeros, the large ones without memory: what is found is the same."""
    before: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    for module in model.modules():
        known: dict[str, torch.Tensor] = dict(missing_parameters(module))
        moved = is_linear(module) or module is model.get_input_embeddings()
        if moved:
            known.update({name: one for name, one in module._parameters.items() if one is not None})
        for name, one in known.items():
            before.append((module, name, module._parameters.get(name)))
            module._parameters[name] = nn.Parameter(_zeros(one, without_memory=moved), requires_grad=False)
    experts = model.get_experts_implementation()
    try:
        model.set_experts_implementation("eager")  # which looks at those of two tokens alone
        yield
    finally:
        for module, name, parameter in before:
            module._parameters[name] = parameter
        model.set_experts_implementation(experts)


def _zeros(like: torch.Tensor, *, without_memory: bool) -> torch.Tensor:
    if without_memory or like.numel() > _LARGE:
        return torch.zeros((), dtype=like.dtype).expand(like.shape)
    return torch.zeros(like.shape, dtype=like.dtype)


def dtype_of(embedding: nn.Embedding) -> torch.dtype:
    """The dtype of an embedding, also of one without weights."""
    weight = embedding._parameters.get("weight")
    return missing_parameters(embedding)["weight"].dtype if weight is None else weight.dtype


@contextlib.contextmanager
def _noting(model: PreTrainedModel, notes: Notes) -> Iterator[None]:
    """For the duration, linear layers and embeddings return zeros, and everything is noted."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    names = {module: name for name, module in model.named_modules()}

    def note_attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, None]:
        window = kwargs.get("sliding_window")
        assert window is None or isinstance(window, int)
        sizes = query.shape[1], key.shape[1], query.shape[-1], value.shape[-1]
        masked = attention_mask is not None or kwargs.get("is_causal") is False or query.shape[2] == 1
        notes.attentions.append(Attention(names[module], *sizes, window, unknown_arguments(kwargs), masked))
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    dtype, added = model.dtype, adapters(model)
    patched: list[nn.Module] = []
    for name, module in model.named_modules():
        if is_linear(module) and module not in added:
            module.forward = _noting_linear(name, module, notes)
        elif module is model.get_input_embeddings():
            module.forward = _zero_embedding(module, dtype)
        else:
            continue
        patched.append(module)
    before = model.config._attn_implementation
    AttentionInterface.register(_PROBE, note_attention)
    AttentionMaskInterface.register(_PROBE, eager_mask)
    try:
        model.set_attn_implementation(_PROBE)
        yield
    finally:
        model.set_attn_implementation(before)
        for module in patched:
            del module.forward


def unknown_arguments(given: Mapping[str, object]) -> tuple[str, ...]:
    """Which arguments of an attention change what it computes in a way that is not known here: neither None nor False, and none of the known ones."""
    return tuple(
        name
        for name, value in given.items()
        if value is not None and value is not False and name not in ABOUT_OUTPUTS and name not in _OF_ATTENTION
    )


def _noting_linear(name: str, module: nn.Module, notes: Notes) -> Callable[[torch.Tensor], torch.Tensor]:
    _, out_features = features(module)
    (argument,) = list(inspect.signature(type(module).forward).parameters)[1:]

    def forward(*args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        x = args[0] if args else kwargs[argument]
        notes.linears.append(LinearNote(name, module, x, 0 if x.is_inference() else x._version))
        return x.new_zeros(*x.shape[:-1], out_features)

    return forward


def _zero_embedding(module: nn.Module, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*ids.shape, int(module.embedding_dim), dtype=dtype)  # type: ignore[arg-type]

    return forward
