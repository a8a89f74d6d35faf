"""What may be handed over, and asked for, besides tensors of torch with shapes of Python's numbers; and what is refused, in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import shmbroker
from shmbroker import TensorSpec
from shmbroker.client.channel import Channel


def same(x: TensorSpec) -> TensorSpec:
    return x


ARRAYS: dict[str, Callable[[], np.ndarray[Any, Any]]] = {
    "big-endian": lambda: np.arange(6, dtype=">f4").reshape(2, 3),
    "big-endian and strided": lambda: np.arange(12, dtype=">i8").reshape(3, 4)[:, ::2],
    "big-endian complex": lambda: (np.arange(4) * (1 + 2j)).astype(">c16"),
    "reversed": lambda: np.arange(6, dtype=np.int32)[::-1],
    "reversed in one dimension": lambda: np.arange(6, dtype=np.float64).reshape(2, 3)[:, ::-1],
    "reversed and big-endian": lambda: np.arange(5, dtype=">u2")[::-1],
    "a field of records": lambda: np.array([(1, 2.5), (2, 3.5)], dtype=[("a", "i2"), ("b", "f4")])["b"],
    "of uint16": lambda: np.array([0, 1, 65535], dtype=np.uint16),
    "of uint64": lambda: np.array([0, (1 << 64) - 1], dtype=np.uint64),
    "of complex64": lambda: np.array([1 + 2j, -3j], dtype=np.complex64),
    "broadcast": lambda: np.array(np.broadcast_to(np.float32(2.5), (2, 3))),
    "without dimensions": lambda: np.array(7, dtype=np.int64),
    "a scalar": lambda: np.float32(2.5),  # type: ignore[dict-item, return-value]  # it has __array__, as arrays have
    "empty and reversed": lambda: np.zeros((0, 3))[:, ::-1],
}


@pytest.mark.parametrize("make", ARRAYS.values(), ids=ARRAYS)
def test_an_array_of_numpy_arrives_with_its_values_however_they_lie(channel: Channel, make: Callable[[], np.ndarray[Any, Any]]) -> None:
    array = make()
    came = channel.bind("contiguous", out_spec=same)(array)
    assert came.shape == array.shape
    assert came.numpy().dtype == array.dtype.newbyteorder("=")
    assert np.array_equal(came.numpy(), array)
    assert np.array_equal(channel.memory.copy_in(array).numpy(), array)


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (np.array(["a"]), "a NumPy array of <U1 cannot be handed over; carried are: float32, "),
        (np.array([None]), "a NumPy array of object cannot"),
        (np.zeros(2, np.longdouble), "a NumPy array of .* cannot"),
        (np.zeros(2, "M8[s]"), r"a NumPy array of datetime64\[s\] cannot"),
        (np.ma.masked_array([1.0, 2.0], mask=[True, False]), r"its mask would be lost: give array\.filled\(value\)"),
    ],
    ids=["text", "objects", "long double", "times", "masked"],
)
def test_an_array_that_no_frame_carries_is_refused_in_one_line(client: shmbroker.Client, array: object, why: str) -> None:
    with pytest.raises(shmbroker.BadInput, match=why) as caught:
        client.copy_in(array)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_a_conjugate_arrives_as_torch_shows_it_also_where_its_bytes_lie_in_the_arena(channel: Channel, dtype: torch.dtype) -> None:
    """torch only notes that such a tensor is conjugated: its bytes are those of the other."""
    bound = channel.bind("contiguous", out_spec=same)
    plain = channel.memory.empty((2, 2), dtype).copy_(torch.tensor([[1 + 2j, 3 - 4j], [5j, -6 + 0j]]))
    for _ in range(2):  # the second time by the plan of the first
        assert torch.equal(bound(plain), plain)
        assert torch.equal(bound(plain.conj()), plain.conj().resolve_conj())
        assert torch.equal(bound(plain[1].conj()), plain[1].conj().resolve_conj())
        assert torch.equal(bound(plain.mH), plain.mH.resolve_conj())
        assert torch.equal(bound(plain.conj().imag), -plain.imag)
    captured = bound.capture(plain.conj())
    assert torch.equal(captured.replay(), plain.conj().resolve_conj())


@pytest.mark.parametrize("shape", [np.int64(3), (np.int64(3),), [np.int32(3)], np.array([3])], ids=repr)
def test_a_shape_may_be_of_numpys_integers(client: shmbroker.Client, shape: Any) -> None:
    assert client.empty(shape).shape == (3,)


def test_a_tensor_is_placed_where_another_one_lies(client: shmbroker.Client) -> None:
    x = torch.ones(3)
    for device in (x.device, "cpu", "cpu:0", torch.device("cpu", 0)):
        assert client.holds(client.empty(x.shape, x.dtype, device=device))


@pytest.mark.parametrize(
    ("device", "why"),
    [
        ("gpu", "device 'gpu' is not known: give 'cpu', 'cuda' or a torch.device"),
        (0, "device 0 is a int: give 'cpu', 'cuda' or a torch.device"),
        (None, "device None is a NoneType: give"),
        (torch.device("meta"), r"device 'meta': tensors lie on the cpu, or in the device arena \(cuda\)"),
        (torch.device("cuda", 1), r"client\.empty\(device='cuda:1'\) needs memory there: call client\.device_arena\(nbytes\) first"),
    ],
    ids=repr,
)
def test_a_device_that_is_none_of_ours_is_refused(client: shmbroker.Client, device: Any, why: str) -> None:
    with pytest.raises(shmbroker.BadInput, match=why):
        client.empty(3, device=device)


def test_a_dtype_that_is_no_torch_dtype_is_refused_with_the_one_that_is_meant(client: shmbroker.Client) -> None:
    with pytest.raises(shmbroker.BadInput, match=r"^dtype 'float32' is a str: give torch\.float32$"):
        client.empty(3, "float32")  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout", ["3", [3], -1, 0, float("nan")], ids=repr)
def test_a_timeout_that_is_no_positive_number_is_refused_before_anything_is_placed(channel: Channel, timeout: Any) -> None:
    double = channel.bind("double", out_spec=same)
    before = channel.memory.arena.occupancy().placed
    for call in (double, double.submit):
        with pytest.raises(shmbroker.BadInput, match=r"timeout .* must be a positive number of seconds, or None for no limit"):
            call(torch.ones(3), timeout=timeout)
    assert channel.memory.arena.occupancy().placed == before
    assert double(torch.ones(3), timeout=np.float32(60)).tolist() == [2.0] * 3


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"timeout": "3"}, "timeout '3' must be a positive number of seconds, or None for no limit"),
        ({"place_timeout": "3"}, "place_timeout '3' must be a number of seconds, 0 or more"),
        ({"spin": "0"}, "spin '0' must be a number of seconds, 0 or more"),
        ({"depth": "64"}, "depth '64' must be a whole number"),
        ({"channels": 2.5}, "channels 2.5 must be a whole number"),
        ({"arena": 1.5}, "size 1.5 cannot be read: give a number of bytes, or a text like '512M'"),
    ],
    ids=repr,
)
def test_an_option_of_the_wrong_type_is_refused_with_what_to_give(broker: shmbroker.LocalBroker, options: dict[str, Any], why: str) -> None:
    with pytest.raises(shmbroker.BadInput, match=why):
        broker.connect(**options)


def test_options_may_be_numpys_numbers(broker: shmbroker.LocalBroker) -> None:
    with broker.connect(arena=np.int64(1 << 20), depth=np.int32(8), timeout=np.float32(2)) as client:
        assert client.arena.nbytes == 1 << 20
        with pytest.raises(shmbroker.BadInput, match="wait '1' must be a number of seconds"):
            client.channel("test", wait="1")  # type: ignore[arg-type]
        with pytest.raises(shmbroker.BadInput, match="patience '1' must be a number of seconds"):
            client.failover_channel("test", patience="1")  # type: ignore[arg-type]


def test_the_limits_of_a_frame_stand_in_the_text_that_refuses(channel: Channel) -> None:
    thirteen = [torch.ones(1)] * 13
    for out_spec in (None, lambda *specs: specs[0]):
        bound = channel.bind("double", out_spec=out_spec)
        with pytest.raises(shmbroker.BadInput, match=r"1[34] .*\b12\b"):
            bound(*thirteen)
        with pytest.raises(shmbroker.BadInput, match=r"bytes of .*arguments.*\b128\b"):
            bound(torch.ones(1), text="x" * 200)
    with pytest.raises(shmbroker.BadInput, match=r"\d+ bytes of static arguments; at most 1048576"):
        channel.bind("scale", factor="x" * (1 << 20))


def test_a_full_arena_tells_the_seconds_that_were_really_waited(channel: Channel, client: shmbroker.Client) -> None:
    """Also where a call waited for completions first, which might have let go of a block."""
    held = client.empty(60 << 20, torch.uint8)
    outstanding = channel.bind("sleep", seconds=1.0).submit(torch.ones(1))
    with pytest.raises(shmbroker.ArenaFull, match=r"not enough released within (0\.[4-9]|[1-9]\d*\.)\d* s"):
        channel.bind("double", out_spec=same)(torch.ones(8 << 20, dtype=torch.uint8), timeout=0.4)
    outstanding.result()
    del held
