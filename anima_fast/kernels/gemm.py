"""Y = X Wᵀ + s·H Bᵀ: the one matrix product behind all adapter arithmetic.

    forward    X [M, K] tokens, W [N, K] frozen, H = X Aᵀ [M, R], B [N, R] the adapter
    dX         X = dY, W = the frozen weight transposed, H = G, B = Aᵀ
    H, G, dA, dB   the same without an adapter; any strides, so nothing is transposed in memory
    Y += s·H Bᵀ    the same, added to a product that a library has written (`add`)

The adapter's product comes first and is scaled, then the base product goes on in the same
accumulator: the result is written once, and s·H Bᵀ costs R/K of the arithmetic and no traffic but
that of H. Products with few tiles (the adapter gradients sum over all tokens) are split along K
into partial sums that torch adds: no atomics, so results repeat. Epilogues:

    gelu       writes y and gelu(y), so that only the next product reads the activation
    gelu_grad  multiplies with gelu'(a) of a given pre-activation a [M, N]; with both, gelu(a) is
               written next to it, for the adapter's gradient

Accumulation is float32, with `chain` in short sums of float16 (sums.py): each step along K, and
each of the adapter's, is one chain.
Source: the tiled product of the Triton tutorials, Hu et al. 2021 (LoRA).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from anima_fast.kernels import dispatch
from anima_fast.kernels.gelu import gelu_slope, gelu_value
from anima_fast.kernels.sums import dot_into

# Tiles of neighbouring programs share rows of X, which then stay in the L2 cache.
GROUP = 8
# Below this many tiles a product is split along K; enough for the multiprocessors of any card.
PROGRAMS = 128
MIN_SPLIT = 512
HALF_MAX = tl.constexpr(65504.0)


# A place in the counts is no reason to compile again.
@triton.jit(do_not_specialize=["slot"])
def _gemm(
    X, W, Y, H, B, PRE, ACT, COUNTS, M, N, K, R, scale, factor, k_split, slot,
    x_m, x_k, w_n, w_k, y_z, y_m, y_n, h_m, h_r, b_n, b_r, pre_m, act_m,
    HAS_ADAPTER: tl.constexpr, ADD: tl.constexpr, HAS_PRE: tl.constexpr, HAS_ACT: tl.constexpr,
    SCALED: tl.constexpr, SATURATES: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_R: tl.constexpr, SHORT_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    inside = tl.program_id(0) % (GROUP * tiles_n)
    o_m = ((group * GROUP + inside % height) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_n = ((inside // height) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m_m, m_n = (o_m < M)[:, None], (o_n < N)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    if HAS_ADAPTER:
        for r in range(0, R, BLOCK_R):
            o_r = r + tl.arange(0, BLOCK_R)
            m_r = o_r < R
            h = tl.load(
                H + o_m[:, None] * h_m + o_r[None, :] * h_r, mask=m_m & m_r[None, :], other=0.0
            )
            b = tl.load(
                B + o_r[:, None] * b_r + o_n[None, :] * b_n, mask=m_n & m_r[:, None], other=0.0
            )
            acc = dot_into(acc, h, b, SHORT_SUMS, PRECISION, ACC)
        acc *= scale
    first = tl.program_id(1) * k_split
    last = tl.minimum(first + k_split, K)
    o_k = first + tl.arange(0, BLOCK_K).to(tl.int64)
    p_x = X + o_m[:, None] * x_m + o_k[None, :] * x_k
    p_w = W + o_k[:, None] * w_k + o_n[None, :] * w_n
    for k in range(first, last, BLOCK_K):
        m_k = k + tl.arange(0, BLOCK_K) < last
        x = tl.load(p_x, mask=m_m & m_k[None, :], other=0.0)
        w = tl.load(p_w, mask=m_n & m_k[:, None], other=0.0)
        acc = dot_into(acc, x, w, SHORT_SUMS, PRECISION, ACC)
        p_x += BLOCK_K * x_k
        p_w += BLOCK_K * w_k
    if SCALED:
        acc *= factor
    m = m_m & m_n
    Y += tl.program_id(1).to(tl.int64) * y_z
    # Offsets are computed where they are used: registers are scarce.
    if ADD:
        acc += tl.load(Y + o_m[:, None] * y_m + o_n[None, :] * y_n, mask=m, other=0.0).to(ACC)
    if HAS_PRE:
        pre = tl.load(PRE + o_m[:, None] * pre_m + o_n[None, :], mask=m, other=0.0).to(ACC)
        if HAS_ACT:
            tl.store(ACT + o_m[:, None] * act_m + o_n[None, :], gelu_value(pre), mask=m)
        acc *= gelu_slope(pre)
    y = acc.to(Y.dtype.element_ty)
    if SATURATES:  # noqa: SIM102, the one when compiling, the other when running
        # Beyond M and N the sum is 0. Seldom is anything infinite: one maximum tells.
        if tl.max(tl.abs(y)) > HALF_MAX:
            beyond = tl.abs(y) > HALF_MAX
            tl.atomic_add(COUNTS + slot, tl.sum(beyond.to(tl.int32)))
            y = tl.where(beyond, tl.where(y > 0, HALF_MAX, -HALF_MAX), y).to(y.dtype)
    tl.store(Y + o_m[:, None] * y_m + o_n[None, :] * y_n, y, mask=m)
    if HAS_ACT and not HAS_PRE:
        # Of the rounded pre-activation, which backward will read.
        a = gelu_value(y.to(ACC))
        tl.store(ACT + o_m[:, None] * act_m + o_n[None, :], a, mask=m)


@dataclass(frozen=True)
class Tile:
    """Sizes of a program's tile, warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def tile_for(m: int, n: int, dtype: torch.dtype, add: bool = False, chain: int = 0) -> Tile:
    """The tile of a product. Chosen by what compiles without a spill within 99 KiB of shared
    memory, the least that a supported card has; no card has timed them."""
    if chain:
        # A step along K is a chain. Larger tiles spill, as a chain has registers of its own.
        return Tile(64, 128, chain, 4, 3) if m <= 64 else Tile(128, 128, chain, 8, 3)
    if dtype.itemsize != 2:
        # With two stages Triton 3.7 spills on sm_120.
        return Tile(32, 32, 32, 4, 3)
    if add:
        # One or two steps along K, then traffic: many small programs instead of a pipeline.
        return Tile(64, 64, 32, 8, 1)
    if m <= 64:
        return Tile(32 if m <= 32 else 64, 128, 64, 4, 3)
    if n <= 32:
        # Of more rows or longer steps, Triton 3.6 or 3.7 spills on sm_120.
        return Tile(64, 32, 32, 4, 4)
    if n <= 64:
        return Tile(128, 64, 64, 4, 3)
    return Tile(128, 128, 64, 8, 3)


def gemm(
    x: Tensor,
    w: Tensor,
    *,
    dtype: torch.dtype | None = None,
    adapter: tuple[Tensor, Tensor, float] | None = None,
    scale: float = 1.0,
    out: Tensor | None = None,
    add: bool = False,
    gelu: Tensor | None = None,
    gelu_grad: Tensor | None = None,
    counter: tuple[Tensor, int] | None = None,
    chain: int = 0,
) -> Tensor:
    """scale·x wᵀ + s·h bᵀ by the Triton kernel.

    Args:
        x: [M, K], w: [N, K], one dtype, any strides.
        dtype: of the result; x's when None.
        adapter: h [M, R], b [N, R] and s.
        scale: a factor of the product of x and w; with an adapter a power of two.
        out: [M, N] of any strides to write, instead of a new tensor.
        add: add to what `out` holds.
        gelu: [M, N], dense in N: gelu of the result, or of `gelu_grad`, is written there too.
        gelu_grad: [M, N], dense in N: the result is multiplied with gelu' of it.
        counter: int32 counts and a place in them: a float16 result is held within ±65504, and the
            values beyond are added to that count. Without it they become infinite.
        chain: terms that are added in float16 at a time, of `sums.chain_of`; 0 for none.

    Returns:
        [M, N].
    """
    m, k, n = len(x), x.shape[1], len(w)
    if out is None:
        out = dispatch.empty(m, n, like=x, dtype=dtype or x.dtype)
    tile = tile_for(m, n, x.dtype, add, chain)
    count = dispatch.cdiv(m, tile.m) * dispatch.cdiv(n, tile.n)
    saturates = counter is not None and out.dtype == torch.float16
    # An adapter or an epilogue needs the complete sum in one program.
    epilogue = add or saturates or gelu is not None or gelu_grad is not None
    complete = epilogue or adapter is not None
    split = 1 if complete else max(1, min(PROGRAMS // count, k // MIN_SPLIT))
    k_split = dispatch.cdiv(dispatch.cdiv(k, split), tile.k) * tile.k
    split = dispatch.cdiv(k, k_split)
    target = out[None]
    if split > 1:
        target = dispatch.empty(split, m, n, like=x, dtype=dispatch.wide_dtype(x))
    # The adapter's sum comes first, so the product's factor will multiply it too.
    h, b, s = (adapter[0], adapter[1], adapter[2] / scale) if adapter else (x, w, 1.0)
    counts, slot = counter or (x, 0)
    pre, act = (x if t is None else t for t in (gelu_grad, gelu))
    _gemm[(count, split)](
        x, w, target, h, b, pre, act, counts, m, n, k, h.shape[1], s, scale, k_split, slot,
        *x.stride(), *w.stride(), *target.stride(), *h.stride(), *b.stride(),
        pre.stride(0), act.stride(0),
        HAS_ADAPTER=adapter is not None, ADD=add,
        HAS_PRE=gelu_grad is not None, HAS_ACT=gelu is not None,
        SCALED=adapter is None or scale != 1.0,
        SATURATES=saturates,
        GROUP=GROUP, BLOCK_R=16 if x.dtype.itemsize == 4 else 32, SHORT_SUMS=chain,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        PRECISION=dispatch.dot_precision(), ACC=dispatch.accumulator(x),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if split > 1:
        out.copy_(target.sum(0))
    return out
