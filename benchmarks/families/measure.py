"""One family at every split, against the model in one process."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import shmbroker
from benchmarks.families.tiny import served, tiny_family, whole_model
from shmbroker.models import Checkpoint
from tee_worker import Split, offload
from tee_worker.planning.own_part import own_part

IDS = torch.tensor([[5, 17, 3, 88, 41, 2, 60, 9, 33]])
NEW_TOKENS = 5

TOLERANCE = 1e-5
"""Of the largest logit: float32 sums in another order."""

EQUAL = "equal"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one family."""

    family: str
    kind: str
    """The class of the model."""
    splits: dict[str, str]
    """By split: equal, the words of the refusal, or what is wrong."""

    @property
    def wrong(self) -> dict[str, str]:
        """Splits that gave another number or an error that is no refusal."""
        return {split: told for split, told in self.splits.items() if not clear(told)}


def clear(told: str) -> bool:
    """Whether what came of something is that it is equal, or a refusal."""
    return told == EQUAL or told.startswith("refused: ")


def measure(client: shmbroker.Client, family: str, changes: dict[str, Any]) -> Outcome:
    """Generate at every split: with this side's own part loaded, and with the whole model moved apart, which is checked."""
    with tempfile.TemporaryDirectory() as name, quiet():
        folder = tiny_family(Path(name), family, **changes)
        whole = whole_model(folder)
        expected = generated(whole)
        splits = {}
        with served(folder, family):
            for split in Split:
                told = {_try(client, family, folder, split, own=own, expected=expected) for own in (True, False)}
                splits[split.value] = told.pop() if len(told) == 1 else "differs by how it is loaded: " + "; ".join(sorted(told))
    return Outcome(family, type(whole).__name__, splits)


def generated(model: PreTrainedModel) -> torch.Tensor:
    """The logits of a greedy generation, a row for each new token."""
    with torch.inference_mode():
        output = model.generate(  # type: ignore[operator]
            IDS,
            attention_mask=torch.ones_like(IDS),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return torch.stack(output.logits).float()


def _try(client: shmbroker.Client, family: str, folder: Path, split: Split, *, own: bool, expected: torch.Tensor) -> str:
    channel = client.channel(family)
    try:
        model = own_part(Checkpoint.at(folder), torch.float32, split) if own else whole_model(folder)
        offload(model, channel, split)
        found = generated(model)
    except shmbroker.ShmBrokerError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        channel.close()
    difference = float((found - expected).abs().max() / expected.abs().max())
    return EQUAL if difference <= TOLERANCE else f"differs by {difference:.2g} of the largest logit"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Warnings of workers and libraries are not for the table."""
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
