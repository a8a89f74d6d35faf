from collections.abc import Callable
from typing import Any

import torch

from shmbroker.lane.python_ends import CompletionSender, SubmissionReceiver
from shmbroker.worker.python_counters import Counters as Counters

class Watched:
    def __init__(self, tensors: tuple[torch.Tensor, ...], storages: tuple[int, ...]) -> None: ...
    def changed(self) -> bool: ...

class Bound:
    def __init__(self, function: Callable[..., object], arguments: tuple[object, ...], keywords: dict[str, object], /) -> None: ...
    def __call__(self) -> object: ...

class Step:
    def __init__(
        self,
        channel: object,
        counters: Counters,
        receiver: SubmissionReceiver,
        sender: CompletionSender,
        waiting: dict[Any, Any],
        acquire: Callable[[bool], bool],
        release: Callable[[], None],
        give_back: Callable[[], None],
        ended: Callable[..., object],
        failed: Callable[..., object],
        complete: Callable[..., bool],
        overfull: Callable[[], None],
    ) -> None: ...

def know_tensors(tensor: type[torch.Tensor], storage_uses: Callable[[int], int]) -> None: ...
def run(steps: tuple[Step, ...], look_ns: int, most_ns: int) -> int: ...
def set_up(channel: type, prepared: type, receiver: type, sender: type) -> None: ...
