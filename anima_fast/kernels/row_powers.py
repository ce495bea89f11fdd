"""Rows of float16 with a power of two each: how the residual stream and its gradient are stored.

    stored [..., D + TAIL]     x ≈ m·2^p     m the first D values, p the value after them

The residual stream of the model exceeds what float16 can hold, while a row of it, divided by a
power of two, does not: its largest entry comes to lie in [2¹⁴, 2¹⁵), so that entries down to
2⁻²⁸ of it keep all their digits. The power lies behind its row, in the same tensor: whatever
copies, moves or keeps x takes it along, and only the kernels that own whole rows know of it. They
see it by the width, which the modulation vectors [B, D] give: `powers_of`.

Zeros fill the rest of the tail, which keeps rows aligned to the 32 bytes of a memory sector. A row
that holds an infinity or NaN keeps it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from anima_fast.kernels import dispatch
from anima_fast.kernels.op import Op, Sizes, wide

TAIL = 16
# The largest entry of a stored row is at least 2 to this.
TOP = 14
# Powers of two of the rows' largest entries: within them both factors are normal in float32.
LOWEST, HIGHEST = -100, 127
_TAIL, _TOP = tl.constexpr(TAIL), tl.constexpr(TOP)
_LOWEST, _HIGHEST = tl.constexpr(LOWEST), tl.constexpr(HIGHEST)


def powers_of(x: Tensor, width: int) -> bool:
    """Whether x [..., W] holds rows of `width` with a power of two each; else they are plain.

    Raises `ValueError` when it holds neither.
    """
    if x.shape[-1] == width:
        return False
    if x.shape[-1] != width + TAIL or x.dtype != torch.float16:
        raise ValueError(
            f"x is {tuple(x.shape)} {x.dtype}, expected rows of {width}, or of {width + TAIL} "
            "float16 with their powers of two"
        )
    return True


def opened(x: Tensor, width: int) -> Tensor:
    """The rows [..., D] in float32 (float64 of that), by torch."""
    if not powers_of(x, width):
        return wide(x)
    return torch.ldexp(x[..., :width].float(), x[..., width : width + 1].int())


def stored(x: Tensor, like: Tensor) -> Tensor:
    """x [..., D] wide, as `like` holds its rows: in its dtype, or with powers of two; by torch."""
    if not powers_of(like, x.shape[-1]):
        return x.to(like.dtype)
    _, exponent = torch.frexp(x.abs().nan_to_num(0.0).amax(-1, keepdim=True))
    power = (exponent - 1).clamp(LOWEST, HIGHEST) - TOP
    tail = x.new_zeros(*x.shape[:-1], TAIL - 1)
    return torch.cat([torch.ldexp(x, -power), power, tail], -1).half()


@triton.jit
def power_of_two(p):
    """2^p in float32 of a normal power, made of its bits."""
    return ((p + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_row(X, o_d, m_d, D: tl.constexpr, POWERS: tl.constexpr, ACC: tl.constexpr):
    """A row as ACC; 0 beyond D."""
    if POWERS:
        factor = power_of_two(tl.load(X + D).to(tl.int32))
        x = tl.load(X + o_d, mask=m_d, other=0.0).to(ACC) * factor
    else:
        x = tl.load(X + o_d, mask=m_d, other=0.0).to(ACC)
    return x


@triton.jit
def store_row(OUT, x, o_d, m_d, D: tl.constexpr, POWERS: tl.constexpr, ACC: tl.constexpr):
    """Store a row, 0 beyond D; returns it as it is stored."""
    if POWERS:
        bits = tl.max(tl.abs(x), 0).to(tl.float32).to(tl.int32, bitcast=True)
        power = tl.minimum(tl.maximum((bits >> 23) - 127, _LOWEST), _HIGHEST) - _TOP
        m = (x * power_of_two(-power)).to(OUT.dtype.element_ty)
        tl.store(OUT + o_d, m, mask=m_d)
        o_tail = tl.arange(0, _TAIL)
        tl.store(OUT + D + o_tail, tl.where(o_tail == 0, power, 0).to(OUT.dtype.element_ty))
        x = m.to(ACC) * power_of_two(power)
    else:
        m = x.to(OUT.dtype.element_ty)
        tl.store(OUT + o_d, m, mask=m_d)
        x = m.to(ACC)
    return x


@triton.jit
def _convert_rows(
    X, OUT, x_b, x_l, out_b, out_l, L, IN: tl.constexpr, TO: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, l = row // L, row % L
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    x = load_row(X + b * x_b + l * x_l, o_d, m_d, D, IN, ACC)
    store_row(OUT + b * out_b + l * out_l, x, o_d, m_d, D, TO, ACC)


def _converted(x: Tensor, like: Tensor, width: int) -> Tensor:
    """The rows of x [B, L, ·] as `like` [B, L, ·] holds its own."""
    if not dispatch.runs_triton(x):
        return stored(opened(x, width), like)
    x = dispatch.rows(x)
    batch, length, _ = x.shape
    out = dispatch.empty(batch, length, like.shape[-1], like=x, dtype=like.dtype)
    block = dispatch.power_of_2(width)
    _convert_rows[(batch * length,)](
        x, out, x.stride(0), x.stride(1), out.stride(0), out.stride(1), length,
        IN=powers_of(x, width), TO=powers_of(like, width),
        D=width, BLOCK_D=block, ACC=dispatch.accumulator(x),
        num_warps=dispatch.row_warps(block),
    )  # fmt: skip
    return out


class _Convert(torch.autograd.Function):
    """Rows in another form; their gradients go back in the form of what was given."""

    @staticmethod
    def forward(ctx, x: Tensor, like: Tensor, width: int) -> Tensor:
        # Of no elements, but with the form of x.
        ctx.like, ctx.width = x.new_empty(0, x.shape[-1]), width
        return _converted(x, like, width)

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, None, None]:
        return _converted(dout, ctx.like, ctx.width), None, None


def with_powers(x: Tensor) -> Tensor:
    """x [B, L, D] as rows of float16 with a power of two each, [B, L, D + TAIL]; with autograd.

    Gradients of the result are rows of the same form.
    """
    width = x.shape[-1]
    return _Convert.apply(x, x.new_empty(0, width + TAIL, dtype=torch.float16), width)


def without_powers(x: Tensor) -> Tensor:
    """Rows of float16 with a power of two each as float32 [B, L, D]; with autograd."""
    width = x.shape[-1] - TAIL
    return _Convert.apply(x, x.new_empty(0, width, dtype=torch.float32), width)


def with_row_powers(op: Op, shapes: tuple[Sizes, ...]) -> Op:
    """The variant of a row op whose x has powers of two, for the registry, at a few shapes."""

    def function(x: Tensor, **inputs: Any) -> Tensor | tuple[Tensor, ...]:
        found = op.function(with_powers(x), **inputs)
        results = found if isinstance(found, tuple) else (found,)
        width = x.shape[-1]
        plain = [without_powers(t).half() if powers_of(t, width) else t for t in results]
        return tuple(plain) if isinstance(found, tuple) else plain[0]

    return dataclasses.replace(
        op,
        name=f"{op.name}_powers",
        function=function,
        shapes=shapes,
        model_shapes=op.model_shapes[:1],
        dtypes=(torch.float16,),
        cost_note=f"as {op.name}",
    )
