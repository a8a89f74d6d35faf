from collections.abc import Callable as AnyCallable
from collections.abc import Iterator
from typing import Any

import torch

from shmbroker.arena.arena import Arena
from shmbroker.call.completions import CompletionLoop, Waitable
from shmbroker.call.plan import Plan
from shmbroker.call.python_records import CallRecord as CallRecord
from shmbroker.call.python_records import Counters as Counters
from shmbroker.call.queue_pair import QueuePair
from shmbroker.lane.python_ends import CompletionReceiver, SubmissionSender
from shmbroker.lane.shm_lane import ShmClientLane

class Ends:
    def __init__(self, sender: SubmissionSender, receiver: CompletionReceiver) -> None: ...
    def close(self) -> None: ...

class FastPath:
    @property
    def made(self) -> int: ...
    def __init__(
        self,
        *,
        pair: QueuePair,
        loop: CompletionLoop,
        arena: Arena,
        statistics: Counters,
        lane: ShmClientLane,
        is_led: AnyCallable[[], bool],
        call_ids: Iterator[int],
        followers: list[Waitable],
        ends: object,
        address: int,
        nbytes: int,
        limit_ns: int,
        look_ns: int,
        in_place: bool,
    ) -> None: ...
    def learn(self, plan: Plan, inputs: tuple[torch.Tensor, ...]) -> None: ...

class Capture:
    def __init__(
        self,
        *,
        path: FastPath,
        plan: Plan,
        inputs: tuple[torch.Tensor, ...],
        outputs: tuple[torch.Tensor, ...],
        offsets: list[int],
        generations: list[int],
        holds: object,
        handed: tuple[tuple[torch.Tensor, int], ...],
        written: tuple[tuple[torch.Tensor, int], ...],
    ) -> None: ...

class Callable: ...
class Replayable: ...

def set_up(**objects: Any) -> None: ...
