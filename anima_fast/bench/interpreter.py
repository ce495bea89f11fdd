"""Triton's interpreter with a correct bfloat16: kernels run on the CPU, for their values.

`TRITON_INTERPRET=1` must be set before triton is imported; `start` does both. Upstream holds
bfloat16 as raw 16-bit integers, so arithmetic on it returns nonsense without an error, and the cast
from float32 truncates. Here operands of a dot are widened, the cast rounds as torch does, and other
arithmetic on bfloat16 raises: kernels convert in the line that loads.
"""

from __future__ import annotations

import os
import sys

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

    builder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    builder.binary_op = checked_binary
    interpreter._convert_float = rounding_convert
