"""Ops whose ordinary calls and replays are made without Python, where the compiled calls are there and a channel is such that they can be.

What is ordinary is told in ``_calls.c``; whatever else is called is called as in :mod:`shmbroker.call.remote_op`, whose classes these are.

O1  A call that is not ordinary is left to Python, and nothing of it was done: no block is taken, no frame is written.
O2  An ordinary call is outstanding from before its frame can be seen until it is answered, as any call is, with the holds of its blocks.
O3  What comes of an ordinary call, and what is counted of it, is what comes of the same call in Python.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from shmbroker.arena.arena import Arena
from shmbroker.arena.ring import Extent, RingAllocator
from shmbroker.arena.room import Room
from shmbroker.call.call import Call, Result
from shmbroker.call.captured_call import CapturedCall
from shmbroker.call.completions import CompletionLoop
from shmbroker.call.plain_tensors import is_transformed, levels
from shmbroker.call.plan import Plan
from shmbroker.call.queue_pair import QueuePair
from shmbroker.call.records import CALLS_COMPILED
from shmbroker.call.remote_op import RemoteOp
from shmbroker.call.state import DONE, OUTSTANDING
from shmbroker.call.statistics import OpStatistics
from shmbroker.lane.frames import FrameTemplate
from shmbroker.lane.shm_lane import ShmClientLane


def _wait(pair: QueuePair, call: Call) -> Result:
    """The result of a call that is not answered at once."""
    pair.wait(call)
    return call.result()


COMPILED = False
"""Whether ordinary calls are made without Python: where torch exchanges tensors by C functions, and all compiled parts are there."""

if CALLS_COMPILED or TYPE_CHECKING:
    from shmbroker.arena import _leases
    from shmbroker.call import _calls
    from shmbroker.lane import _ends

    try:
        _calls.set_up(
            Arena=Arena,
            Call=Call,
            CapturedCall=CapturedCall,
            CompletionLoop=CompletionLoop,
            CompletionReceiver=_ends.CompletionReceiver,
            DONE=DONE,
            Extent=Extent,
            FrameTemplate=FrameTemplate,
            Leases=_leases.Leases,
            OUTSTANDING=OUTSTANDING,
            OpStatistics=OpStatistics,
            Plan=Plan,
            QueuePair=QueuePair,
            RemoteOp=RemoteOp,
            RingAllocator=RingAllocator,
            Room=Room,
            SubmissionSender=_ends.SubmissionSender,
            Tensor=torch.Tensor,
            check_written=CapturedCall._check_written,
            is_transformed=is_transformed,
            levels=vars(levels),
            op_call=RemoteOp.__call__,
            replay=CapturedCall.replay,
            wait=_wait,
        )
        COMPILED = True
    except (AttributeError, TypeError):
        pass  # a torch that has no exchange of tensors, or another one


if COMPILED or TYPE_CHECKING:

    class CompiledCapturedCall(_calls.Replayable, CapturedCall):
        """A :class:`CapturedCall` whose ordinary replays are compiled."""

        __slots__ = ()

    class CompiledOp(_calls.Callable, RemoteOp):
        """A :class:`RemoteOp` whose ordinary calls are compiled."""

        __slots__ = ("_path",)

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            pair, loop = self._pair, self._pair.completions
            lane = pair.lane
            assert isinstance(lane, ShmClientLane)
            if pair.fast_ends is None:
                pair.fast_ends = _calls.Ends(*lane.ends)
            self.fast = self._path = _calls.FastPath(
                pair=pair,
                loop=loop,
                arena=self._arena,
                statistics=self._statistics,
                lane=lane,
                is_led=loop.is_led,
                call_ids=pair.call_ids,
                followers=loop.followers,
                ends=pair.fast_ends,
                address=self._arena.address,
                nbytes=self._arena.end,
                limit_ns=self._limit_ns(self._default_timeout),
                look_ns=int(loop.look_seconds * 1e9),
                in_place=self.in_place,
            )

        def _captured(self, call: Call, offsets: list[int], generations: list[int]) -> CapturedCall:
            captured = CompiledCapturedCall(self, call, offsets, generations)
            plan = call.plan
            if plan.before is None and not plan.output_space and len(captured._handed) == len(captured.inputs):
                captured.fast = _calls.Capture(
                    path=self._path,
                    plan=plan,
                    inputs=captured.inputs,
                    outputs=captured.outputs,
                    offsets=offsets,
                    generations=generations,
                    holds=call.holds,
                    handed=captured._handed,
                    written=captured._written,
                )
            return captured


def op_class(pair: QueuePair) -> type[RemoteOp]:
    """Of the ops that are bound on a channel."""
    # With room for one call alone, one that Python is about to submit would be one too many.
    if COMPILED and type(pair) is QueuePair and type(pair.lane) is ShmClientLane and pair.lane.depth > 1:
        return CompiledOp
    return RemoteOp
