"""The log probabilities of a prompt's own tokens, for requests that want them back with it (``echo`` with ``logprobs``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tee_worker.serving.chosen import Chosen
from tee_worker.serving.sampling import told

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_ROWS = 256
"""Of logits at a time."""


@torch.inference_mode()
def prompt_logprobs(model: PreTrainedModel, ids: Sequence[int], count: int, max_context: int) -> list[Chosen]:
    """Of each token but the first, given those before it; ``count``: so many likeliest beside it. ``max_context``: that there is memory for."""
    from transformers import DynamicCache

    config = model.config.get_text_config()
    # Logits for several rows must fit where the activations of the longest prompt do.
    rows = max(1, min(MOST_ROWS, max_context * config.hidden_size // config.vocab_size))
    cache = DynamicCache(config=model.config)
    found: list[Chosen] = []
    for first in range(0, len(ids) - 1, rows):
        given = torch.tensor([list(ids[first : min(first + rows, len(ids) - 1)])])
        logits = model(input_ids=given, past_key_values=cache, use_cache=True).logits[0].float()
        found.extend(told(logits[place], ids[first + place + 1], count) for place in range(given.shape[1]))
    return found
