"""Attention over any number of keys, including `zero_keys` further all-zero ones, without a mask.

    s_ij = q_i·k_j/√K      out_i = Σ_j e^{s_ij} v_j / (Σ_j e^{s_ij} + n)
    lse_i = log(Σ_j e^{s_ij} + n),   p_ij = e^{s_ij − lse_i}
    backward   δ_i = do_i·out_i      ds_ij = p_ij·(do_i·v_j − δ_i)/√K
               dq_i = Σ_j ds_ij k_j     dk_j = Σ_i ds_ij q_i     dv_j = Σ_i p_ij do_i

n = `zero_keys`[b] keys whose logit is 0 and whose value is zero: the online softmax starts at
m = 0, l = n, acc = 0 and is exact; backward needs only the lse, which includes them, as they
have no gradient. So the 512-row padding of Anima's text costs nothing.

Kept for backward: q, k, v, out and lse ([B, H, L] float32). Three launches backward: δ; dk and dv
(a program owns keys and loops over queries; with few keys the queries are split among programs and
partial sums added by torch); dq (owns queries, loops over keys). No atomics, so results repeat.
Softmax statistics and sums are float32; p and ds are rounded to the inputs' dtype for the products.

With short float16 sums (sums.py) p v, do v, pᵀ do, ds k and dsᵀ q are summed so. The logits q k
keep float32 sums, in all three kernels: e^s makes an error of s one of p by its size, and with
short ones all gradients would be as far off as bfloat16's. do v sums over the head, so that do and
v are held in parts of at most one chain there, and with them dv.

FLOPs: forward 4·B·H·L·S·K; backward 14·B·H·L·S·K, as both loops compute s and do·v again.
Sources: Dao et al. 2022 and 2023 (FlashAttention 1, 2), Milakov & Gimelshein 2018 (online softmax).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from anima_fast.kernels import dispatch
from anima_fast.kernels.op import Cost, Inputs, Op, Sizes, randn, wide
from anima_fast.kernels.sums import chain_of, dot_into, part_of, with_short_sums

MAX_HEAD = 128
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Programs that a pass over few keys is split into; enough for the multiprocessors of any card.
PROGRAMS = 256
# Queries of a program that sums do·out; 64 spill with Triton 3.6 on compute capability 10.0.
DELTA_ROWS = 32


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, zero_keys: Tensor | None = None, chain: int | None = None
) -> Tensor:
    """The definition; see `attention`."""
    return _forward_reference(q, k, v, zero_keys)[0]


def _forward_reference(
    q: Tensor, k: Tensor, v: Tensor, zero_keys: Tensor | None
) -> tuple[Tensor, Tensor]:
    lse = _logits(q, k).logsumexp(-1)  # [B, H, L]
    if zero_keys is not None:
        # log 0 = −∞ adds nothing.
        lse = torch.logaddexp(lse, zero_keys.to(lse).log()[:, None, None])
    p = (_logits(q, k) - lse[..., None]).exp()
    return torch.einsum("bhls,bshk->blhk", p, wide(v)).to(q.dtype), lse


def _logits(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("blhk,bshk->bhls", wide(q), wide(k)) / math.sqrt(q.shape[-1])


@triton.jit
def _tile(
    X, row, ROWS: tl.constexpr, limit, x_l, HEAD: tl.constexpr, BLOCK_K: tl.constexpr,
    COLUMN: tl.constexpr = 0,
):  # fmt: skip
    """Rows row … row + ROWS of a head [·, HEAD] from COLUMN on, zero beyond its bounds."""
    o_r = row + tl.arange(0, ROWS)
    o_k = COLUMN + tl.arange(0, BLOCK_K)
    m = (o_r < limit)[:, None] & (o_k < HEAD)[None, :]
    return tl.load(X + o_r.to(tl.int64)[:, None] * x_l + o_k[None, :], mask=m, other=0.0)


@triton.jit
def _parts(
    X, row, ROWS: tl.constexpr, limit, x_l, HEAD: tl.constexpr, PART: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """`_tile` in PARTS tiles of PART columns."""
    parts: tl.tuple = ()
    for i in tl.static_range(PARTS):
        parts += (_tile(X, row, ROWS, limit, x_l, HEAD, PART, i * PART),)
    return parts


@triton.jit
def _along_head(
    a, b, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    SHORT_SUMS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Σ a bᵀ over the parts of a head."""
    acc = tl.zeros([ROWS, COLUMNS], dtype=ACC)
    for i in tl.static_range(PARTS):
        acc = dot_into(acc, a[i], tl.trans(b[i]), SHORT_SUMS, PRECISION, ACC)
    return acc


@triton.jit
def _store_tile(
    X, x, row, ROWS: tl.constexpr, limit, x_l, HEAD: tl.constexpr, BLOCK_K: tl.constexpr,
    COLUMN: tl.constexpr = 0,
):  # fmt: skip
    o_r = row + tl.arange(0, ROWS)
    o_k = COLUMN + tl.arange(0, BLOCK_K)
    m = (o_r < limit)[:, None] & (o_k < HEAD)[None, :]
    tl.store(X + o_r.to(tl.int64)[:, None] * x_l + o_k[None, :], x, mask=m)


@triton.jit
def _attention_fwd(
    Q, K, V, ZERO, OUT, LSE, scale, H, L, S,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, out_b, out_l, out_h,
    HAS_ZERO: tl.constexpr, HEAD: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SHORT_SUMS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    q = _tile(Q + b * q_b + h * q_h, row, BLOCK_M, L, q_l, HEAD, BLOCK_K)
    # The n zero keys: logit 0, value 0.
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=ACC)
    l_i = tl.zeros([BLOCK_M], dtype=ACC)
    if HAS_ZERO:
        n = tl.load(ZERO + b).to(ACC)
        m_i = tl.where(n > 0, 0.0, m_i)
        l_i += n
    acc = tl.zeros([BLOCK_M, BLOCK_K], dtype=ACC)
    for start in range(0, S, BLOCK_N):
        k = _tile(K + b * k_b + h * k_h, start, BLOCK_N, S, k_l, HEAD, BLOCK_K)
        # Base 2: the hardware's exponential.
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * (scale * LOG2E)
        s = tl.where((start + tl.arange(0, BLOCK_N) < S)[None, :], s, float("-inf"))
        top = tl.max(s, 1)
        if SHORT_SUMS:
            # A chain of p v stays within v's own range: p is at most 1/64, as l is smaller by that.
            top += 6.0
        m_new = tl.maximum(m_i, top)
        p = tl.math.exp2(s - m_new[:, None])
        alpha = tl.math.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = _tile(V + b * v_b + h * v_h, start, BLOCK_N, S, v_l, HEAD, BLOCK_K)
        acc = dot_into(acc * alpha[:, None], p.to(v.dtype), v, SHORT_SUMS, PRECISION, ACC)
        m_i = m_new
    out = (acc / l_i[:, None]).to(OUT.dtype.element_ty)
    _store_tile(OUT + b * out_b + h * out_h, out, row, BLOCK_M, L, out_l, HEAD, BLOCK_K)
    o_l = row + tl.arange(0, BLOCK_M)
    lse = (m_i + tl.math.log2(l_i)) * LN2
    tl.store(LSE + tl.program_id(1).to(tl.int64) * L + o_l, lse, mask=o_l < L)


@triton.jit
def _attention_delta(
    OUT, DO, DELTA, H, L, out_b, out_l, out_h, do_b, do_l, do_h,
    HEAD: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    out = _tile(OUT + b * out_b + h * out_h, row, BLOCK_M, L, out_l, HEAD, BLOCK_K).to(ACC)
    do = _tile(DO + b * do_b + h * do_h, row, BLOCK_M, L, do_l, HEAD, BLOCK_K).to(ACC)
    o_l = row + tl.arange(0, BLOCK_M)
    # δ = do·out
    p_delta = DELTA + tl.program_id(1).to(tl.int64) * L + o_l
    tl.store(p_delta, tl.sum(out * do, 1), mask=o_l < L)


@triton.jit
def _attention_bwd_dkdv(
    Q, K, V, DO, LSE, DELTA, DK, DV, scale, H, L, S, split_rows,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, do_b, do_l, do_h,
    dk_z, dk_b, dk_l, dk_h, dv_z, dv_b, dv_l, dv_h,
    HEAD: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SHORT_SUMS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    col = tl.program_id(0) * BLOCK_N
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    z = tl.program_id(2).to(tl.int64)
    p_stat = tl.program_id(1).to(tl.int64) * L
    k = _tile(K + b * k_b + h * k_h, col, BLOCK_N, S, k_l, HEAD, BLOCK_K)
    PART: tl.constexpr = part_of(BLOCK_K, SHORT_SUMS)
    PARTS: tl.constexpr = BLOCK_K // PART
    v = _parts(V + b * v_b + h * v_h, col, BLOCK_N, S, v_l, HEAD, PART, PARTS)
    dk = tl.zeros([BLOCK_N, BLOCK_K], dtype=ACC)
    dv: tl.tuple = ()
    for _ in tl.static_range(PARTS):
        dv += (tl.zeros([BLOCK_N, PART], dtype=ACC),)
    first = tl.program_id(2) * split_rows
    for row in range(first, tl.minimum(first + split_rows, L), BLOCK_M):
        o_l = row + tl.arange(0, BLOCK_M)
        q = _tile(Q + b * q_b + h * q_h, row, BLOCK_M, L, q_l, HEAD, BLOCK_K)
        do = _parts(DO + b * do_b + h * do_h, row, BLOCK_M, L, do_l, HEAD, PART, PARTS)
        # Beyond L the lse is +∞, which makes p zero.
        lse = tl.load(LSE + p_stat + o_l, mask=o_l < L, other=float("inf"))
        delta = tl.load(DELTA + p_stat + o_l, mask=o_l < L, other=0.0)
        # Transposed, so that the products below need no further transposition.
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC) * (
            scale * LOG2E
        )  # [N, M]
        # Keys beyond S fill rows of dk and dv that are not stored: no mask.
        p = tl.math.exp2(s - (lse * LOG2E)[None, :])
        sums: tl.tuple = ()
        for i in tl.static_range(PARTS):
            sums += (dot_into(dv[i], p.to(q.dtype), do[i], SHORT_SUMS, PRECISION, ACC),)
        dv = sums
        dp = _along_head(v, do, BLOCK_N, BLOCK_M, PARTS, SHORT_SUMS, PRECISION, ACC)
        ds = p * (dp - delta[None, :])
        dk = dot_into(dk, ds.to(q.dtype), q, SHORT_SUMS, PRECISION, ACC)
    p_dk, p_dv = DK + z * dk_z + b * dk_b + h * dk_h, DV + z * dv_z + b * dv_b + h * dv_h
    dk = (dk * scale).to(DK.dtype.element_ty)
    _store_tile(p_dk, dk, col, BLOCK_N, S, dk_l, HEAD, BLOCK_K)
    for i in tl.static_range(PARTS):
        part = dv[i].to(DV.dtype.element_ty)
        _store_tile(p_dv, part, col, BLOCK_N, S, dv_l, HEAD, PART, i * PART)


@triton.jit
def _attention_bwd_dq(
    Q, K, V, DO, LSE, DELTA, DQ, scale, H, L, S,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, do_b, do_l, do_h, dq_b, dq_l, dq_h,
    HEAD: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SHORT_SUMS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    o_l = row + tl.arange(0, BLOCK_M)
    p_stat = tl.program_id(1).to(tl.int64) * L + o_l
    q = _tile(Q + b * q_b + h * q_h, row, BLOCK_M, L, q_l, HEAD, BLOCK_K)
    PART: tl.constexpr = part_of(BLOCK_K, SHORT_SUMS)
    PARTS: tl.constexpr = BLOCK_K // PART
    do = _parts(DO + b * do_b + h * do_h, row, BLOCK_M, L, do_l, HEAD, PART, PARTS)
    lse = tl.load(LSE + p_stat, mask=o_l < L, other=float("inf")) * LOG2E
    delta = tl.load(DELTA + p_stat, mask=o_l < L, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_K], dtype=ACC)
    for start in range(0, S, BLOCK_N):
        k = _tile(K + b * k_b + h * k_h, start, BLOCK_N, S, k_l, HEAD, BLOCK_K)
        v = _parts(V + b * v_b + h * v_h, start, BLOCK_N, S, v_l, HEAD, PART, PARTS)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * (scale * LOG2E)
        m_n = start + tl.arange(0, BLOCK_N) < S
        p = tl.where(m_n[None, :], tl.math.exp2(s - lse[:, None]), 0.0)
        dp = _along_head(do, v, BLOCK_M, BLOCK_N, PARTS, SHORT_SUMS, PRECISION, ACC)
        ds = p * (dp - delta[:, None])
        dq = dot_into(dq, ds.to(k.dtype), k, SHORT_SUMS, PRECISION, ACC)
    dq = (dq * scale).to(DQ.dtype.element_ty)
    _store_tile(DQ + b * dq_b + h * dq_h, dq, row, BLOCK_M, L, dq_l, HEAD, BLOCK_K)


@dataclass(frozen=True)
class Tiles:
    """Queries and keys per tile, warps and pipeline stages of one kernel."""

    queries: int
    keys: int
    warps: int
    stages: int

    def arguments(self) -> dict[str, int]:
        """As launch arguments."""
        sizes = {"BLOCK_M": self.queries, "BLOCK_N": self.keys}
        return {**sizes, "num_warps": self.warps, "num_stages": self.stages}


# (kernel, 16 bit) → tiles at head size 128. Chosen by what compiles without a spill within 99 KiB
# of shared memory, the least that a supported card has; no card has timed them.
TILES = {
    ("fwd", True): Tiles(128, 64, 8, 2),
    ("dkdv", True): Tiles(64, 64, 8, 2),
    ("dq", True): Tiles(64, 64, 8, 2),
    ("fwd", False): Tiles(32, 16, 4, 1),
    ("dkdv", False): Tiles(16, 32, 4, 1),
    ("dq", False): Tiles(32, 16, 4, 1),
}
# (kernel, chain) → tiles with short sums, chosen alike: sums run along the keys (fwd, dq) or the
# queries (dkdv), so these are a chain at most, and a chain has registers of its own. Eight warps
# share 64 rows of logits only where these are 64 wide; else each half computes all of them, as
# dkdv and dq do at a chain of 32.
SHORT_TILES = {
    ("fwd", 64): Tiles(128, 32, 8, 3),
    ("dkdv", 64): Tiles(64, 64, 8, 2),
    ("dq", 64): Tiles(128, 32, 8, 2),
    ("fwd", 32): Tiles(128, 32, 8, 3),
    ("dkdv", 32): Tiles(32, 64, 8, 3),
    ("dq", 32): Tiles(64, 32, 8, 2),
}


def tiles(kernel: str, dtype: torch.dtype, chain: int = 0) -> Tiles:
    """The tiles of a kernel."""
    return SHORT_TILES[kernel, chain] if chain else TILES[kernel, dtype.itemsize == 2]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _meta(q: Tensor) -> dict:
    head = q.shape[-1]
    return {
        "HEAD": head,
        "BLOCK_K": max(16, dispatch.power_of_2(head)),
        "ACC": dispatch.accumulator(q),
    }


def _products(chain: int) -> dict:
    return {"PRECISION": dispatch.dot_precision(), "SHORT_SUMS": chain}


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, zero_keys: Tensor | None, *, chain: int | None = None
) -> tuple[Tensor, Tensor]:
    """(out [B, L, H, K], lse [B, H, L] wide) without autograd; arguments as `attention`."""
    if not dispatch.runs_triton(q):
        return _forward_reference(q, k, v, zero_keys)
    q, k, v = (dispatch.rows(t) for t in (q, k, v))
    batch, length, heads, head = q.shape
    out = dispatch.empty(batch, length, heads, head, like=q)
    lse = dispatch.empty(batch, heads, length, like=q, dtype=dispatch.wide_dtype(q))
    chain = chain_of(q, chain)
    tile = tiles("fwd", q.dtype, chain)
    _attention_fwd[(dispatch.cdiv(length, tile.queries), batch * heads)](
        q, k, v, q if zero_keys is None else zero_keys, out, lse, 1 / math.sqrt(head),
        heads, length, k.shape[1], *_strides(q, k, v, out),
        HAS_ZERO=zero_keys is not None, **_products(chain), **_meta(q), **tile.arguments(),
    )  # fmt: skip
    return out, lse


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
    chain: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of do [B, L, H, K]; the zero keys are in the lse.

    `into`: tensors of q's, k's and v's shapes to write, of any strides with a dense head (parts
    of a packed gradient); new ones when None. `chain` as `attention`.
    """
    if not dispatch.runs_triton(q):
        return _backward_reference(do, q, k, v, out, lse, into)
    do, q, k, v, out = (dispatch.rows(t) for t in (do, q, k, v, out))
    batch, length, heads, head = q.shape
    keys = k.shape[1]
    dq, dk, dv = into or (dispatch.empty(*t.shape, like=t) for t in (q, k, v))
    wide_type = dispatch.wide_dtype(q)
    chain = chain_of(q, chain)
    meta, products, scale = _meta(q), _products(chain), 1 / math.sqrt(head)

    delta = dispatch.empty(batch, heads, length, like=q, dtype=wide_type)
    _attention_delta[(dispatch.cdiv(length, DELTA_ROWS), batch * heads)](
        out, do, delta, heads, length, *_strides(out, do), BLOCK_M=DELTA_ROWS, **meta, num_warps=4
    )

    tile = tiles("dkdv", q.dtype, chain)
    columns = dispatch.cdiv(keys, tile.keys)
    split = min(dispatch.cdiv(length, tile.queries), max(1, PROGRAMS // (columns * batch * heads)))
    split_rows = dispatch.cdiv(dispatch.cdiv(length, split), tile.queries) * tile.queries
    split = dispatch.cdiv(length, split_rows)
    sums = (dk[None], dv[None])
    if split > 1:
        sums = tuple(dispatch.empty(split, *k.shape, like=k, dtype=wide_type) for _ in range(2))
    _attention_bwd_dkdv[(columns, batch * heads, split)](
        q, k, v, do, lse, delta, *sums, scale, heads, length, keys, split_rows,
        *_strides(q, k, v, do), *sums[0].stride()[:4], *sums[1].stride()[:4],
        **products, **meta, **tile.arguments(),
    )  # fmt: skip
    if split > 1:
        dk.copy_(sums[0].sum(0))
        dv.copy_(sums[1].sum(0))

    tile = tiles("dq", q.dtype, chain)
    _attention_bwd_dq[(dispatch.cdiv(length, tile.queries), batch * heads)](
        q, k, v, do, lse, delta, dq, scale, heads, length, keys, *_strides(q, k, v, do, dq),
        **products, **meta, **tile.arguments(),
    )  # fmt: skip
    return dq, dk, dv


def _backward_reference(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    into: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    p = (_logits(q, k) - lse[..., None]).exp()  # [B, H, L, S]
    do_wide = wide(do)
    delta = (do_wide * wide(out)).sum(-1).transpose(1, 2)  # [B, H, L]
    dp = torch.einsum("blhk,bshk->bhls", do_wide, wide(v))
    ds = p * (dp - delta[..., None]) / math.sqrt(q.shape[-1])
    found = (
        torch.einsum("bhls,bshk->blhk", ds, wide(k)),
        torch.einsum("bhls,blhk->bshk", ds, wide(q)),
        torch.einsum("bhls,blhk->bshk", p, do_wide),
    )
    if into is None:
        return tuple(x.to(t.dtype) for x, t in zip(found, (q, k, v), strict=True))
    return tuple(target.copy_(x) for target, x in zip(into, found, strict=True))


@torch.library.custom_op("anima_fast::attention", mutates_args=())
def _op(
    q: Tensor, k: Tensor, v: Tensor, zero_keys: Tensor | None, chain: int
) -> tuple[Tensor, Tensor]:
    out, lse = attention_forward(q, k, v, zero_keys, chain=chain)
    return out.contiguous(), lse.contiguous()


@_op.register_fake
def _(q, k, v, zero_keys, chain):
    batch, length, heads, _ = q.shape
    lse = torch.empty(batch, heads, length, dtype=dispatch.wide_dtype(q), device=q.device)
    return *dispatch.dense(q), lse


@torch.library.custom_op("anima_fast::attention_backward", mutates_args=())
def _op_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, chain: int
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(t.contiguous() for t in attention_backward(do, q, k, v, out, lse, chain=chain))


_op_backward.register_fake(lambda do, q, k, v, out, lse, chain: dispatch.dense(q, k, v))


def _setup(ctx, inputs, output) -> None:
    ctx.chain = inputs[4]
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, do: Tensor, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if do is None:
        return None, None, None, None, None
    return *_op_backward(do, *ctx.saved_tensors, ctx.chain), None, None


_op.register_autograd(_backward, setup_context=_setup)


def attention(
    q: Tensor, k: Tensor, v: Tensor, zero_keys: Tensor | None = None, chain: int | None = None
) -> Tensor:
    """Softmax attention over the keys and `zero_keys` all-zero ones.

    Args:
        q: [B, L, H, K], K at most 128, fp32, fp16 or bf16, any strides.
        k, v: [B, S, H, K] in q's dtype.
        zero_keys: [B] int32 counts per sample, or None.
        chain: terms that float16 sums at a time, 0 for float32 sums; None as `use_sums` says.

    Returns:
        [B, L, H, K] in q's dtype.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit.
    """
    if q.ndim != 4 or not 1 <= q.shape[-1] <= MAX_HEAD:
        raise ValueError(
            f"q is {tuple(q.shape)}, expected [B, L, H, K] with K from 1 to {MAX_HEAD}"
        )
    batch, _, heads, head = q.shape
    if k.ndim != 4 or k.shape[1] < 1:
        raise ValueError(f"k is {tuple(k.shape)}, expected [B, S, H, K] with S at least 1")
    for name, x in (("k", k), ("v", v)):
        dispatch.check_shape(name, x, "[B, S, H, K]", (batch, k.shape[1], heads, head))
        if x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype}, expected q's {q.dtype}")
    dispatch.check_dtypes(q=q)
    dispatch.check_devices(q=q, k=k, v=v)
    if zero_keys is not None:
        dispatch.check_shape("zero_keys", zero_keys, "[B]", (batch,))
        if zero_keys.dtype != torch.int32:
            raise TypeError(f"zero_keys is {zero_keys.dtype}, expected int32 counts")
        dispatch.check_devices(q=q, zero_keys=zero_keys)
    return _op(q, k, v, zero_keys, chain_of(q, chain))[0]


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device | str) -> Inputs:
    b, l, s, h, k = (sizes[name] for name in ("B", "L", "S", "H", "K"))
    zero = sizes.get("zero", 0)
    # A sample without zero keys among those with some.
    counts = torch.tensor([zero * i for i in range(b)][::-1], dtype=torch.int32, device=device)
    return {
        "q": 2 * sizes.get("sharp", 1) * randn(b, l, h, k, dtype=dtype, device=device),
        "k": randn(b, s, h, k, dtype=dtype, device=device),
        "v": randn(b, s, h, k, dtype=dtype, device=device),
        "zero_keys": counts if zero else None,
    }


def _cost(sizes: Sizes, itemsize: int) -> Cost:
    b, l, s, h, k = (sizes[name] for name in ("B", "L", "S", "H", "K"))
    queries, keys = b * l * h * k * itemsize, b * s * h * k * itemsize
    return Cost(
        forward_bytes=2 * queries + 2 * keys,
        backward_bytes=4 * queries + 4 * keys,
        forward_flops=4 * b * h * l * s * k,
        backward_flops=14 * b * h * l * s * k,
    )


def _real_shapes(tokens: int) -> dict[str, Sizes]:
    heads = {"B": 1, "L": tokens, "H": 16, "K": 128}
    return {"self": {**heads, "S": tokens}, "cross": {**heads, "S": 96, "zero": 416}}


OP = Op(
    name="attention",
    function=attention,
    reference=attention_reference,
    make_inputs=_inputs,
    grads=("q", "k", "v"),
    shapes=(
        {"B": 1, "L": 1, "S": 1, "H": 1, "K": 8},
        {"B": 2, "L": 5, "S": 3, "H": 2, "K": 24, "zero": 7},
        {"B": 2, "L": 150, "S": 77, "H": 1, "K": 64, "zero": 400},
        {"B": 1, "L": 70, "S": 140, "H": 1, "K": 128},
    ),
    model_shapes=(
        {"B": 1, "L": 16, "S": 1024, "H": 1, "K": 128},
        {"B": 1, "L": 2, "S": 4096, "H": 1, "K": 128},
        {"B": 1, "L": 40, "S": 96, "H": 2, "K": 128, "zero": 416},
    ),
    # A logit sums K products, an output S values, dk and dv all queries.
    summed=lambda sizes: max(sizes["K"], sizes["S"], sizes["L"]),
    real_shapes=_real_shapes,
    cost=_cost,
    cost_note="read q, k, v, write out; backward reads out and its gradient too and writes three",
)

# Logits of about 50 show where they lose digits; the other rows have 8.
SHORT = with_short_sums(
    OP,
    shapes=(
        {"B": 2, "L": 70, "S": 77, "H": 1, "K": 128, "zero": 400, "sharp": 5},
        {"B": 2, "L": 13, "S": 45, "H": 1, "K": 24, "zero": 7},
        {"B": 1, "L": 20, "S": 70, "H": 1, "K": 72},
    ),
    model_shapes=(
        {"B": 1, "L": 16, "S": 4096, "H": 1, "K": 128},
        {"B": 1, "L": 300, "S": 96, "H": 1, "K": 128, "zero": 416},
    ),
)
