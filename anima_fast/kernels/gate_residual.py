"""x' = x + gate·y: a sublayer's result enters the residual stream where no norm follows.

    forward    x' = x + gate·y
    backward   dx = dx'       dy = gate·dx'       dgate = Σ_L dx'·y

One kernel where eager torch makes two, a product and a sum. dx is dx' itself, not a copy. Backward
reads the gate, and y only for dgate, which a fused block asks for when an adapter sits on the AdaLN
layers; the operator always keeps both. Arithmetic is float32, rounded once. dgate is a sum over
tokens: programs own chunks of rows and write partial sums, which torch adds, so the result does not
depend on timing.

Bytes, in units of x: forward 3 (x, y, x'), backward 2 (dx', dy), 3 with dgate.
Source: adaLN-Zero's gate (Peebles & Xie 2022).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from anima_fast.kernels import dispatch
from anima_fast.kernels.dispatch import rows
from anima_fast.kernels.layernorm_modulate import check_modulation, row_chunks, row_op, row_sums
from anima_fast.kernels.op import wide
from anima_fast.kernels.row_powers import (
    load_row,
    opened,
    powers_of,
    store_row,
    stored,
    with_row_powers,
)


def gate_residual_reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """The definition; see `gate_residual`."""
    return stored(opened(x, gate.shape[-1]) + wide(gate)[:, None] * wide(y), x)


@triton.jit
def _gate_residual_fwd(
    X, Y, GATE, OUT, L, x_b, x_l, y_b, y_l, gate_b, out_b, out_l,
    POWERS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, l = row // L, row % L
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    x = load_row(X + b * x_b + l * x_l, o_d, m_d, D, POWERS, ACC)
    y = tl.load(Y + b * y_b + l * y_l + o_d, mask=m_d, other=0.0).to(ACC)
    gate = tl.load(GATE + b * gate_b + o_d, mask=m_d, other=0.0).to(ACC)
    store_row(OUT + b * out_b + l * out_l, x + gate * y, o_d, m_d, D, POWERS, ACC)


@triton.jit
def _gate_residual_bwd(
    DOUT, Y, GATE, DY, DGATE, L, chunk, dout_b, dout_l, y_b, y_l, gate_b,
    NEEDS_GATE: tl.constexpr, POWERS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    part, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    gate = tl.load(GATE + b * gate_b + o_d, mask=m_d, other=0.0).to(ACC)
    dgate = tl.zeros([BLOCK_D], dtype=ACC)
    for l in range(part * chunk, tl.minimum(part * chunk + chunk, L)):
        dout = load_row(DOUT + b * dout_b + l * dout_l, o_d, m_d, D, POWERS, ACC)
        tl.store(DY + (b * L + l) * D + o_d, gate * dout, mask=m_d)
        if NEEDS_GATE:
            dgate += dout * tl.load(Y + b * y_b + l * y_l + o_d, mask=m_d, other=0.0).to(ACC)
    if NEEDS_GATE:
        tl.store(DGATE + (b * tl.num_programs(0) + part) * D + o_d, dgate, mask=m_d)


def gate_residual_forward(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x' [B, L, D] as x holds its rows, without autograd."""
    if not dispatch.runs_triton(x):
        return gate_residual_reference(x, y, gate)
    x, y, gate = rows(x), rows(y), rows(gate)
    (batch, length, stored_width), width = x.shape, gate.shape[-1]
    out = dispatch.empty(batch, length, stored_width, like=x)
    block = dispatch.power_of_2(width)
    _gate_residual_fwd[(batch * length,)](
        x, y, gate, out, length, x.stride(0), x.stride(1), y.stride(0), y.stride(1),
        gate.stride(0), out.stride(0), out.stride(1), POWERS=powers_of(x, width),
        D=width, BLOCK_D=block, ACC=dispatch.accumulator(x),
        num_warps=dispatch.row_warps(block),
    )  # fmt: skip
    return out


def gate_residual_backward(
    dout: Tensor, y: Tensor | None, gate: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """(dy, dgate) of dout, the gradient of x' and x; dgate is wide [B, D], or None without `y`.

    `dtype`: of dy; dout's when None.
    """
    dtype = dtype or dout.dtype
    if not dispatch.runs_triton(dout):
        dout = opened(dout, gate.shape[-1])
        dgate = None if y is None else (dout * wide(y)).sum(1)
        return (dout * wide(gate)[:, None]).to(dtype), dgate
    needs_gate = y is not None
    dout, gate = rows(dout), rows(gate)
    y = rows(y) if needs_gate else dout
    (batch, length, _), width = dout.shape, gate.shape[-1]
    chunk, parts = row_chunks(length, needs_gate)
    dy = dispatch.empty(batch, length, width, like=dout, dtype=dtype)
    dgate = row_sums(1, parts, width, like=dout)[0] if needs_gate else dy
    block = dispatch.power_of_2(width)
    _gate_residual_bwd[(parts, batch)](
        dout, y, gate, dy, dgate, length, chunk, dout.stride(0), dout.stride(1),
        y.stride(0), y.stride(1), gate.stride(0),
        NEEDS_GATE=needs_gate, POWERS=powers_of(dout, width),
        D=width, BLOCK_D=block, ACC=dispatch.accumulator(dout),
        num_warps=dispatch.row_warps(block),
    )  # fmt: skip
    return dy, dgate.sum(1) if needs_gate else None


_op = torch.library.custom_op("anima_fast::gate_residual", gate_residual_forward, mutates_args=())
_op.register_fake(lambda x, y, gate: dispatch.dense(x)[0])


@torch.library.custom_op("anima_fast::gate_residual_backward", mutates_args=())
def _op_backward(dout: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    dy, dgate = gate_residual_backward(dout, y, gate, y.dtype)
    assert dgate is not None
    return dy, dgate.to(gate.dtype)


_op_backward.register_fake(lambda dout, y, gate: dispatch.dense(y, gate))


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx, dout: Tensor) -> tuple[Tensor, ...]:
    # dx is returned here: an operator may not return its argument.
    return dout, *_op_backward(dout, *ctx.saved_tensors)


_op.register_autograd(_backward, setup_context=_setup)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate·y, one gate per sample and channel.

    Args:
        x: [B, L, D], the residual stream, D at most 8192, fp32, fp16 or bf16, any strides; or
            rows with powers of two (row_powers.py).
        y: [B, L, D], the sublayer's result.
        gate: [B, D].

    Returns:
        [B, L, D] as x holds its rows.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit.
    """
    check_modulation(x, gate=gate)
    dispatch.check_shape("y", y, "[B, L, D]", (*x.shape[:2], gate.shape[-1]))
    dispatch.check_dtypes(y=y)
    dispatch.check_devices(x=x, y=y)
    return _op(x, y, gate)


OP = row_op(
    gate_residual,
    gate_residual_reference,
    ("x", "y", "gate"),
    bytes=(3, 2),
    cost_note="read x and y, write x'; read dx', write dy",
)
POWERS = with_row_powers(OP, ({"B": 2, "L": 3, "D": 33}, {"B": 2, "L": 9, "D": 64}))
