"""RMS norm and rotary embedding of queries and keys, read from a packed projection.

    n = x·r·w,  r = 1/√(mean(x²) + ε)          per head of K elements, halves x = (x₁, x₂)
    forward    y₁ = n₁·cos − n₂·sin            y₂ = n₂·cos + n₁·sin
    backward   g₁ = dy₁·cos + dy₂·sin          g₂ = dy₂·cos − dy₁·sin
               dx = r·(g·w − x̂·mean(g·w·x̂)),  x̂ = x·r          dw = Σ g·x̂

The packed result of the QKV projection is read in place, part by part, and the heads are written
in the layout that attention reads; values are not touched, they stay a view. Cross attention uses
the same kernel without the rotation, for its query ([B, L, 1, H, K]) and for the key half of its
packed text keys and values ([B, S, 2, H, K]). Eager torch makes eleven passes over q and k.

Nothing but the packed input is kept; r is computed again. Backward may write over its gradient:
attention puts dq, dk and dv into one packed buffer, and this turns its first parts into gradients
of the projection, so packing costs nothing. Arithmetic is float32, rounded once.

Bytes, in units of the normed parts: forward 2, backward 3.
Sources: Su et al. 2021 (RoPE, half layout), Zhang & Sennrich 2019 (RMS norm), Henry et al. 2020
(query-key norm).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from anima_fast.kernels import dispatch
from anima_fast.kernels.op import Cost, Inputs, Op, Sizes, randn, wide

EPS = 1e-6
# Elements of a tile: rows of heads times head size.
TILE = 4096
MAX_HEAD = 256


def qk_norm_rope_reference(
    packed: Tensor, weights: Tensor, cos: Tensor | None = None, sin: Tensor | None = None
) -> Tensor:
    """The definition; see `qk_norm_rope`."""
    x = wide(packed[:, :, : len(weights)])  # [B, L, N, H, K]
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    n = x * rstd * wide(weights)[:, None]
    if cos is None:
        return n.to(packed.dtype)
    first, second = n.chunk(2, -1)
    c, s = (wide(t)[:, None, None] for t in (cos, sin))  # [L, 1, 1, K/2]
    return torch.cat([first * c - second * s, second * c + first * s], -1).to(packed.dtype)


@triton.jit
def _rows(ROWS: tl.constexpr, COUNT, L, H):
    """Sample, token and head of this program's rows, and which rows exist."""
    # 32 bits count them (2³¹ heads of 64 are 256 GiB) and divide in a fraction of the instructions.
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, h = o_r // H, o_r % H
    b, l = token // L, token % L
    return b.to(tl.int64), l.to(tl.int64), h.to(tl.int64), o_r < COUNT


@triton.jit
def _qk_norm_rope_fwd(
    X, W, COS, SIN, Y, COUNT, L, H,
    x_b, x_l, x_n, x_h, w_n, cos_l, sin_l, y_b, y_l, y_n, y_h,
    ROPE: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    b, l, h, m_r = _rows(ROWS, COUNT, L, H)
    o_k = tl.arange(0, BLOCK)
    m_k = o_k < HALF
    m = m_r[:, None] & m_k[None, :]
    p_x = X + (b * x_b + l * x_l + n * x_n + h * x_h)[:, None] + o_k[None, :]
    x1 = tl.load(p_x, mask=m, other=0.0).to(ACC)
    x2 = tl.load(p_x + HALF, mask=m, other=0.0).to(ACC)
    w1 = tl.load(W + n * w_n + o_k, mask=m_k, other=0.0).to(ACC)
    w2 = tl.load(W + n * w_n + HALF + o_k, mask=m_k, other=0.0).to(ACC)
    rstd = 1.0 / tl.sqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / (2 * HALF) + EPS)
    y1 = x1 * rstd[:, None] * w1[None, :]
    y2 = x2 * rstd[:, None] * w2[None, :]
    if ROPE:
        c = tl.load(COS + (l * cos_l)[:, None] + o_k[None, :], mask=m, other=0.0).to(ACC)
        s = tl.load(SIN + (l * sin_l)[:, None] + o_k[None, :], mask=m, other=0.0).to(ACC)
        y1, y2 = y1 * c - y2 * s, y2 * c + y1 * s
    p_y = Y + (b * y_b + l * y_l + n * y_n + h * y_h)[:, None] + o_k[None, :]
    tl.store(p_y, y1, mask=m)
    tl.store(p_y + HALF, y2, mask=m)


@triton.jit
def _qk_norm_rope_bwd(
    DY, X, W, COS, SIN, DX, DW, COUNT, L, H,
    dy_b, dy_l, dy_n, dy_h, x_b, x_l, x_n, x_h, w_n, cos_l, sin_l, dx_b, dx_l, dx_n, dx_h,
    ROPE: tl.constexpr, NEEDS_WEIGHTS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    b, l, h, m_r = _rows(ROWS, COUNT, L, H)
    o_k = tl.arange(0, BLOCK)
    m_k = o_k < HALF
    m = m_r[:, None] & m_k[None, :]
    p_x = X + (b * x_b + l * x_l + n * x_n + h * x_h)[:, None] + o_k[None, :]
    x1 = tl.load(p_x, mask=m, other=0.0).to(ACC)
    x2 = tl.load(p_x + HALF, mask=m, other=0.0).to(ACC)
    p_dy = DY + (b * dy_b + l * dy_l + n * dy_n + h * dy_h)[:, None] + o_k[None, :]
    g1 = tl.load(p_dy, mask=m, other=0.0).to(ACC)
    g2 = tl.load(p_dy + HALF, mask=m, other=0.0).to(ACC)
    if ROPE:
        # The rotation is undone by its transpose.
        c = tl.load(COS + (l * cos_l)[:, None] + o_k[None, :], mask=m, other=0.0).to(ACC)
        s = tl.load(SIN + (l * sin_l)[:, None] + o_k[None, :], mask=m, other=0.0).to(ACC)
        g1, g2 = g1 * c + g2 * s, g2 * c - g1 * s
    rstd = 1.0 / tl.sqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / (2 * HALF) + EPS)
    x1 *= rstd[:, None]
    x2 *= rstd[:, None]
    if NEEDS_WEIGHTS:
        p_dw = DW + (n * tl.num_programs(0) + tl.program_id(0)) * 2 * HALF + o_k
        tl.store(p_dw, tl.sum(g1 * x1, 0), mask=m_k)
        tl.store(p_dw + HALF, tl.sum(g2 * x2, 0), mask=m_k)
    # dx = r·(g·w − x̂·mean(g·w·x̂))
    g1 *= tl.load(W + n * w_n + o_k, mask=m_k, other=0.0).to(ACC)[None, :]
    g2 *= tl.load(W + n * w_n + HALF + o_k, mask=m_k, other=0.0).to(ACC)[None, :]
    mean = (tl.sum(g1 * x1, 1) + tl.sum(g2 * x2, 1)) / (2 * HALF)
    p_dx = DX + (b * dx_b + l * dx_l + n * dx_n + h * dx_h)[:, None] + o_k[None, :]
    tl.store(p_dx, rstd[:, None] * (g1 - x1 * mean[:, None]), mask=m)
    tl.store(p_dx + HALF, rstd[:, None] * (g2 - x2 * mean[:, None]), mask=m)


def _launch(packed: Tensor, parts: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and tile sizes."""
    batch, length, _, heads, head = packed.shape
    block = dispatch.power_of_2(head // 2)
    tile = max(1, TILE // (2 * block))
    grid = (dispatch.cdiv(batch * length * heads, tile), parts)
    return grid, {"HALF": head // 2, "BLOCK": block, "ROWS": tile}


def qk_norm_rope_forward(
    packed: Tensor, weights: Tensor, cos: Tensor | None, sin: Tensor | None
) -> Tensor:
    """[B, L, N, H, K] without autograd."""
    if not dispatch.runs_triton(packed):
        return qk_norm_rope_reference(packed, weights, cos, sin)
    rope = cos is not None
    packed, weights = dispatch.rows(packed), dispatch.rows(weights)
    cos, sin = (dispatch.rows(cos), dispatch.rows(sin)) if rope else (weights, weights)
    batch, length, _, heads, head = packed.shape
    out = dispatch.empty(batch, length, len(weights), heads, head, like=packed)
    grid, tile = _launch(packed, len(weights))
    _qk_norm_rope_fwd[grid](
        packed, weights, cos, sin, out, batch * length * heads, length, heads,
        *packed.stride()[:4], weights.stride(0), cos.stride(0), sin.stride(0), *out.stride()[:4],
        ROPE=rope, EPS=EPS, ACC=dispatch.accumulator(packed), **tile, num_warps=4,
    )  # fmt: skip
    return out


def qk_norm_rope_backward(
    dy: Tensor,
    packed: Tensor,
    weights: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    out: Tensor | None = None,
    needs_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(dpacked, dweights).

    Args:
        dy: [B, L, N, H, K], the gradient of the result.
        packed, weights, cos, sin: as given to the forward.
        out: [B, L, P, H, K], dense in K, whose first N parts are written; dy may be those parts.
            A new tensor with zeros in the other parts when None.
        needs_weights: compute dweights [N, K], wide.
    """
    parts = len(weights)
    if out is None:
        out = dispatch.empty(*packed.shape, like=packed)
        out[:, :, parts:] = 0
    if not dispatch.runs_triton(packed):
        dx, dweights = _backward_reference(dy, packed, weights, cos, sin, needs_weights)
        out[:, :, :parts] = dx
        return out, dweights
    rope = cos is not None
    dy, packed, weights = (dispatch.rows(t) for t in (dy, packed, weights))
    cos, sin = (dispatch.rows(cos), dispatch.rows(sin)) if rope else (weights, weights)
    batch, length, _, heads, head = packed.shape
    grid, tile = _launch(packed, parts)
    dweights = None
    if needs_weights:
        wide_type = dispatch.wide_dtype(packed)
        dweights = dispatch.empty(parts, grid[0], head, like=packed, dtype=wide_type)
    _qk_norm_rope_bwd[grid](
        dy, packed, weights, cos, sin, out, out if dweights is None else dweights,
        batch * length * heads, length, heads,
        *dy.stride()[:4], *packed.stride()[:4], weights.stride(0), cos.stride(0), sin.stride(0),
        *out.stride()[:4],
        ROPE=rope, NEEDS_WEIGHTS=needs_weights, EPS=EPS, ACC=dispatch.accumulator(packed),
        **tile, num_warps=4,
    )  # fmt: skip
    return out, None if dweights is None else dweights.sum(1)


def _backward_reference(
    dy: Tensor,
    packed: Tensor,
    weights: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    needs_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    g, x = wide(dy), wide(packed[:, :, : len(weights)])
    if cos is not None:
        first, second = g.chunk(2, -1)
        c, s = (wide(t)[:, None, None] for t in (cos, sin))
        g = torch.cat([first * c + second * s, second * c - first * s], -1)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    x = x * rstd
    dweights = (g * x).sum((0, 1, 3)) if needs_weights else None
    g = g * wide(weights)[:, None]
    return (rstd * (g - x * (g * x).mean(-1, keepdim=True))).to(packed.dtype), dweights


_op = torch.library.custom_op("anima_fast::qk_norm_rope", qk_norm_rope_forward, mutates_args=())


@_op.register_fake
def _(packed, weights, cos, sin):
    shape = (*packed.shape[:2], len(weights), *packed.shape[3:])
    return torch.empty(shape, dtype=packed.dtype, device=packed.device)


@torch.library.custom_op("anima_fast::qk_norm_rope_backward", mutates_args=())
def _op_backward(
    dy: Tensor, packed: Tensor, weights: Tensor, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor, Tensor]:
    dpacked, dweights = qk_norm_rope_backward(dy, packed, weights, cos, sin, needs_weights=True)
    assert dweights is not None
    return dpacked, dweights.to(weights.dtype)


_op_backward.register_fake(lambda dy, packed, weights, *_: dispatch.dense(packed, weights))


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *_op_backward(dy, *ctx.saved_tensors), None, None


_op.register_autograd(_backward, setup_context=_setup)


def qk_norm_rope(
    packed: Tensor, weights: Tensor, cos: Tensor | None = None, sin: Tensor | None = None
) -> Tensor:
    """The first N parts of a packed projection, each head normed and, with angles, rotated.

    Args:
        packed: [B, L, P, H, K], P parts (3 for q, k, v), K even and at most 256, any strides, fp32,
            fp16 or bf16.
        weights: [N, K], N from 1 to P: the norm weight of each part that is normed.
        cos, sin: [L, K/2] of the RoPE angles, or None for no rotation. They get no gradient.

    Returns:
        [B, L, N, H, K] in packed's dtype.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit.
    """
    if packed.ndim != 5 or packed.shape[-1] % 2 or not 2 <= packed.shape[-1] <= MAX_HEAD:
        raise ValueError(
            f"packed is {tuple(packed.shape)}, expected [B, L, P, H, K] with K even and at most "
            f"{MAX_HEAD}"
        )
    head = packed.shape[-1]
    if weights.ndim != 2 or weights.shape[1] != head or not 1 <= len(weights) <= packed.shape[2]:
        raise ValueError(
            f"weights are {tuple(weights.shape)}, expected [N, K] with N from 1 to "
            f"{packed.shape[2]} and K = {head}"
        )
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin: expected both or neither")
    angles = {} if cos is None else {"cos": cos, "sin": sin}
    for name, angle in angles.items():
        dispatch.check_shape(name, angle, "[L, K/2]", (packed.shape[1], head // 2))
    dispatch.check_dtypes(packed=packed, weights=weights, **angles)
    dispatch.check_devices(packed=packed, weights=weights, **angles)
    return _op(packed, weights, cos, sin)


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device | str) -> Inputs:
    b, l, p, n, h, k = (sizes[name] for name in ("B", "L", "P", "N", "H", "K"))
    angles = randn(l, k // 2, dtype=torch.float64) * 3
    rope = sizes.get("rope", 1)
    packed = randn(b, l, p, h, k, dtype=dtype, device=device)
    return {
        "packed": packed * 0.01 if sizes.get("small") else packed,
        "weights": 1 + 0.3 * randn(n, k, dtype=dtype, device=device),
        "cos": angles.cos().to(dtype).to(device) if rope else None,
        "sin": angles.sin().to(dtype).to(device) if rope else None,
    }


def _cost(sizes: Sizes, itemsize: int) -> Cost:
    normed = sizes["B"] * sizes["L"] * sizes["N"] * sizes["H"] * sizes["K"] * itemsize
    return Cost(forward_bytes=2 * normed, backward_bytes=3 * normed)


def _real_shapes(tokens: int) -> dict[str, Sizes]:
    heads = {"B": 1, "H": 16, "K": 128}
    return {
        "self": {**heads, "L": tokens, "P": 3, "N": 2},
        "cross q": {**heads, "L": tokens, "P": 1, "N": 1, "rope": 0},
        "cross k": {**heads, "L": 96, "P": 2, "N": 1, "rope": 0},
    }


OP = Op(
    name="qk_norm_rope",
    function=qk_norm_rope,
    reference=qk_norm_rope_reference,
    make_inputs=_inputs,
    grads=("packed", "weights"),
    shapes=(
        {"B": 1, "L": 1, "P": 1, "N": 1, "H": 1, "K": 2, "rope": 0},
        {"B": 2, "L": 5, "P": 3, "N": 2, "H": 3, "K": 22},
        {"B": 2, "L": 37, "P": 3, "N": 2, "H": 2, "K": 128},
        {"B": 1, "L": 70, "P": 2, "N": 1, "H": 2, "K": 64, "rope": 0},
    ),
    model_shapes=(
        {"B": 1, "L": 6, "P": 3, "N": 2, "H": 16, "K": 128},
        {"B": 1, "L": 6, "P": 2, "N": 1, "H": 16, "K": 128, "rope": 0, "small": 1},
    ),
    # dw: all heads of all tokens.
    summed=lambda sizes: max(sizes["K"], sizes["B"] * sizes["L"] * sizes["H"]),
    real_shapes=_real_shapes,
    cost=_cost,
    cost_note="read and write the normed parts; read their gradient and them, write the gradient",
)
