"""The self-check of :func:`offload`: the split model must give what the whole one gave, layer by layer, before anybody else calls it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shmbroker.errors import BadInput, ShmBrokerError
from shmbroker.models import missing_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT_TOKENS = 6
NEW_TOKENS = 2
"""The second one is computed with a cache."""

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference allowed, of the largest value of a layer's output: sums in another order, and on a GPU in another precision, differ by less."""

ROUNDED = 64.0
"""What the rounding of weights may come to at the end of a model of many layers; random ones, of tests, are the worst."""

LONGEST_REASON = 200
"""Characters of another library's words that are passed on."""

Seen = list[tuple[str, torch.Tensor]]
"""The output of each layer, in the order in which they ran, and the logits."""


def has_weights(model: PreTrainedModel) -> bool:
    """Whether all parameters are here, so that the whole model can be run."""
    return not any(missing_parameters(module) for module in model.modules()) and not any(one.is_meta for one in model.parameters())


class SelfCheck:
    """What the whole model gave for a short prompt and one more token."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[str]) -> None:
        """Runs ``model`` as it is. ``layers``: the names of its decoder layers."""
        self._layers = layers
        try:
            self._expected, self._tokens = _run(model, layers, None)
        except Exception as error:  # a model's own code can raise anything
            raise BadInput(f"{type(model).__name__} cannot be run as it is, before anything is moved: {_words(error)}") from error

    def compare(self, model: PreTrainedModel, rounding: float = 0.0) -> None:
        """Run the split model; ``rounding``: of its weights, as a share of the largest, where it computes with others. Raises :class:`BadInput` with the first layer that differs, the worker's own errors as they are."""
        kind = type(model).__name__
        try:
            seen, _ = _run(model, self._layers, self._tokens)
        except ShmBrokerError:
            raise
        except Exception as error:
            raise BadInput(f"{kind} runs in one process, and not split so: {_words(error)}; use another split") from error
        if len(seen) != len(self._expected):
            raise BadInput(f"{kind} runs {len(self._expected)} layers in one process, {len(seen)} split so: use another split")
        for (name, here), (_, expected) in zip(seen, self._expected, strict=True):
            scale = float(expected.abs().max()) or 1.0
            difference = float((here - expected).abs().max()) / scale if here.shape == expected.shape else float("inf")
            if not difference <= max(TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16]), ROUNDED * rounding):
                raise BadInput(
                    f"self-check: {name} of the split {kind} gives other numbers than in one process (they differ by {difference:.2g} of the largest): "
                    "use another split, and tell us"
                )


def _run(model: PreTrainedModel, layers: Sequence[str], tokens: Sequence[int] | None) -> tuple[Seen, list[int]]:
    """A greedy generation; ``tokens``: those that are to come, so that two near ones cannot send it another way."""
    size = model.config.get_text_config().vocab_size
    ids = torch.tensor([[(7919 * (index + 1)) % size for index in range(PROMPT_TOKENS)]])
    forced: Any = None if tokens is None else lambda batch, seen: [tokens[len(seen) - PROMPT_TOKENS]]
    training = model.training
    if training:
        model.train(False)
    seen: Seen = []
    try:
        with _watching([(name, model.get_submodule(name)) for name in layers], seen), torch.no_grad():
            output = model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                return_dict_in_generate=True,
                output_logits=True,
                prefix_allowed_tokens_fn=forced,
            )
    finally:
        if training:
            model.train(True)
    seen += [(f"the logits of token {index}", logits.float()) for index, logits in enumerate(output.logits)]
    return seen, output.sequences[0, PROMPT_TOKENS:].tolist()


@contextlib.contextmanager
def _watching(layers: Sequence[tuple[str, nn.Module]], seen: Seen) -> Iterator[None]:
    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple | list) else output
            seen.append((name, first.float().clone()))

        return hook

    hooks = [layer.register_forward_hook(note(name)) for name, layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_REASON]
