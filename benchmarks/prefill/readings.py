"""The prefill's calls over one channel, in three readings.

hand-over           producers write in place: only placing, describing, signalling and viewing is left
one copy each way   inputs lie outside the arena and are copied in; results lie outside and are copied out by the worker
touched             every byte of every tensor is written by its producer and read by its consumer, and checksums are compared
"""

from __future__ import annotations

import torch

import shmbroker
from benchmarks.prefill.calls import Shape, transposed
from benchmarks.prefill.worker import checksum_of
from shmbroker import TensorSpec
from shmbroker.call.remote_op import RemoteOp
from shmbroker.client.channel import Channel


class Readings:
    """The readings of a list of calls, over one channel."""

    def __init__(self, client: shmbroker.Client, channel: Channel, shapes: list[Shape]) -> None:
        self._client = client
        self._shapes = shapes
        kinds = {shape.name: shape for shape in shapes}
        self._replay = {name: self._bind(channel, "replay", shape) for name, shape in kinds.items()}
        self._copied = {name: self._bind(channel, "copied", shape) for name, shape in kinds.items()}
        self._channel = channel
        # Producers write in place, so their tensors are there before the clock starts: one set, used by every layer.
        self._inside = {name: [self._input(shape, i) for i in range(len(shape.inputs))] for name, shape in kinds.items()}
        self._outside = {name: [torch.ones(shape_) for shape_ in shape.inputs] for name, shape in kinds.items()}

    @staticmethod
    def _bind(channel: Channel, op: str, shape: Shape) -> RemoteOp:
        specs = [TensorSpec(output, torch.float32) for output in shape.outputs]
        return channel.bind(op, out_spec=lambda *inputs, shapes: specs, shapes=[list(output) for output in shape.outputs])

    def _input(self, shape: Shape, index: int) -> torch.Tensor:
        size = shape.inputs[index]
        if index == 1 and transposed(shape):
            *batch, rows, columns = size
            return self._client.empty((*batch, columns, rows)).fill_(1.0).transpose(-1, -2)
        return self._client.empty(size).fill_(1.0)

    def hand_over(self) -> None:
        """All 98 calls, nothing written."""
        for shape in self._shapes:
            self._replay[shape.name](*self._inside[shape.name])

    def capture(self) -> None:
        """Place every kind of call once, for :meth:`hand_over_captured`: each layer uses the blocks of the one before."""
        self._captured = {name: op.capture(*self._inside[name]) for name, op in self._replay.items()}

    def release(self) -> None:
        """Give the blocks of :meth:`capture` back."""
        self._captured.clear()

    def hand_over_captured(self) -> None:
        """All 98 calls, nothing written, nothing placed."""
        for shape in self._shapes:
            self._captured[shape.name].replay()

    def one_copy(self) -> None:
        """All 98 calls, each tensor copied once."""
        for shape in self._shapes:
            self._copied[shape.name](*self._outside[shape.name])

    def bare_copies(self) -> None:
        """The copies of :meth:`one_copy` alone, by this process, between ordinary tensors."""
        for shape in self._shapes:
            for source, target in zip(self._outside[shape.name], self._room[shape.name], strict=False):
                target.copy_(source)
            for target in self._room[shape.name][len(shape.inputs) :]:
                target.view(-1).copy_(self._elsewhere[: target.numel()])

    def prepare_bare_copies(self) -> None:
        """Touch what :meth:`bare_copies` needs, once."""
        kinds = {shape.name: shape for shape in self._shapes}
        self._room = {name: [torch.ones(s) for s in (*shape.inputs, *shape.outputs)] for name, shape in kinds.items()}
        self._elsewhere = torch.ones(max(TensorSpec(s, torch.float32).numel for shape in self._shapes for s in shape.outputs))

    def touched(self) -> tuple[int, int]:
        """All 98 calls with every byte written and read; returns how many checksums were compared and how many were equal."""
        compared = equal = 0
        for number, shape in enumerate(self._shapes):
            inputs = [self._input(shape, i) for i in range(len(shape.inputs))]
            for tensor in inputs:
                tensor.fill_(float(number + 1))
            specs = [*(TensorSpec(output, torch.float32) for output in shape.outputs), TensorSpec((), torch.float64)]
            op = self._channel.bind(
                "touched", out_spec=lambda *i, shapes, number, specs=specs: specs, shapes=[list(o) for o in shape.outputs], number=number
            )
            *outputs, checksum = op(*inputs)
            compared += 1 + len(outputs)
            equal += checksum.item() == sum(checksum_of(tensor) for tensor in inputs)
            for output in outputs:
                expected = torch.tensor(float(number % 7)).view(torch.int32).item() * output.numel()
                equal += checksum_of(output) == expected
        return compared, equal
