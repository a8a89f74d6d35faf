"""Tensors of other libraries: whatever offers DLPack comes in, what lies in the arena is known there, and results go out and keep their blocks."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.dlpack

import shmbroker
from shmbroker import TensorSpec
from shmbroker.client.channel import Channel


def same(x: TensorSpec) -> TensorSpec:
    return x


class Exported:
    """What offers DLPack and nothing else. ``error``: what it raises when it is asked."""

    def __init__(self, tensor: torch.Tensor, error: Exception | None = None) -> None:
        self._tensor = tensor
        self._error = error

    def __dlpack__(self, **options: Any) -> object:
        if self._error is not None:
            raise self._error
        return self._tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[Any, int]:
        return self._tensor.__dlpack_device__()


class Array(Exported):
    """That NumPy can make an array of too."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return self._tensor.numpy()


def test_what_offers_dlpack_alone_arrives_with_its_values(client: shmbroker.Client, channel: Channel) -> None:
    bound = channel.bind("contiguous", out_spec=same)
    for tensor in (torch.randn(3, 5), torch.arange(6).view(2, 3).t(), torch.randn(4, dtype=torch.float64)[::2], torch.ones(0, 3)):
        assert torch.equal(bound(Exported(tensor)), tensor)  # type: ignore[arg-type]
        assert torch.equal(client.copy_in(Exported(tensor)), tensor)  # type: ignore[arg-type]


def test_what_lies_in_the_arena_is_not_copied_whichever_library_has_it(client: shmbroker.Client, channel: Channel) -> None:
    bound = channel.bind("contiguous", out_spec=same)
    block = client.empty((4, 6)).copy_(torch.arange(24).view(4, 6))
    for view in (block.numpy(), block.numpy()[1:, 2:], np.from_dlpack(block), Exported(block[1]), Exported(block.t()), Array(block)):
        assert client.holds(view)
        expected = torch.utils.dlpack.from_dlpack(view)
        assert torch.equal(bound(view), expected)  # type: ignore[arg-type]
    assert channel.report().total.copied_bytes == 0


@pytest.mark.parametrize(
    "other",
    [
        np.zeros(3),
        np.zeros(3)[::-1],
        Exported(torch.ones(2)),
        Exported(torch.ones(2), ValueError("no")),
        np.array(["a"]),
        None,
        "word",
        3.0,
        object(),
    ],
    ids=lambda other: type(other).__name__,
)
def test_what_does_not_lie_there_is_not_held(client: shmbroker.Client, other: object) -> None:
    assert not client.holds(other)


def test_a_library_that_refuses_is_told_by_its_own_words(client: shmbroker.Client) -> None:
    with pytest.raises(shmbroker.BadInput, match=r"an? Exported cannot be handed over by DLPack: BufferError: it is busy"):
        client.copy_in(Exported(torch.ones(2), BufferError("it is busy")))  # type: ignore[arg-type]
    assert torch.equal(client.copy_in(Array(torch.ones(2), BufferError("it is busy"))), torch.ones(2))  # type: ignore[arg-type]
    with pytest.raises(shmbroker.BadInput, match=r"float8_e4m3fn.* cannot be handed over|cannot be handed over by DLPack"):
        client.copy_in(Exported(torch.ones(2).to(torch.float8_e4m3fnuz)))  # type: ignore[arg-type]


def test_an_op_that_works_in_place_does_not_write_into_what_is_no_tensor(channel: Channel) -> None:
    with pytest.raises(shmbroker.BadInput, match="input 0 is a Exported: give a torch tensor"):
        channel.bind("relu_")(Exported(torch.ones(2)))  # type: ignore[arg-type]


def test_results_go_out_by_dlpack_and_keep_their_blocks(client: shmbroker.Client, channel: Channel) -> None:
    bound = channel.bind("contiguous", out_spec=same)
    gone = np.from_dlpack(bound(torch.full((1000,), 3.0)))
    for _ in range(5):
        gc.collect()
        bound(torch.zeros(1000))
    assert (gone == 3.0).all()
    assert client.holds(gone)
