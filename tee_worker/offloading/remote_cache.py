"""Cache layers whose keys and values are elsewhere: what is here only counts them."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from shmbroker.errors import BadInput

ON_THE_WORKER = (
    "at splits 'block' and 'layer' the keys and values are on the GPU worker: beam search, contrastive search and assisted generation, which reorder "
    "or cut them, need split 'op', 'fused' or 'linear'"
)
IN_MICRO_BATCHES = (
    "with --pipeline and several sequences the keys and values are kept by micro-batch: beam search, contrastive search and assisted generation, which "
    "reorder or cut them, need --pipeline 1"
)


class Counted(DynamicLayer):  # type: ignore[no-untyped-call]
    """A cache layer whose keys and values are elsewhere: it knows how many there are."""

    def __init__(self, refusal: str, length: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.refusal = refusal
        self.length = length

    def get_seq_length(self) -> int:
        """Tokens that are kept elsewhere."""
        return self.length

    def wait(self) -> None:
        """Until what is before this part of a pass has been counted."""

    def count(self, tokens: int) -> None:
        """So many more tokens were seen."""
        self.length += tokens

    def _refuse(self, *args: object, **kwargs: object) -> Any:
        raise BadInput(self.refusal)

    update = reorder_cache = crop = batch_repeat_interleave = batch_select_indices = reset = _refuse


class CountedWindow(Counted, DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """The same of a layer with a sliding window, whose masks are cut by it."""

    def __init__(self, refusal: str, window: int, length: int = 0) -> None:
        DynamicSlidingWindowLayer.__init__(self, window)
        self.refusal = refusal
        self.length = self.cumulative_length = length

    def count(self, tokens: int) -> None:
        """So many more tokens were seen."""
        self.length += tokens
        self.cumulative_length = self.length

    get_mask_sizes = DynamicSlidingWindowLayer.get_mask_sizes


def counted(like: Any, refusal: str) -> Counted:
    """A counting layer in the place of ``like``."""
    if isinstance(like, DynamicSlidingWindowLayer):
        return CountedWindow(refusal, int(like.sliding_window))
    return Counted(refusal)
