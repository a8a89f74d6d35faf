"""Known answers: what each module of a checkpoint gives for fixed inputs, so that who has no weights can see whether another process has the right ones.

They are recorded once, layer by layer, in float32, and kept beside the checkpoint. Of each output a few values, a sum of all under fixed signs and the
norm are kept: another weight in any row or column changes them, by more than the tolerance unless it is lost in the rounding.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch
from torch import nn

from shmbroker.errors import BadInput
from shmbroker.models.checkpoint import Checkpoint
from shmbroker.models.layer_call import LayerCall, first_of
from shmbroker.models.parts import decoder_layers, features, halves_of, is_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from shmbroker.models.source import ModelSource

log = logging.getLogger(__name__)

FORMAT = 1
SUFFIX = "known-answers.json"
TOKENS = 3
"""Of the inputs that layers are given."""

_KEPT = 16
_ROWS = 8
"""Of an embedding that are asked for."""


class Answer(msgspec.Struct, frozen=True):
    """Of one output: some values, spread evenly, the sum of all under fixed signs, the norm."""

    values: tuple[float, ...]
    signed_sum: float
    norm: float

    def difference(self, other: Answer) -> float:
        """How far ``other`` is away, as a share of the largest value, or of the norm; infinity for an output of another size, or not finite."""
        if len(self.values) != len(other.values) or not math.isfinite(other.norm):
            return math.inf
        largest = max(map(abs, self.values), default=0.0) or 1.0
        norm = self.norm or 1.0
        shares = [abs(here - there) / largest for here, there in zip(self.values, other.values, strict=True)]
        return max(*shares, abs(self.signed_sum - other.signed_sum) / norm, abs(self.norm - other.norm) / norm)


class Answers(msgspec.Struct, frozen=True):
    """Of one checkpoint. By the modules' names: embedding, linear layers, whole layers and their halves, what of them can be called alone."""

    format: int
    model: str
    """The class of the model."""
    answers: dict[str, Answer]


def answer_of(output: torch.Tensor) -> Answer:
    """What is kept of an output."""
    flat = output.detach().to(device="cpu", dtype=torch.float64).reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, min(_KEPT, flat.numel())).long()
    return Answer(tuple(flat[places].tolist()), float((flat * _signs(flat.numel())).sum()), float(flat.norm()))


def fixed_input(*shape: int) -> torch.Tensor:
    """Numbers between -1 and 1 that no two columns or rows share, float32; the same on every machine."""
    count = math.prod(shape)
    return torch.sin(torch.arange(1, count + 1, dtype=torch.float64).pow(2) * 0.618034).to(torch.float32).view(shape)


def fixed_rows(rows: int) -> torch.Tensor:
    """Token ids, spread evenly, ``[1, ids]`` int64."""
    return torch.linspace(0, rows - 1, min(_ROWS, rows)).long()[None]


def fixed_positions() -> torch.Tensor:
    """``[1, TOKENS]`` int64."""
    return torch.arange(TOKENS)[None]


def fixed_mask(dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores, ``[1, 1, TOKENS, TOKENS]``: each token sees itself and earlier ones."""
    return torch.full((TOKENS, TOKENS), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]


def answers_file(checkpoint: Checkpoint) -> Path:
    """Where the answers of a checkpoint are kept: beside it."""
    return checkpoint.folder / (f"{checkpoint.gguf_file}.{SUFFIX}" if checkpoint.gguf_file else SUFFIX)


def read_answers(file: Path) -> Answers:
    """Raises :class:`BadInput` for a file that is none of this format."""
    try:
        found = msgspec.json.decode(file.read_bytes(), type=Answers)
    except (OSError, msgspec.DecodeError) as error:
        raise BadInput(
            f"the known answers in {str(file)!r} cannot be read ({error}): delete it, or run 'tee-worker check' with the weights again"
        ) from None
    if found.format != FORMAT:
        raise BadInput(f"the known answers in {str(file)!r} are of format {found.format}, not {FORMAT}: run 'tee-worker check' again")
    return found


def write_answers(file: Path, answers: Answers) -> None:
    """Whole or not at all. Raises :class:`BadInput` where it cannot be written."""
    try:
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.", delete=False) as target:
            try:
                target.write(msgspec.json.format(msgspec.json.encode(answers), indent=1) + b"\n")
                target.close()
                os.chmod(target.name, 0o644)
                os.replace(target.name, file)
            except BaseException:
                os.unlink(target.name)
                raise
    except OSError as error:
        raise BadInput(
            f"the known answers cannot be written to {str(file)!r}: {error.strerror}: name another with --answers FILE"
        ) from None


def record(source: ModelSource, on_part: Callable[[int, int], None] = lambda part, parts: None) -> Answers:
    """Compute the answers of ``source``, of which one layer is loaded at a time. ``on_part``: told how many parts of how many there are. Raises :class:`BadInput`."""
    skeleton = source.model(torch.float32, keep=lambda model, module: False)
    parts = len(decoder_layers(skeleton)) + 1
    found: dict[str, Answer] = {}
    for part in range(parts):
        on_part(part, parts)
        found.update(answers_of(source.model(torch.float32, keep=_only(part)), part))
    return Answers(FORMAT, type(skeleton).__name__, found)


def record_whole(model: PreTrainedModel) -> Answers:
    """The same of a model that is here, in float32."""
    found: dict[str, Answer] = {}
    for part in range(len(decoder_layers(model)) + 1):
        found.update(answers_of(model, part))
    return Answers(FORMAT, type(model).__name__, found)


@torch.no_grad()
def answers_of(model: PreTrainedModel, part: int) -> dict[str, Answer]:
    """Of layer number ``part``, or, after the last one, of what is in none; its parameters must be here."""
    layers = decoder_layers(model)
    if part < len(layers):
        name, layer = layers[part]
        return dict([*_linears(layer, f"{name}."), *_whole(model, part, name, layer)])
    embedding = model.get_input_embeddings()
    inside = {module for _, layer in layers for module in layer.modules()}
    found = dict(_linears(model, "", inside))
    for name, module in model.named_modules():
        if module is embedding:
            found[name] = answer_of(nn.functional.embedding(fixed_rows(module.weight.shape[0]), module.weight))  # type: ignore[arg-type, index]
    return found


def _only(part: int) -> Callable[[PreTrainedModel, nn.Module], bool]:
    """A ``keep`` of one layer, or of what is in none."""
    wanted: set[nn.Module] = set()

    def keep(model: PreTrainedModel, module: nn.Module) -> bool:
        layers = decoder_layers(model)
        if not wanted:
            inside = {inner for _, layer in layers for inner in layer.modules()}
            wanted.update(layers[part][1].modules() if part < len(layers) else set(model.modules()) - inside)
        return module in wanted

    return keep


def _linears(root: nn.Module, prefix: str, without: set[nn.Module] = frozenset()) -> Iterator[tuple[str, Answer]]:  # type: ignore[assignment]
    for name, module in root.named_modules():
        if module not in without and is_linear(module):
            x = fixed_input(1, features(module)[0])
            yield f"{prefix}{name}", answer_of(module(x))


def _whole(model: PreTrainedModel, index: int, name: str, layer: nn.Module) -> Iterator[tuple[str, Answer]]:
    """Of a layer and its halves; none of one that cannot be called alone, which is not moved as a whole either."""
    width = model.config.get_text_config().hidden_size
    hidden = fixed_input(1, TOKENS, width)
    halves = halves_of(layer)
    called: list[tuple[str, Callable[[], torch.Tensor]]] = [
        (name, lambda: LayerCall(model, index, layer)(hidden, fixed_positions(), fixed_mask(torch.float32)))
    ]
    if halves is not None:
        attention, feed_forward = layer.get_submodule(halves.attention), layer.get_submodule(halves.feed_forward)
        called += [
            (
                f"{name}.{halves.attention}",
                lambda: LayerCall(model, index, attention)(hidden, fixed_positions(), fixed_mask(torch.float32)),
            ),
            (f"{name}.{halves.feed_forward}", lambda: first_of(feed_forward(hidden))),
        ]
    for what, call in called:
        try:
            output = call()
        except Exception as error:  # of a model's own code: such a layer is refused at splits that move it
            log.debug("no known answer of %s: %s", what, error)
            continue
        if isinstance(output, torch.Tensor):
            yield what, answer_of(output)


def _signs(count: int) -> torch.Tensor:
    """1 and -1, the same on every machine."""
    bits = (torch.arange(1, count + 1) * 2654435761).bitwise_right_shift(16) & 1
    return bits.to(torch.float64) * 2 - 1
