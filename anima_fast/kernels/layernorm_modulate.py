"""h = LN(x)·(1 + scale) + shift, the modulated norm in front of every sublayer.

    forward    x̂ = (x − μ)·r,  r = 1/√(var + ε)          h = x̂·(1 + scale) + shift
    backward   g = dh·(1 + scale)
               dx = r·(g − mean(g) − x̂·mean(g·x̂)) + dres
               dscale = Σ_L dh·x̂     dshift = Σ_L dh

One read of x and one write of h where eager torch makes six passes. Nothing but x is kept: the row
statistics are computed again from the row that backward reads anyway. `dres`, the gradient that
reaches x along the residual stream, is added in the same pass. Statistics, products and sums are
float32; h is rounded once. Gradients of scale and shift are sums over tokens: programs own chunks
of rows and write partial sums, which torch adds, so the result does not depend on timing.

Bytes, in units of x: forward 2 (read x, write h), backward 3 (dh, x, dx), 4 with dres.
Sources: Ba et al. 2016 (layer norm), Peebles & Xie 2022 (adaLN); the backward is the textbook one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from anima_fast.kernels import dispatch
from anima_fast.kernels.dispatch import rows
from anima_fast.kernels.op import Inputs, Op, Sizes, passes, randn, wide
from anima_fast.kernels.row_powers import (
    TAIL,
    load_row,
    opened,
    powers_of,
    store_row,
    stored,
    with_row_powers,
)

EPS = 1e-6
MAX_WIDTH = 8192
# Programs per sample that each sum their rows' share of dscale and dshift: enough for the
# multiprocessors of any card, but so many rows each that the sums are few in comparison.
CHUNKS, LEAST_ROWS = 256, 4


def layernorm_modulate_reference(
    x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """The definition; see `layernorm_modulate`."""
    x_wide = opened(x, scale.shape[-1])
    normed = torch.nn.functional.layer_norm(x_wide, x_wide.shape[-1:], eps=EPS)
    return (normed * (1 + wide(scale)[:, None]) + wide(shift)[:, None]).to(dtype or x.dtype)


@triton.jit
def normalized(x, m_d, D: tl.constexpr, EPS: tl.constexpr):
    """x̂ and r of one row held in registers; x̂ is 0 beyond D."""
    mean = tl.sum(x, 0) / D
    centred = tl.where(m_d, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + EPS)
    return centred * rstd, rstd


@triton.jit
def layernorm_dx(g, x_hat, rstd, D: tl.constexpr):
    """dx = r·(g − mean(g) − x̂·mean(g·x̂)); g is 0 beyond D."""
    return rstd * (g - tl.sum(g, 0) / D - x_hat * (tl.sum(g * x_hat, 0) / D))


@triton.jit
def _layernorm_modulate_fwd(
    X, SCALE, SHIFT, H, L, x_b, x_l, scale_b, shift_b,
    POWERS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, l = row // L, row % L
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    x = load_row(X + b * x_b + l * x_l, o_d, m_d, D, POWERS, ACC)
    scale = tl.load(SCALE + b * scale_b + o_d, mask=m_d, other=0.0).to(ACC)
    x_hat, _ = normalized(x, m_d, D, EPS)
    # Not earlier: with scale and shift waiting in registers ptxas spills on sm_90.
    shift = tl.load(SHIFT + b * shift_b + o_d, mask=m_d, other=0.0).to(ACC)
    tl.store(H + row * D + o_d, x_hat * (1.0 + scale) + shift, mask=m_d)


@triton.jit
def _layernorm_modulate_bwd(
    DH, X, SCALE, DRES, DX, DSCALE, DSHIFT,
    L, chunk, dh_b, dh_l, x_b, x_l, scale_b, dres_b, dres_l, dx_b, dx_l,
    HAS_RES: tl.constexpr, NEEDS_MODULATION: tl.constexpr, POWERS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    part, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    scale = tl.load(SCALE + b * scale_b + o_d, mask=m_d, other=0.0).to(ACC)
    dscale = tl.zeros([BLOCK_D], dtype=ACC)
    dshift = tl.zeros([BLOCK_D], dtype=ACC)
    for l in range(part * chunk, tl.minimum(part * chunk + chunk, L)):
        dh = tl.load(DH + b * dh_b + l * dh_l + o_d, mask=m_d, other=0.0).to(ACC)
        x = load_row(X + b * x_b + l * x_l, o_d, m_d, D, POWERS, ACC)
        x_hat, rstd = normalized(x, m_d, D, EPS)
        dx = layernorm_dx(dh * (1.0 + scale), x_hat, rstd, D)
        if HAS_RES:
            dx += load_row(DRES + b * dres_b + l * dres_l, o_d, m_d, D, POWERS, ACC)
        store_row(DX + b * dx_b + l * dx_l, dx, o_d, m_d, D, POWERS, ACC)
        if NEEDS_MODULATION:
            dscale += dh * x_hat
            dshift += dh
    if NEEDS_MODULATION:
        o_part = (b * tl.num_programs(0) + part) * D + o_d
        tl.store(DSCALE + o_part, dscale, mask=m_d)
        tl.store(DSHIFT + o_part, dshift, mask=m_d)


def row_chunks(length: int, needs_sums: bool) -> tuple[int, int]:
    """Rows per program and programs per sample of a backward pass."""
    chunk = max(LEAST_ROWS, dispatch.cdiv(length, CHUNKS)) if needs_sums else 1
    return chunk, dispatch.cdiv(length, chunk)


def row_sums(count: int, parts: int, width: int, *, like: Tensor) -> list[Tensor]:
    """Buffers [B, parts, D] for partial sums over the tokens of `like` [B, L, ·], wide."""
    batch = like.shape[0]
    dtype = dispatch.wide_dtype(like)
    return [dispatch.empty(batch, parts, width, like=like, dtype=dtype) for _ in range(count)]


def layernorm_modulate_forward(
    x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype
) -> Tensor:
    """h [B, L, D] in `dtype`, without autograd."""
    if not dispatch.runs_triton(x):
        return layernorm_modulate_reference(x, scale, shift, dtype)
    x, scale, shift = rows(x), rows(scale), rows(shift)
    (batch, length, _), width = x.shape, scale.shape[-1]
    h = dispatch.empty(batch, length, width, like=x, dtype=dtype)
    block = dispatch.power_of_2(width)
    _layernorm_modulate_fwd[(batch * length,)](
        x, scale, shift, h, length, x.stride(0), x.stride(1), scale.stride(0), shift.stride(0),
        POWERS=powers_of(x, width),
        D=width, BLOCK_D=block, EPS=EPS, ACC=dispatch.accumulator(x),
        num_warps=dispatch.row_warps(block),
    )  # fmt: skip
    return h


def layernorm_modulate_backward(
    dh: Tensor,
    x: Tensor,
    scale: Tensor,
    *,
    residual: Tensor | None = None,
    needs_modulation: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dx, dscale, dshift) of dh; dx as x holds its rows, the others [B, D] wide or None.

    `residual`: a gradient of x to add, in x's form; `needs_modulation`: compute dscale and dshift.
    """
    if not dispatch.runs_triton(x):
        return _backward_reference(dh, x, scale, residual, needs_modulation)
    dh, x, scale = rows(dh), rows(x), rows(scale)
    res = x if residual is None else rows(residual)
    (batch, length, stored_width), width = x.shape, scale.shape[-1]
    chunk, parts = row_chunks(length, needs_modulation)
    dx = dispatch.empty(batch, length, stored_width, like=x)
    dscale = dshift = dx
    if needs_modulation:
        dscale, dshift = row_sums(2, parts, width, like=x)
    block = dispatch.power_of_2(width)
    _layernorm_modulate_bwd[(parts, batch)](
        dh, x, scale, res, dx, dscale, dshift, length, chunk,
        dh.stride(0), dh.stride(1), x.stride(0), x.stride(1), scale.stride(0),
        res.stride(0), res.stride(1), dx.stride(0), dx.stride(1),
        HAS_RES=residual is not None, NEEDS_MODULATION=needs_modulation,
        POWERS=powers_of(x, width),
        D=width, BLOCK_D=block, EPS=EPS, ACC=dispatch.accumulator(x),
        num_warps=dispatch.row_warps(block),
    )  # fmt: skip
    return (dx, dscale.sum(1), dshift.sum(1)) if needs_modulation else (dx, None, None)


def _backward_reference(
    dh: Tensor, x: Tensor, scale: Tensor, residual: Tensor | None, needs_modulation: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x_wide, dh_wide = opened(x, scale.shape[-1]), wide(dh)
    var, mean = torch.var_mean(x_wide, -1, correction=0, keepdim=True)
    rstd = torch.rsqrt(var + EPS)
    x_hat = (x_wide - mean) * rstd
    g = dh_wide * (1 + wide(scale)[:, None])
    dx = rstd * (g - g.mean(-1, keepdim=True) - x_hat * (g * x_hat).mean(-1, keepdim=True))
    if residual is not None:
        dx = dx + opened(residual, scale.shape[-1])
    dx = stored(dx, x)
    if not needs_modulation:
        return dx, None, None
    return dx, (dh_wide * x_hat).sum(1), dh_wide.sum(1)


_op = torch.library.custom_op(
    "anima_fast::layernorm_modulate", layernorm_modulate_forward, mutates_args=()
)


@_op.register_fake
def _(x, scale, shift, dtype):
    return torch.empty((*x.shape[:-1], scale.shape[-1]), dtype=dtype, device=x.device)


@torch.library.custom_op("anima_fast::layernorm_modulate_backward", mutates_args=())
def _op_backward(
    dh: Tensor, x: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dscale, dshift = layernorm_modulate_backward(dh, x, scale)
    assert dscale is not None and dshift is not None
    return dx, dscale.to(scale.dtype), dshift.to(shift.dtype)


_op_backward.register_fake(lambda dh, x, scale, shift: dispatch.dense(x, scale, shift))


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx, dh: Tensor) -> tuple[Tensor | None, ...]:
    return *_op_backward(dh, *ctx.saved_tensors), None


_op.register_autograd(_backward, setup_context=_setup)


def layernorm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """LN(x)·(1 + scale) + shift over the last dimension, without learned weights.

    Args:
        x: [B, L, D], D at most 8192, fp32, fp16 or bf16, any strides; or rows with powers of two.
        scale, shift: [B, D], any of these dtypes.
        dtype: of the result; x's when None.

    Returns:
        [B, L, D].

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit.
    """
    check_modulation(x, scale=scale, shift=shift)
    return _op(x, scale, shift, dtype or x.dtype)


def check_modulation(x: Tensor, **vectors: Tensor) -> None:
    """Refuse an x that is not [B, L, D], or modulation vectors that are not [B, D].

    x may have a power of two behind each row (row_powers.py).
    """
    if x.ndim != 3 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"x is {tuple(x.shape)}, expected [B, L, D] with D from 1 to {MAX_WIDTH}")
    widths = {vector.shape[-1] for vector in vectors.values() if vector.ndim}
    packed = x.dtype == torch.float16 and widths == {x.shape[2] - TAIL}
    width = x.shape[2] - TAIL if packed else x.shape[2]
    for name, vector in vectors.items():
        dispatch.check_shape(name, vector, "[B, D]", (x.shape[0], width))
    dispatch.check_dtypes(x=x, **vectors)
    dispatch.check_devices(x=x, **vectors)


def row_op(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    names: tuple[str, ...],
    *,
    bytes: tuple[int, int],
    cost_note: str,
) -> Op:
    """An op of tokens x, y [B, L, D] and modulation vectors [B, D], all of which get gradients.

    `bytes`: of forward and backward, in units of x.
    """
    return Op(
        name=function.__name__,
        function=function,
        reference=reference,
        make_inputs=partial(_inputs, names),
        grads=names,
        shapes=(
            {"B": 1, "L": 1, "D": 1},
            {"B": 2, "L": 3, "D": 33},
            {"B": 2, "L": 38, "D": 64},
            {"B": 1, "L": 2, "D": 5120},
        ),
        model_shapes=({"B": 1, "L": 9, "D": 2048}, {"B": 1, "L": 9, "D": 2048, "small": 1}),
        # Statistics sum a row, the gradients of the vectors all tokens.
        summed=lambda sizes: max(sizes["D"], sizes["L"]),
        real_shapes=lambda tokens: {"": {"B": 1, "L": tokens, "D": 2048}},
        cost=passes(*bytes),
        cost_note=cost_note,
    )


def _inputs(
    names: tuple[str, ...], sizes: Sizes, dtype: torch.dtype, device: torch.device | str
) -> Inputs:
    b, l, d = sizes["B"], sizes["L"], sizes["D"]
    shapes = {name: (b, l, d) if name in ("x", "y") else (b, d) for name in names}
    drawn = {name: randn(*shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    drawn["x"] = drawn["x"] * 2 + 1
    if sizes.get("small"):
        # A variance of 1e-4, beside which a wrong ε of 1e-6 shows in any type.
        drawn["x"] = drawn["x"] * 5e-3
    if "scale" in drawn:
        drawn["scale"] = drawn["scale"] * 0.5
    return drawn


OP = row_op(
    layernorm_modulate,
    layernorm_modulate_reference,
    ("x", "scale", "shift"),
    bytes=(2, 3),
    cost_note="read x, write h; read dh and x, write dx",
)
POWERS = with_row_powers(OP, ({"B": 2, "L": 3, "D": 33}, {"B": 2, "L": 9, "D": 64}))
