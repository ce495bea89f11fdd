"""Small products of adapters, by our kernel or the library's, and the layouts that they need.

`gemm_product` and `library_product` take the same arguments, so that lora_linear.py writes its sums
once. Results have the dtype that is asked for: of 16-bit factors also float32, so that gradients of
float32 adapters are the accumulators, rounded nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anima_fast.kernels.gemm import gemm


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Matrices on top of each other: a view where they lie so in memory, else a copy."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    storage, start = first.untyped_storage().data_ptr(), first.storage_offset()
    offset = start
    for x in tensors:
        same = x.storage_offset() == offset and x.untyped_storage().data_ptr() == storage
        if not (same and x.is_contiguous()):
            return torch.cat(list(tensors))
        offset += x.numel()
    width = first.shape[1]
    return first.as_strided(((offset - start) // width, width), (width, 1))


def by_part(x: Tensor, parts: int) -> Tensor:
    """Columns side by side [M, parts·N], or rows on top of each other, as [parts, M, N]."""
    return x.unflatten(1, (parts, -1)).transpose(0, 1)


def gemm_product(
    a: Tensor, b: Tensor, scale: float, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """scale·a b by the Triton kernel, into `out` if given."""
    return gemm(a, b.T, scale=scale, dtype=dtype, out=out)


def library_product(
    a: Tensor, b: Tensor, scale: float, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """scale·a b, of matrices or batches of them; into `out` if given, of a's dtype then."""
    batched = a.ndim == 3
    if dtype == a.dtype:
        scaled = torch.baddbmm if batched else torch.addmm
        # With β = 0 the first argument is not read.
        return scaled(a.new_empty(()) if out is None else out, a, b, beta=0, alpha=scale, out=out)
    if a.is_cuda and dtype == torch.float32 and a.dtype.itemsize == 2:
        # cuBLAS writes its float32 accumulators; there is no such product on the CPU.
        wide = (torch.bmm if batched else torch.mm)(a, b, out_dtype=dtype)
    else:
        wide = (a @ b).to(dtype)
    return wide if scale == 1.0 else wide.mul_(scale)
