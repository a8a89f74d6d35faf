"""The hot loops of the trust modes: compiled where they were built and are wanted, else in Python. Both give the same bits.

All tensors are on the CPU, contiguous, and of the dtypes given; the compiled loops run without the interpreter lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch

from shmbroker.memory import compiled
from shmbroker.trust import python_loops
from shmbroker.trust.python_loops import FloatProduct as FloatProduct

KEY_BYTES = 32
NONCE_BYTES = 12

KINDS = ("avx2", "scalar", "python")
"""Ways to run the loops, the fastest first."""

_built: ModuleType | None = None
if compiled.WANTED:
    try:
        from shmbroker.trust import _loops

        _built = _loops
    except ImportError:
        pass

_compiled = _built


def kinds() -> tuple[str, ...]:
    """Those that there are here."""
    if _built is None:
        return KINDS[2:]
    used = kind()
    wide = _built.use_wide(True)
    choose(used)
    return KINDS if wide else KINDS[1:]


def kind() -> str:
    """The one in use."""
    return "python" if _compiled is None else "avx2" if _compiled.uses_wide() else "scalar"


def choose(which: str) -> None:
    """Use one of :func:`kinds` from now on, in this process. For tests and measurements: the fastest is in use already."""
    global _compiled
    _compiled = None if which == "python" else _built
    if _compiled is not None:
        _compiled.use_wide(which == "avx2")


def keystream(key: bytes | memoryview, nonce: bytes, counter: int, out: torch.Tensor) -> None:
    """Fill ``out``, of any dtype, with the key stream of ChaCha20 (RFC 8439) from block ``counter`` on; it must end before block 2^32."""
    if _compiled is None:
        python_loops.keystream(key, nonce, counter, out)
    else:
        _compiled.keystream(key, nonce, counter, _address(out), out.nbytes)


def seal(
    x: torch.Tensor,
    limit: float,
    pads: torch.Tensor | None,
    out: torch.Tensor,
    inputs: torch.Tensor,
    sums: torch.Tensor,
    scales: torch.Tensor,
) -> bool:
    """Rows of floating-point numbers to integers of norm ``limit``, masked; False where a number is not finite: nothing is written then.

    x float32 ``[rows, columns]``; pads int32, as x, zero afterwards, or None; out int32, as x: the integers plus the pads, modulo 2^32; inputs int64
    ``[2, columns]``: the secret S; sums int64 ``[rows, 2]``: the integers times S, modulo 2^64; scales float64 ``[rows]``: an integer is the number times it.
    """
    rows, columns = x.shape
    if _compiled is None:
        return python_loops.seal(x, limit, pads, out, inputs, sums, scales)
    finite: bool = _compiled.seal(
        _address(x), rows, columns, limit, _address(pads), _address(out), _address(inputs), _address(sums), _address(scales)
    )
    return finite


def open_rows(
    shared: torch.Tensor,
    row: torch.Tensor,
    pads: torch.Tensor | None,
    outputs: torch.Tensor,
    expected: torch.Tensor,
    row_scales: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> int:
    """Copy results once, take the pads off, check, and make floating-point numbers of them; the first row that is wrong, or -1.

    shared int32 ``[rows, columns]``, which others may write to; row int32 ``[columns]``: where a row is copied to; pads: as shared, zero afterwards, or None; outputs int32
    ``[2, columns]``: the secret R; expected int64 ``[rows, 2]``: as :func:`seal` gave the sums; row_scales float64 ``[rows]`` and scales float32
    ``[columns]``: of the inputs and the weights; bias float32 ``[columns]`` or None; out float32 ``[rows, columns]``: to be used if no row is wrong.
    """
    rows, columns = out.shape
    if _compiled is None:
        return python_loops.open_rows(shared, pads, outputs, expected, row_scales, scales, bias, out)
    wrong: int = _compiled.open_rows(
        _address(shared),
        _address(row),
        rows,
        columns,
        _address(pads),
        _address(outputs),
        _address(expected),
        _address(row_scales),
        _address(scales),
        _address(bias),
        _address(out),
    )
    return wrong


def product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Rows x int32 ``[rows, in]`` and weight int16 ``[outputs, in]`` to out int32 ``[rows, outputs]``, whose rows may be apart: the products modulo 2^32."""
    if _compiled is None:
        python_loops.product(x, weight, out)
    else:
        _compiled.product(_address(x), x.shape[0], x.shape[1], _address(weight), weight.shape[0], _address(out), out.stride(0))


def residues(x: torch.Tensor, inputs: torch.Tensor, products: Sequence[FloatProduct], factor: float, tolerances: torch.Tensor) -> int:
    """Copy results once and check them approximately; the first row of which one of eight residues is beyond its tolerance, or not a number, or -1; -2 where x is not finite.

    x float32 ``[rows, in]``; inputs float64 ``[in, 8]``: S, of all products together; the tolerance of a row is ``factor`` times its norm; tolerances,
    float64 ``[rows]``, are filled. The order of the additions is not fixed: between the kinds of loops residues differ by rounding.
    """
    if _compiled is None:
        return python_loops.residues(x, inputs, products, factor, tolerances)
    rows, columns = x.shape
    addresses = tuple(
        [(shared.data_ptr(), own.data_ptr(), own.shape[1], vectors.data_ptr(), _address(bias)) for shared, own, vectors, bias in products]
    )
    wrong: int = _compiled.residues(_address(x), rows, columns, _address(inputs), addresses, factor, _address(tolerances))
    return wrong


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
