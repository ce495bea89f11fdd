"""x' = x + gate·y and h = LN(x')·(1 + scale) + shift: the seam between two sublayers.

    forward    x' = x + gate·y                 h = x̂'·(1 + scale) + shift
    backward   dr = dx' + LN'(dh; x')          dx = dr     dy = gate·dr
               dgate = Σ_L dr·y    dscale = Σ_L dh·x̂'    dshift = Σ_L dh

One kernel ends a sublayer (gate and residual) and begins the next one (norm and modulation), so x'
is written once and never read back. x' is rounded as it is stored before it is
normed: forward and backward norm the same numbers. Kept for backward: x', and y only where dgate is
wanted (an adapter on the AdaLN layers). Arithmetic is float32; sums over tokens go through partial
sums.

Bytes, in units of x: forward 4 (x, y, x', h), backward 5 (dx', dh, x', dx, dy), 6 with dgate.
Sources: as layernorm_modulate.py; the gate is adaLN-Zero's (Peebles & Xie 2022).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from anima_fast.kernels import dispatch
from anima_fast.kernels.dispatch import rows
from anima_fast.kernels.layernorm_modulate import (
    EPS,
    check_modulation,
    layernorm_dx,
    layernorm_modulate_backward,
    layernorm_modulate_reference,
    normalized,
    row_chunks,
    row_op,
    row_sums,
)
from anima_fast.kernels.op import wide
from anima_fast.kernels.row_powers import (
    load_row,
    opened,
    powers_of,
    store_row,
    stored,
    with_row_powers,
)


def gate_residual_layernorm_modulate_reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition; see `gate_residual_layernorm_modulate`."""
    x = stored(opened(x, gate.shape[-1]) + wide(gate)[:, None] * wide(y), x)
    return x, layernorm_modulate_reference(x, scale, shift, dtype or x.dtype)


@triton.jit
def _gate_residual_layernorm_modulate_fwd(
    X, Y, GATE, SCALE, SHIFT, XOUT, H,
    L, x_b, x_l, y_b, y_l, gate_b, scale_b, shift_b, xout_b, xout_l,
    POWERS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, l = row // L, row % L
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    x = load_row(X + b * x_b + l * x_l, o_d, m_d, D, POWERS, ACC)
    y = tl.load(Y + b * y_b + l * y_l + o_d, mask=m_d, other=0.0).to(ACC)
    gate = tl.load(GATE + b * gate_b + o_d, mask=m_d, other=0.0).to(ACC)
    scale = tl.load(SCALE + b * scale_b + o_d, mask=m_d, other=0.0).to(ACC)
    shift = tl.load(SHIFT + b * shift_b + o_d, mask=m_d, other=0.0).to(ACC)
    # As stored: the norm and its backward see the same x'.
    x_out = x + gate * y
    x_out = store_row(XOUT + b * xout_b + l * xout_l, x_out, o_d, m_d, D, POWERS, ACC)
    x_hat, _ = normalized(x_out, m_d, D, EPS)
    tl.store(H + row * D + o_d, x_hat * (1.0 + scale) + shift, mask=m_d)


@triton.jit
def _gate_residual_layernorm_modulate_bwd(
    DXOUT, DH, XOUT, Y, GATE, SCALE, DX, DY, DGATE, DSCALE, DSHIFT,
    L, chunk, dxout_b, dxout_l, dh_b, dh_l, x_b, x_l, y_b, y_l, gate_b, scale_b, dx_b, dx_l,
    NEEDS_MODULATION: tl.constexpr, POWERS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    part, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    gate = tl.load(GATE + b * gate_b + o_d, mask=m_d, other=0.0).to(ACC)
    scale = tl.load(SCALE + b * scale_b + o_d, mask=m_d, other=0.0).to(ACC)
    dgate = tl.zeros([BLOCK_D], dtype=ACC)
    dscale = tl.zeros([BLOCK_D], dtype=ACC)
    dshift = tl.zeros([BLOCK_D], dtype=ACC)
    for l in range(part * chunk, tl.minimum(part * chunk + chunk, L)):
        dh = tl.load(DH + b * dh_b + l * dh_l + o_d, mask=m_d, other=0.0).to(ACC)
        x = load_row(XOUT + b * x_b + l * x_l, o_d, m_d, D, POWERS, ACC)
        x_hat, rstd = normalized(x, m_d, D, EPS)
        # dr = dx' + r·(g − mean(g) − x̂·mean(g·x̂)), g = dh·(1 + scale)
        dr = load_row(DXOUT + b * dxout_b + l * dxout_l, o_d, m_d, D, POWERS, ACC)
        dr += layernorm_dx(dh * (1.0 + scale), x_hat, rstd, D)
        store_row(DX + b * dx_b + l * dx_l, dr, o_d, m_d, D, POWERS, ACC)
        tl.store(DY + (b * L + l) * D + o_d, gate * dr, mask=m_d)
        if NEEDS_MODULATION:
            dgate += dr * tl.load(Y + b * y_b + l * y_l + o_d, mask=m_d, other=0.0).to(ACC)
            dscale += dh * x_hat
            dshift += dh
    if NEEDS_MODULATION:
        o_part = (b * tl.num_programs(0) + part) * D + o_d
        tl.store(DGATE + o_part, dgate, mask=m_d)
        tl.store(DSCALE + o_part, dscale, mask=m_d)
        tl.store(DSHIFT + o_part, dshift, mask=m_d)


def gate_residual_layernorm_modulate_forward(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(x' as x holds its rows, h in `dtype`), both [B, L, D], without autograd."""
    if not dispatch.runs_triton(x):
        return gate_residual_layernorm_modulate_reference(x, y, gate, scale, shift, dtype)
    x, y, gate, scale, shift = (rows(t) for t in (x, y, gate, scale, shift))
    (batch, length, stored_width), width = x.shape, gate.shape[-1]
    x_out = dispatch.empty(batch, length, stored_width, like=x)
    h = dispatch.empty(batch, length, width, like=x, dtype=dtype)
    block = dispatch.power_of_2(width)
    _gate_residual_layernorm_modulate_fwd[(batch * length,)](
        x, y, gate, scale, shift, x_out, h, length, x.stride(0), x.stride(1), y.stride(0),
        y.stride(1), gate.stride(0), scale.stride(0), shift.stride(0),
        x_out.stride(0), x_out.stride(1), POWERS=powers_of(x, width),
        D=width, BLOCK_D=block, EPS=EPS, ACC=dispatch.accumulator(x),
        num_warps=dispatch.row_warps(block),
    )  # fmt: skip
    return x_out, h


def gate_residual_layernorm_modulate_backward(
    dx_out: Tensor,
    dh: Tensor,
    x_out: Tensor,
    y: Tensor | None,
    gate: Tensor,
    scale: Tensor,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dy, dgate, dscale, dshift); the last three are wide [B, D], or None without `y`.

    Args:
        dx_out, dh: gradients [B, L, D] of both outputs.
        x_out: x', as the forward returned it.
        y: as given to the forward; None when no modulation vector needs its gradient.
        dtype: of dy; dh's when None.
    """
    dtype = dtype or dh.dtype
    if not dispatch.runs_triton(x_out):
        width = gate.shape[-1]
        # In the wide type up to here: dy and dgate read dr before it is rounded.
        dr, *of_norm = layernorm_modulate_backward(
            wide(dh),
            opened(x_out, width),
            scale,
            residual=opened(dx_out, width),
            needs_modulation=y is not None,
        )
        dgate = None if y is None else (dr * wide(y)).sum(1)
        return stored(dr, x_out), (dr * wide(gate)[:, None]).to(dtype), dgate, *of_norm
    needs_modulation = y is not None
    y = x_out if y is None else rows(y)
    dx_out, dh, x_out, gate, scale = (rows(t) for t in (dx_out, dh, x_out, gate, scale))
    (batch, length, stored_width), width = x_out.shape, gate.shape[-1]
    chunk, parts = row_chunks(length, needs_modulation)
    dx = dispatch.empty(batch, length, stored_width, like=x_out)
    dy = dispatch.empty(batch, length, width, like=x_out, dtype=dtype)
    sums = row_sums(3, parts, width, like=x_out) if needs_modulation else [dx, dx, dx]
    block = dispatch.power_of_2(width)
    _gate_residual_layernorm_modulate_bwd[(parts, batch)](
        dx_out, dh, x_out, y, gate, scale, dx, dy, *sums, length, chunk,
        dx_out.stride(0), dx_out.stride(1), dh.stride(0), dh.stride(1),
        x_out.stride(0), x_out.stride(1), y.stride(0), y.stride(1),
        gate.stride(0), scale.stride(0), dx.stride(0), dx.stride(1),
        NEEDS_MODULATION=needs_modulation, POWERS=powers_of(x_out, width),
        D=width, BLOCK_D=block, EPS=EPS, ACC=dispatch.accumulator(x_out),
        num_warps=dispatch.row_warps(block),
    )  # fmt: skip
    if not needs_modulation:
        return dx, dy, None, None, None
    return dx, dy, *(s.sum(1) for s in sums)


_op = torch.library.custom_op(
    "anima_fast::gate_residual_layernorm_modulate",
    gate_residual_layernorm_modulate_forward,
    mutates_args=(),
)


@_op.register_fake
def _(x, y, gate, scale, shift, dtype):
    return *dispatch.dense(x), torch.empty(
        (*x.shape[:-1], gate.shape[-1]), dtype=dtype, device=x.device
    )


@torch.library.custom_op("anima_fast::gate_residual_layernorm_modulate_backward", mutates_args=())
def _op_backward(
    dx_out: Tensor, dh: Tensor, x_out: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dy, dgate, dscale, dshift = gate_residual_layernorm_modulate_backward(
        dx_out, dh, x_out, y, gate, scale, dtype=y.dtype
    )
    assert dgate is not None and dscale is not None and dshift is not None
    return dx, dy, dgate.to(gate.dtype), dscale.to(scale.dtype), dshift.to(shift.dtype)


_op_backward.register_fake(lambda dx_out, dh, *others: dispatch.dense(*others))


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[0], *inputs[1:5])


def _backward(ctx, dx_out: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
    return *_op_backward(dx_out, dh, *ctx.saved_tensors), None


_op.register_autograd(_backward, setup_context=_setup)


def gate_residual_layernorm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The gated residual and the modulated norm of its result.

    Args:
        x: [B, L, D], the residual stream, D at most 8192, fp32, fp16 or bf16, any strides; or
            rows with powers of two (row_powers.py).
        y: [B, L, D], the sublayer's result.
        gate, scale, shift: [B, D].
        dtype: of h; x's when None.

    Returns:
        x' = x + gate·y as x holds its rows and h = LN(x')·(1 + scale) + shift, both [B, L, D].

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit.
    """
    check_modulation(x, gate=gate, scale=scale, shift=shift)
    dispatch.check_shape("y", y, "[B, L, D]", (*x.shape[:2], gate.shape[-1]))
    dispatch.check_dtypes(y=y)
    dispatch.check_devices(x=x, y=y)
    return _op(x, y, gate, scale, shift, dtype or x.dtype)


OP = row_op(
    gate_residual_layernorm_modulate,
    gate_residual_layernorm_modulate_reference,
    ("x", "y", "gate", "scale", "shift"),
    bytes=(4, 5),
    cost_note="read x and y, write x' and h; read dx', dh and x', write dx and dy",
)
POWERS = with_row_powers(OP, ({"B": 2, "L": 3, "D": 33}, {"B": 2, "L": 9, "D": 64}))
