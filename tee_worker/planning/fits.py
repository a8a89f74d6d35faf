"""At which splits a decoder can be split: told of each layer from what was seen when the model was run once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from shmbroker.errors import BadInput
from shmbroker.models import LayerHalves, adapters, rotary_of
from tee_worker.planning.run_once import Attention, Notes
from tee_worker.planning.splits import Split

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Fits:
    """Whether each layer of one model can be computed at a split, and why not."""

    def __init__(
        self, model: PreTrainedModel, layers: Sequence[tuple[str, nn.Module]], halves: Sequence[LayerHalves | None], notes: Notes
    ) -> None:
        """``notes``: of the pass in which ``layers`` and ``halves`` were watched."""
        self._model = model
        self._kind = type(model).__name__
        self._layers = layers
        self._halves = halves
        self._notes = notes
        self._adapters = adapters(model)
        self._heads = {model.get_output_embeddings()}  # type: ignore[no-untyped-call]

    def check(self, of_layers: Sequence[Split], uniform: Split | None) -> None:
        """Raise :class:`BadInput` unless each layer can be split as ``of_layers`` says; ``uniform``: all of them, if so."""
        if not self._layers:
            reasons = [(uniform or Split.LAYER, self._without_layers(uniform or Split.LAYER))]
        else:
            reasons = [(split, self._refusal(index, split)) for index, split in enumerate(of_layers)]
        for split, reason in reasons:
            if reason is not None:
                raise BadInput(f"split {split.value!r}: {reason}: {self.advice()}")

    def advice(self, splits: Sequence[Split] = tuple(Split)) -> str:
        """Which of ``splits`` work for the whole model, as advice, what moves most first."""
        names = [repr(split.value) for split in reversed(splits) if self._works(split)]
        if not names:
            return "this model cannot be split"
        return "use split " + (f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0])

    def _works(self, split: Split) -> bool:
        if not self._layers:
            return self._without_layers(split) is None
        return all(self._refusal(index, split) is None for index in range(len(self._layers)))

    def _without_layers(self, split: Split) -> str | None:
        if split.stateful:
            return f"the decoder layers of {self._kind} could not be told from its other modules"
        return self._no_products() or (self._attention(self._notes.attentions, self._kind) if split is Split.OP else None)

    def _refusal(self, index: int, split: Split) -> str | None:
        """Why layer ``index`` cannot be computed at ``split``; None where it can."""
        name, layer = self._layers[index]
        if not split.stateful:
            within = [one for one in self._notes.attentions if one.name.startswith(f"{name}.") or one.name == name]
            return self._no_products() or (self._attention(within, name) if split is Split.OP else None)
        found = self._halves[index]
        if split is Split.BLOCK and found is None:
            return f"attention and feed-forward of {name} could not be told apart"
        adapted = next((self._adapters[module] for module in layer.modules() if module in self._adapters), None)
        if adapted is not None:
            return f"{adapted} has an adapter, which would be left out on the GPU worker"
        try:
            self._check_whole(name, layer, found if split is Split.BLOCK else None)
        except BadInput as error:
            return str(error)
        return None

    def _no_products(self) -> str | None:
        if any(note.module not in self._heads for note in self._notes.linears):
            return None
        return f"{self._kind} has no plain linear layers that could be computed elsewhere"

    def _attention(self, attentions: Sequence[Attention], name: str) -> str | None:
        if not attentions:
            return f"{name} has no attention that goes by Hugging Face's interface, whose two products could be computed elsewhere"
        for one in attentions:
            if one.unknown:
                return f"{one.name} attends with {', '.join(one.unknown)}, which is not known here"
            if not one.masked:
                return f"{one.name} is given no mask over several tokens"
        return None

    def _check_whole(self, name: str, layer: nn.Module, halves: LayerHalves | None) -> None:
        """See that what moves as a whole can be handed all that it is given, and that its keys and values can be kept elsewhere."""
        # It needs transformers' caches, which take seconds to import.
        from tee_worker.planning.layer_arguments import check_feed_forward, check_whole

        rotary = rotary_of(self._model) is not None
        if halves is None:
            check_whole(name, layer, self._notes.calls.get(layer), rotary=rotary)
            self._check_read(name, layer)
            return
        attention, feed_forward = layer.get_submodule(halves.attention), layer.get_submodule(halves.feed_forward)
        check_whole(f"{name}.{halves.attention}", attention, self._notes.calls.get(attention), rotary=rotary)
        check_feed_forward(f"{name}.{halves.feed_forward}", self._notes.calls.get(feed_forward))
        self._check_read(f"{name}.{halves.attention}", attention)
        self._check_read(f"{name}.{halves.feed_forward}", feed_forward)

    def _check_read(self, name: str, module: nn.Module) -> None:
        if module in self._notes.read:
            raise BadInput(f"{name} returns more than one tensor that the model goes on with")
