"""Products as the float16 instruction of a tensor core makes them, with short float16 sums.

    acc16 ← round16(acc16 + Σ a·b)      for 16 terms at a time
    acc32 ← acc32 + acc16, acc16 ← 0    after each chain of 64

`Sums` is how a product adds up, and `product` one product. `Arithmetic` is what a training step
computes with: the type of stored tensors, the sums of its products, the residual stream. Values are
float32 tensors that hold only numbers of the type, so that the same code runs in all of them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from anima_fast.device import one_thread
from anima_fast.kernels.row_powers import TAIL, opened, stored
from anima_fast.models.dit_layers import scale_for

# The largest float16: what a store of something larger becomes.
HALF_MAX = 65504.0
# Rows of a tile, and its elements: they stay in a core's cache while K passes by.
TILE_ROWS, TILE = 256, 2**16


@dataclass(frozen=True)
class Sums:
    """How a product adds up.

    Attributes:
        chain: terms of a float16 sum before it is added to the float32 one; 0 sums in float32
            throughout, `WHOLE` in float16.
        every: terms after which the float16 sum is rounded.
        to_zero: rounds towards zero instead of to nearest.
    """

    chain: int = 0
    every: int = 16
    to_zero: bool = False


WHOLE = 2**30
FULL = Sums()
# out [m, n], a [m, K], b [K, n]
Tile: TypeAlias = tuple[Tensor, Tensor, Tensor]


def product(a: Tensor, b: Tensor, sums: Sums = FULL) -> Tensor:
    """a @ b, [..., M, K] and [..., K, N] in float32, summed as `sums` says; not for autograd."""
    if not sums.chain:
        return a @ b
    # Threads of torch's own would wait for each other at each of many short steps.
    threads = torch.get_num_threads()
    out, tiles = _tiles(a, b)
    with one_thread(), ThreadPoolExecutor(threads) as pool:
        run: Any = pool.map if threads > 1 else map
        list(run(partial(_add_tile, sums), tiles))
    return out


def _tiles(a: Tensor, b: Tensor) -> tuple[Tensor, list[Tile]]:
    """Zeros of the size of a @ b, and its tiles with the rows and the columns that make them."""
    rows, columns = a.shape[-2], b.shape[-1]
    out = a.new_zeros(*a.shape[:-1], columns)
    high = max(1, min(rows, TILE_ROWS))
    wide = max(1, TILE // high)
    parts = (x.reshape(-1, *x.shape[-2:]) if x.ndim > 2 else x[None] for x in (out, a, b))
    return out, [
        (c[m : m + high, n : n + wide], x[m : m + high], y[:, n : n + wide])
        for c, x, y in zip(*parts, strict=True)
        for m in range(0, rows, high)
        for n in range(0, columns, wide)
    ]


# Whether autograd records is a matter of each thread.
@torch.no_grad()
def _add_tile(sums: Sums, tile: Tile) -> None:
    """out += a @ b."""
    out, a, b = tile
    length = a.shape[1]
    acc, half = torch.empty_like(out), torch.empty_like(out, dtype=torch.float16)
    for start in range(0, length, sums.chain):
        stop = min(start + sums.chain, length)
        acc.zero_()
        for k in range(start, stop, sums.every):
            end = min(k + sums.every, stop)
            acc.addmm_(a[:, k:end], b[k:end])
            if sums.to_zero:
                acc.copy_(toward_zero(acc))
            else:
                acc.copy_(half.copy_(acc))
        out += acc


def toward_zero(x: Tensor) -> Tensor:
    """The float16 next to each x that is not farther from zero, as float32."""
    half = x.half()
    # Sign and magnitude: one less is the next number towards zero, whatever the sign.
    lower = (half.view(torch.int16) - 1).view(torch.float16)
    return torch.where(half.float().abs() > x.abs(), lower, half).float()


@dataclass
class Count:
    """How often something happened."""

    value: int = 0


@dataclass(frozen=True)
class Arithmetic:
    """What a step computes with.

    Attributes:
        name: in tables and files.
        dtype: of operands and of stored tensors; float32 rounds nothing.
        sums: of every product but the two below.
        logits: of q kᵀ, whose errors the exponential enlarges.
        residual: "same" stores the residual stream as everything else, "rows" with a power of two
            a row, "float32" not rounded.
        beyond: values that `stored` had to hold within float16's range.
    """

    name: str
    dtype: torch.dtype
    sums: Sums = FULL
    logits: Sums = FULL
    residual: str = "same"
    beyond: Count = field(default_factory=Count, compare=False, repr=False)

    def stored(self, x: Tensor) -> Tensor:
        """x as `dtype` holds it; float16 ends at ±65504."""
        if self.dtype == torch.float32:
            return x
        if self.dtype == torch.float16:
            self.beyond.value += int((x.abs() > HALF_MAX).sum())
            x = x.clamp(-HALF_MAX, HALF_MAX)
        return x.to(self.dtype).float()

    def stored_rows(self, x: Tensor) -> Tensor:
        """x as the residual stream or its gradient is stored."""
        if self.residual == "float32":
            return x
        if self.residual == "same":
            return self.stored(x)
        like = x.new_empty(0, x.shape[-1] + TAIL, dtype=torch.float16)
        return opened(stored(x, like), x.shape[-1])

    def weight(self, w: Tensor) -> tuple[Tensor, float]:
        """A weight as the product reads it, and the factor of its result.

        In float16 it may be divided by a power of two (`models.dit_layers.scale_for`), so that
        next to none are subnormal and a sum of 64 products cannot overflow.
        """
        if self.dtype != torch.float16:
            return self.stored(w), 1.0
        scale = scale_for(w)
        return (w / scale).half().float(), scale

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b of stored operands."""
        return product(a, b, self.sums)


SHORT = Sums(64)
FLOAT32 = Arithmetic("float32", torch.float32)
BF16 = Arithmetic("bf16", torch.bfloat16)
FP16_FULL = Arithmetic("fp16-full", torch.float16, residual="rows")
FP16_SHORT = Arithmetic("fp16-short", torch.float16, SHORT, residual="rows")
