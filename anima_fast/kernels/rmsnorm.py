"""y = n·w, n = round(x·r): the RMS norm with a learned weight, as the text networks round it.

    forward    r = 1/√(mean(x²) + ε)       n = x·r in w's dtype       y = n·w in w's dtype
    backward   g = dy·w       x̂ = x·r
               dx = r·(g − x̂·mean(g·x̂))
               dw = Σ_rows dy·n

Rounding n to the weight's dtype before the product is what the checkpoints were trained with. The
derivative takes that rounding for the identity, but dw multiplies the n that forward multiplied.
One read of x and one write of y where eager torch makes eleven passes. Nothing but x is kept, r is
computed again. Statistics, products and sums are float32. dw is a sum over rows: programs own
chunks of rows and write partial sums, which torch adds, so the result does not depend on timing.

Bytes, in units of x: forward 2 (x, y), backward 3 (dy, x, dx).
Source: Zhang & Sennrich 2019; the rounding is that of the Llama family's RMS norm.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from anima_fast.kernels import dispatch
from anima_fast.kernels.dispatch import rows
from anima_fast.kernels.layernorm_modulate import EPS, MAX_WIDTH, row_chunks
from anima_fast.kernels.op import Inputs, Op, Sizes, passes, randn, wide

# Elements of a tile, where a row has fewer. Backward gives them twice the warps of the other norms:
# with 16 elements a thread it spills on sm_80.
TILE = 2048


def rmsnorm_reference(x: Tensor, weight: Tensor) -> Tensor:
    """The definition; see `rmsnorm`."""
    x = wide(x)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    return (x * rstd).to(weight.dtype) * weight


@triton.jit
def _rmsnorm_fwd(
    X, W, Y, COUNT, x_r,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m = (o_r < COUNT)[:, None] & m_d[None, :]
    x = tl.load(X + o_r[:, None] * x_r + o_d[None, :], mask=m, other=0.0).to(ACC)
    w = tl.load(W + o_d, mask=m_d, other=0.0).to(ACC)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + EPS)
    n = (x * rstd[:, None]).to(W.dtype.element_ty).to(ACC)
    tl.store(Y + o_r[:, None] * D + o_d[None, :], n * w[None, :], mask=m)


@triton.jit
def _rmsnorm_bwd(
    DY, X, W, DX, DW, COUNT, chunk, dy_r, x_r,
    NEEDS_WEIGHT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    w = tl.load(W + o_d, mask=m_d, other=0.0).to(ACC)
    dw = tl.zeros([ROWS, BLOCK_D], dtype=ACC)
    for tile in range(part * chunk, tl.minimum(part * chunk + chunk, tl.cdiv(COUNT, ROWS))):
        o_r = tile * ROWS + tl.arange(0, ROWS)
        m = (o_r < COUNT)[:, None] & m_d[None, :]
        dy = tl.load(DY + o_r[:, None] * dy_r + o_d[None, :], mask=m, other=0.0).to(ACC)
        x = tl.load(X + o_r[:, None] * x_r + o_d[None, :], mask=m, other=0.0).to(ACC)
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + EPS)
        x_hat = x * rstd[:, None]
        if NEEDS_WEIGHT:
            dw += dy * x_hat.to(W.dtype.element_ty).to(ACC)
        # dx = r·(g − x̂·mean(g·x̂)), g = dy·w
        g = dy * w[None, :]
        mean = tl.sum(g * x_hat, 1) / D
        dx = rstd[:, None] * (g - x_hat * mean[:, None])
        tl.store(DX + o_r[:, None] * D + o_d[None, :], dx, mask=m)
    if NEEDS_WEIGHT:
        tl.store(DW + part * D + o_d, tl.sum(dw, 0), mask=m_d)


def _tile(width: int) -> tuple[int, int]:
    """Rows of a tile and elements of its rows."""
    block = dispatch.power_of_2(width)
    return max(1, TILE // block), block


def rmsnorm_forward(x: Tensor, weight: Tensor) -> Tensor:
    """y [..., D] in the weight's dtype, without autograd."""
    if not dispatch.runs_triton(x):
        return rmsnorm_reference(x, weight)
    width = x.shape[-1]
    flat, weight = rows(x.reshape(-1, width)), weight.contiguous()
    y = dispatch.empty(*x.shape, like=x, dtype=weight.dtype)
    tile_rows, block = _tile(width)
    _rmsnorm_fwd[(dispatch.cdiv(len(flat), tile_rows),)](
        flat, weight, y, len(flat), flat.stride(0),
        D=width, BLOCK_D=block, ROWS=tile_rows, EPS=EPS, ACC=dispatch.accumulator(x, weight),
        num_warps=dispatch.row_warps(tile_rows * block),
    )  # fmt: skip
    return y


def rmsnorm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, *, needs_weight: bool = True
) -> tuple[Tensor, Tensor | None]:
    """(dx, dweight) of dy [..., D]; dx [..., D] in x's dtype, dweight [D] wide or None."""
    if not dispatch.runs_triton(x):
        return _backward_reference(dy, x, weight, needs_weight)
    width = x.shape[-1]
    flat_dy, flat = rows(dy.reshape(-1, width)), rows(x.reshape(-1, width))
    weight = weight.contiguous()
    tile_rows, block = _tile(width)
    chunk, parts = row_chunks(dispatch.cdiv(len(flat), tile_rows), needs_weight)
    dx = dispatch.empty(*x.shape, like=x)
    dweight = dx
    if needs_weight:
        dweight = dispatch.empty(parts, width, like=x, dtype=dispatch.wide_dtype(x, weight))
    _rmsnorm_bwd[(parts,)](
        flat_dy, flat, weight, dx, dweight, len(flat), chunk, flat_dy.stride(0), flat.stride(0),
        NEEDS_WEIGHT=needs_weight,
        D=width, BLOCK_D=block, ROWS=tile_rows, EPS=EPS, ACC=dispatch.accumulator(x, weight),
        num_warps=dispatch.row_warps(2 * tile_rows * block),
    )  # fmt: skip
    return dx, dweight.sum(0) if needs_weight else None


def _backward_reference(
    dy: Tensor, x: Tensor, weight: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    x_wide, dy_wide = wide(x), wide(dy)
    rstd = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + EPS)
    x_hat = x_wide * rstd
    g = dy_wide * wide(weight)
    dx = rstd * (g - x_hat * (g * x_hat).mean(-1, keepdim=True))
    dweight = None
    if needs_weight:
        dweight = (dy_wide * x_hat.to(weight.dtype)).flatten(0, -2).sum(0)
    return dx.to(x.dtype), dweight


_op = torch.library.custom_op("anima_fast::rmsnorm", rmsnorm_forward, mutates_args=())
_op.register_fake(lambda x, weight: torch.empty(x.shape, dtype=weight.dtype, device=x.device))


@torch.library.custom_op("anima_fast::rmsnorm_backward", mutates_args=())
def _op_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dx, dweight = rmsnorm_backward(dy, x, weight)
    assert dweight is not None
    return dx, dweight.to(weight.dtype)


_op_backward.register_fake(lambda dy, x, weight: dispatch.dense(x, weight))


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
    return _op_backward(dy, *ctx.saved_tensors)


_op.register_autograd(_backward, setup_context=_setup)


def rmsnorm(x: Tensor, weight: Tensor) -> Tensor:
    """x/√(mean(x²) + ε) over the last dimension, rounded to the weight's dtype, times the weight.

    Args:
        x: [..., D], at least 2-D, D at most 8192, fp32, fp16 or bf16, any strides.
        weight: [D], any of these dtypes.

    Returns:
        [..., D] in the weight's dtype.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit.
    """
    if x.ndim < 2 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"x is {tuple(x.shape)}, expected [..., D] with D from 1 to {MAX_WIDTH}")
    dispatch.check_shape("weight", weight, "[D]", (x.shape[-1],))
    dispatch.check_dtypes(x=x, weight=weight)
    dispatch.check_devices(x=x, weight=weight)
    return _op(x, weight)


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device | str) -> Inputs:
    shape = [size for name, size in sizes.items() if name != "small"]
    return {
        "x": randn(*shape, dtype=dtype, device=device) * (0.01 if sizes.get("small") else 2),
        "weight": 1 + 0.3 * randn(sizes["D"], dtype=dtype, device=device),
    }


OP = Op(
    name="rmsnorm",
    function=rmsnorm,
    reference=rmsnorm_reference,
    make_inputs=_inputs,
    grads=("x", "weight"),
    shapes=(
        {"L": 1, "D": 2},
        {"B": 2, "L": 3, "D": 33},
        {"B": 3, "L": 35, "H": 1, "D": 64},
        {"B": 1, "L": 75, "D": 600},
        {"B": 1, "L": 2, "D": 5120},
    ),
    model_shapes=({"B": 1, "L": 9, "D": 2048}, {"B": 1, "L": 9, "D": 1024, "small": 1}),
    summed=lambda sizes: max(sizes["D"], sizes["L"]),
    real_shapes=lambda tokens: {
        "text": {"B": 1, "L": 512, "D": 1024},
        "image": {"B": 1, "L": tokens, "D": 2048},
    },
    cost=passes(2, 3),
    cost_note="read x, write y; read dy and x, write dx",
)
