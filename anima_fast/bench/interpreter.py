"""Triton's interpreter with a card's 16-bit arithmetic: kernels run on the CPU, for their values.

`TRITON_INTERPRET=1` must be set before triton is imported; `start` does both. Upstream holds
bfloat16 as raw 16-bit integers, so arithmetic on it returns nonsense without an error, and the cast
from float32 truncates. Here operands of a dot are widened, the cast rounds as torch does, and other
arithmetic on bfloat16 raises: kernels convert in the line that loads.

A dot with a float16 result is one chain of instructions, each of which adds 16 products to a sum of
float16. Upstream leaves its rounding to numpy; here `create_dot` rounds where the instruction does
(`half_dot`).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import numpy as np

from anima_fast.errors import UserError


def start() -> None:
    """Make every kernel that is imported from now on run interpreted.

    Raises `UserError` when triton was imported before without the interpreter.
    """
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(
            "Triton is loaded already: set TRITON_INTERPRET=1 before starting, so that kernels "
            "run on the CPU"
        )
    os.environ["TRITON_INTERPRET"] = "1"
    _patch()


def interpreting() -> bool:
    """Whether kernels run interpreted."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# Terms between two roundings of a float16 sum, and whether they go to the nearest or to zero. The
# literature on tensor cores has these; `half_sums` changes them.
_terms, _to_zero = 16, False


@contextlib.contextmanager
def half_sums(terms: int, *, to_zero: bool = False) -> Iterator[None]:
    """Inside the block a card is emulated that rounds float16 sums every `terms` terms, to the
    nearest or to zero."""
    global _terms, _to_zero
    before, (_terms, _to_zero) = (_terms, _to_zero), (terms, to_zero)
    try:
        yield
    finally:
        _terms, _to_zero = before


def half_dot(a: np.ndarray, b: np.ndarray, acc: np.ndarray) -> np.ndarray:
    """acc [..., M, N] + a [..., M, K] b [..., K, N], as one chain of float16 instructions.

    Products of float16 are exact in float32, and the sum of so few is as good as exact.
    """
    a, b = a.astype(np.float32), b.astype(np.float32)
    for start in range(0, a.shape[-1], _terms):
        step = slice(start, start + _terms)
        acc = _half(acc + a[..., step] @ b[..., step, :])
    return acc


def _half(x: np.ndarray) -> np.ndarray:
    """float32 as float16, rounded as `half_sums` says."""
    with np.errstate(over="ignore"):
        near = x.astype(np.float16)
    if not _to_zero:
        return near
    # What the nearest rounds up goes back by one; what overflows stops at the largest.
    beyond = np.abs(near.astype(np.float32)) > np.abs(x)
    return np.where(beyond, np.nextafter(near, np.float16(0)), near)


def _patch() -> None:
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "rounds_bfloat16", False):
        return
    builder.rounds_bfloat16 = True
    dot, binary, convert = builder.create_dot, builder.binary_op, interpreter._convert_float

    def is_bfloat16(handle) -> bool:
        return handle.dtype.scalar == tl.bfloat16

    def widened(handle):
        if not is_bfloat16(handle):
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def rounding_convert(data, source, target, rounding):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, rounding)
        rounded = torch.from_numpy(np.ascontiguousarray(data)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)

    def checked_binary(self, a, b, operation):
        if is_bfloat16(a) or is_bfloat16(b):
            raise TypeError("bfloat16 arithmetic in a kernel: convert to float32 when loading")
        return binary(self, a, b, operation)

    def rounding_dot(self, a, b, acc, *rest):
        if acc.dtype.scalar == tl.float16:
            return interpreter.TensorHandle(half_dot(a.data, b.data, acc.data), tl.float16)
        return dot(self, widened(a), widened(b), acc, *rest)

    builder.create_dot = rounding_dot
    builder.binary_op = checked_binary
    interpreter._convert_float = rounding_convert
