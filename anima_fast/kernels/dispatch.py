"""Where an op runs, and what all kernels share: buffers, accumulator types, row layouts.

An op runs its Triton kernels on CUDA tensors and its reference elsewhere. `use` overrides that: in
tests, where kernels run in Triton's interpreter, and in compile checks, which launch nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Shared memory a block may use, KiB, by compute capability: CUDA C++ Programming Guide, table
# "Technical Specifications per Compute Capability" (maximum per thread block, opt-in).
SHARED_KIB = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}

_mode = "auto"


@contextlib.contextmanager
def use(mode: str) -> Iterator[None]:
    """Inside the block every op runs as `mode` says: auto, triton or reference.

    Raises `ValueError` for another mode.
    """
    global _mode
    if mode not in ("auto", "triton", "reference"):
        raise ValueError(f"kernel mode {mode!r}, expected auto, triton or reference")
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = before


def runs_triton(x: Tensor) -> bool:
    """Whether an op on `x` launches its Triton kernels."""
    return x.is_cuda if _mode == "auto" else _mode == "triton"


def forced() -> bool:
    """Whether `use` demands Triton, so that no op may prefer a library."""
    return _mode == "triton"


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 when any tensor is, else float32."""
    return torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32


def accumulator(*tensors: Tensor) -> tl.dtype:
    """The type that a kernel over these tensors computes in."""
    return tl.float64 if wide_dtype(*tensors) == torch.float64 else tl.float32


def empty(*shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory for a kernel to write; tests replace it by guarded NaN."""
    return like.new_empty(shape, dtype=dtype)


def dense(*like: Tensor) -> tuple[Tensor, ...]:
    """Dense tensors of these shapes and dtypes: what an operator promises while it is traced."""
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in like)


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉; Triton's own is made for kernels and slow on the host."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least `n`, 1 or more."""
    return 1 << (n - 1).bit_length()


def rows(x: Tensor) -> Tensor:
    """`x` itself when its last dimension is dense, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def row_warps(block: int) -> int:
    """Warps for a program that holds one row of `block` elements: 16 elements a thread."""
    return max(1, min(16, block // 512))


def dot_precision() -> str:
    """How float32 products round: tf32 where torch allows it, else ieee."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def check_dtypes(**tensors: Tensor) -> None:
    """Raise `TypeError` for a tensor that is not fp32, fp16, bf16 (or fp64, for tests)."""
    for name, x in tensors.items():
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} is {x.dtype}, expected float32, float16 or bfloat16")


def check_devices(**tensors: Tensor) -> None:
    """Raise `ValueError` for tensors on different devices."""
    places = {name: x.device for name, x in tensors.items()}
    if len(set(places.values())) > 1:
        shown = ", ".join(f"{name} on {device}" for name, device in places.items())
        raise ValueError(f"{shown}: expected one device; move them with .to(device)")


def check_shape(name: str, x: Tensor, legend: str, shape: tuple[int, ...]) -> None:
    """Raise `ValueError` when `x` has another shape than the legend's."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} is {tuple(x.shape)}, expected {legend} = {shape}")
