"""The boundary to cuda-bindings, with a module in its place: what is asked, and that refusals are cleared."""

from __future__ import annotations

import ctypes
import enum
import sys
import types

import pytest
import torch

from shmbroker.arena.cuda_runtime import CudaRuntime
from shmbroker.errors import CudaRefused


class Error(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorNotSupported = 801


class Handle:
    def __init__(self) -> None:
        self.reserved = ctypes.create_string_buffer(64)

    def getPtr(self) -> int:
        return ctypes.addressof(self.reserved)


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Answers as cuda-bindings does: a tuple that begins with the error."""
    asked: list[tuple[object, ...]] = []
    answers = types.SimpleNamespace(error=Error.cudaSuccess, asked=asked)
    module = types.ModuleType("cuda.bindings.runtime")

    def function(name: str, *results: object) -> None:
        def ask(*arguments: object) -> tuple[object, ...]:
            asked.append((name, *arguments))
            return (answers.error, *(results if not answers.error else [None] * len(results)))

        setattr(module, name, ask)

    exported = Handle()
    exported.reserved.raw = bytes(range(64))
    for name in ("cudaSetDevice", "cudaGetLastError", "cudaHostRegister", "cudaHostUnregister", "cudaFree", "cudaIpcCloseMemHandle"):
        function(name)
    function("cudaMalloc", 4096)
    function("cudaIpcGetMemHandle", exported)
    function("cudaIpcOpenMemHandle", 8192)
    module.cudaIpcMemHandle_t = Handle  # type: ignore[attr-defined]
    for parent in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", module)
    return answers


def test_every_function_is_asked_on_its_device(bindings: types.SimpleNamespace) -> None:
    cuda = CudaRuntime(3)
    cuda.register(4096, 10)
    assert cuda.allocate(100) == 4096
    assert bindings.asked == [("cudaSetDevice", 3), ("cudaHostRegister", 4096, 10, 1), ("cudaSetDevice", 3), ("cudaMalloc", 100)]


def test_a_handle_crosses_as_its_bytes(bindings: types.SimpleNamespace) -> None:
    cuda = CudaRuntime(0)
    handle = cuda.export(4096)
    assert handle == bytes(range(64))
    assert cuda.open(handle) == 8192
    name, told, flags = bindings.asked[-1]
    assert (name, told.reserved.raw, flags) == ("cudaIpcOpenMemHandle", handle, 1)
    with pytest.raises(CudaRefused, match="64 bytes, not 3"):
        cuda.open(b"abc")


def test_a_refusal_tells_its_code_and_is_cleared(bindings: types.SimpleNamespace) -> None:
    bindings.error = Error.cudaErrorNotSupported
    with pytest.raises(CudaRefused, match=r"cudaHostRegister: cudaErrorNotSupported \(801\)") as caught:
        CudaRuntime(0).register(4096, 10)
    assert caught.value.code == 801
    assert bindings.asked[-1] == ("cudaGetLastError",)


def test_without_cuda_bindings_it_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(CudaRefused, match=r"pip install 'shmbroker\[cuda\]'"):
        CudaRuntime(0)


def test_memory_is_taken_over_where_it_lies_or_not_at_all(bindings: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    there = torch.arange(10, dtype=torch.uint8)
    asked = []

    def as_tensor(memory: object, device: torch.device) -> torch.Tensor:
        asked.append(device)
        return there

    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    cuda = CudaRuntime(3)
    flat, _ = cuda.tensor(there.data_ptr(), 10, None)
    assert flat is there
    assert asked == [torch.device("cuda", 3)]
    with pytest.raises(CudaRefused, match="taken over as a copy, not as it is on cuda:3"):
        cuda.tensor(there.data_ptr() + 4096, 10, None)
