"""``replay``: the transport of the prototype's prefill, Llama-3.2-1B, 1024 tokens, float32: 98 calls, 3328 MiB out and 3656.5 MiB back.

Three readings of the same calls, and the same 98 calls as msgpack bytes over ZeroMQ:

hand-over           producers write in place: only placing, describing, signalling and viewing is left
one copy each way   inputs lie outside the arena and are copied in; results lie outside and are copied out by the worker
touched             every byte of every tensor is written by its producer and read by its consumer, and checksums are compared
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch

import shmbroker
from benchmarks import echo
from benchmarks.contenders import missing, peer
from benchmarks.table import Table
from shmbroker import TensorSpec
from shmbroker.call.remote_op import RemoteOp
from shmbroker.client.channel import Channel
from shmbroker.settings.sizes import MIB

LAYERS, TOKENS, HIDDEN, HEADS, HEAD, INTERMEDIATE, KEYS, VOCABULARY = 16, 1024, 2048, 32, 64, 8192, 512, 128256


@dataclass(frozen=True, slots=True)
class Shape:
    """One call's tensors, float32 (token ids: int64)."""

    name: str
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]


def calls(scale: int = 1) -> list[Shape]:
    """The 98 calls in order; ``scale`` divides tokens and vocabulary for a quick run."""
    t = TOKENS // scale
    vocabulary = VOCABULARY // scale
    layer = [
        Shape("q, k, v", ((1, t, HIDDEN),), ((1, t, HIDDEN), (1, t, KEYS), (1, t, KEYS))),
        Shape("Q @ K^T", ((1, HEADS, t, HEAD), (1, HEADS, HEAD, t)), ((1, HEADS, t, t),)),
        Shape("attention @ V", ((1, HEADS, t, t), (1, HEADS, t, HEAD)), ((1, HEADS, t, HEAD),)),
        Shape("o", ((1, t, HIDDEN),), ((1, t, HIDDEN),)),
        Shape("gate, up", ((1, t, HIDDEN),), ((1, t, INTERMEDIATE), (1, t, INTERMEDIATE))),
        Shape("down", ((1, t, INTERMEDIATE),), ((1, t, HIDDEN),)),
    ]
    return [
        Shape("embed", ((1, t * 2),), ((1, t, HIDDEN),)),  # int64 ids: two float32 each
        *layer * LAYERS,
        Shape("lm_head", ((1, 1, HIDDEN),), ((1, 1, vocabulary),)),
    ]


def nbytes(shapes: tuple[tuple[int, ...], ...]) -> int:
    """Of float32 tensors."""
    return sum(TensorSpec(shape, torch.float32).nbytes for shape in shapes)


def transposed(shape: Shape) -> bool:
    """Whether the second input is a transposed view, as K^T is."""
    return shape.name == "Q @ K^T"


class Runner:
    """The 98 calls over one channel, in the three readings."""

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
            equal += checksum.item() == sum(echo.checksum_of(tensor) for tensor in inputs)
            for output in outputs:
                expected = torch.tensor(float(number % 7)).view(torch.int32).item() * output.numel()
                equal += echo.checksum_of(output) == expected
        return compared, equal


def run(seconds: float = 2.0, scale: int = 1, *, msgpack: bool = True) -> dict[str, Any]:
    """Measure; ``scale`` divides the tokens. Times in milliseconds for all 98 calls."""
    shapes = calls(scale)
    sent, received = sum(nbytes(s.inputs) for s in shapes), sum(nbytes(s.outputs) for s in shapes)
    largest = max(nbytes((one,)) for shape in shapes for one in (*shape.inputs, *shape.outputs))
    print(f"{len(shapes)} calls, {sent / MIB:.1f} MiB out, {received / MIB:.1f} MiB back")
    result: dict[str, Any] = {"calls": len(shapes), "sent_bytes": sent, "received_bytes": received}
    with contextlib.ExitStack() as stack:
        stack.enter_context(shmbroker.local_broker())
        stack.enter_context(peer("shmbroker", "50e-6", elsewhere=largest // 4))
        client = stack.enter_context(shmbroker.connect(arena=12 * largest + (64 << 20)))
        runner = Runner(client, client.channel("echo"), shapes)
        runner.prepare_bare_copies()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # both sides copy with one thread, so that they can be compared
        runner.hand_over()
        hand_over = _times(runner.hand_over, seconds, 20)
        runner.capture()
        captured = _times(runner.hand_over_captured, seconds, 20)
        runner.release()
        pairs = [(_time(runner.one_copy), _time(runner.bare_copies)) for _ in range(7 if scale == 1 else 3)]
        result["touched_compared"], result["touched_equal"] = runner.touched()
        torch.set_num_threads(threads)
        del runner
    result["hand_over_ms"] = statistics.median(hand_over)
    result["hand_over_best_ms"] = min(hand_over)
    result["hand_over_captured_ms"] = statistics.median(captured)
    result["one_copy_ms"], result["bare_copies_ms"] = (statistics.median(column) for column in zip(*pairs, strict=True))
    if msgpack and missing("msgpack") is None:
        result["msgpack_ms"] = _msgpack(shapes)
    _show(result)
    return result


def _msgpack(shapes: list[Shape]) -> float:
    """The same calls the prototype's way, once: it takes most of a minute."""
    import msgpack
    import zmq

    with tempfile.TemporaryDirectory() as folder, peer("msgpack", f"ipc://{folder}/s"), zmq.Context() as context:
        socket = context.socket(zmq.REQ)
        socket.connect(f"ipc://{folder}/s")
        kinds = {shape.name: [torch.ones(size) for size in shape.inputs] for shape in shapes}

        def go() -> None:
            for shape in shapes:
                tensors = [tensor.numpy().tobytes() for tensor in kinds[shape.name]]
                socket.send(msgpack.packb({"tensors": tensors, "answer": [nbytes((output,)) for output in shape.outputs]}))
                for data in msgpack.unpackb(socket.recv())["tensors"]:
                    torch.frombuffer(bytearray(data), dtype=torch.float32)

        elapsed = _time(go)
        socket.send(msgpack.packb({}))
        socket.close()
    return elapsed


def _time(action: Any) -> float:
    begun = time.perf_counter()
    action()
    return (time.perf_counter() - begun) * 1e3


def _times(action: Any, seconds: float, at_least: int) -> list[float]:
    times: list[float] = []
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds or len(times) < at_least:
        times.append(_time(action))
    return times


def _show(result: dict[str, Any]) -> None:
    table = Table("transport of the whole prefill", ["", "ms", "compared with"])
    table.row("hand-over", f"{result['hand_over_ms']:.3f}", f"best {result['hand_over_best_ms']:.3f}")
    table.row("  captured and replayed", f"{result['hand_over_captured_ms']:.3f}", "")
    ratio = result["one_copy_ms"] / result["bare_copies_ms"]
    table.row("one copy each way", f"{result['one_copy_ms']:.1f}", f"{ratio:.2f} x the bare copies")
    table.row("  the bare copies", f"{result['bare_copies_ms']:.1f}", "")
    if "msgpack_ms" in result:
        times, captured = (result["msgpack_ms"] / result[key] for key in ("hand_over_ms", "hand_over_captured_ms"))
        table.row("msgpack over ZeroMQ", f"{result['msgpack_ms']:.0f}", f"{times:,.0f} x hand-over, {captured:,.0f} x captured")
    table.show()
    print(f"touched: {result['touched_equal']} of {result['touched_compared']} checksums equal")
