"""g = a·Φ(a), the exact GELU: Φ(a) = ½·(1 + erf(a/√2)) is the normal distribution.

    forward    g = a·Φ(a)
    backward   da = dg·(Φ(a) + a·φ(a))       φ(a) = exp(−a²/2)/√(2π)

Only a is kept: GELU is not monotonic, so a cannot be recovered from g. Arithmetic is float32,
rounded once. Bytes, in units of a: forward 2, backward 3.

Where the MLP fuses it. In the block, 2048 → 8192 → 2048 over 4096 tokens in 16 bit, a unit is
64 MiB, and separate kernels move (writes + reads, each value counted once):

    forward    GEMM 1 writes a, GELU reads a and writes g, GEMM 2 reads g            4 units
    backward   dx-GEMM writes dg, GELU reads dg and a and writes da, the next
               dx-GEMM reads da; the adapter of GEMM 2 reads g, kept or rebuilt      6 units

Fused into the load of GEMM 2's operand, forward moves 2 units, but a is read, and its erf taken,
once per column of output tiles: 2048/128 = 16 times at tile width 128, 537 million erfs for 34
million. At some 33 instructions each (as compiled for sm_89) that fills every issue slot of an RTX
4090 for 0.4 ms by its data sheet, half the 0.8 ms of the GEMM, and an operand that passes through
registers leaves the asynchronous copy to shared memory. In the epilogue of GEMM 1 each erf is taken
once, on accumulators that are there anyway, with a and g written and g read: 3 units, and the unit
more than the other way takes 0.07 ms of the same card's bandwidth. Hence the epilogue; without a
backward it writes g alone, 2 units.

Backward multiplies the slope in the epilogue of GEMM 2's dx-GEMM, where a is read and da written,
and the next dx-GEMM reads da: 3 units. The adapter's gradient takes g against at most a few dozen
rows, one column of tiles: there g is computed again, once, as a is loaded, and never kept. That
unit included, 4 instead of 6. `gelu_value` and `gelu_slope` are for these kernels.

Where a library makes the product, its result comes and goes once more to get the adapter's part;
that kernel takes GELU along: forward reads a and writes a and g, backward reads dg and a and writes
da and g, where two and three kernels would each read their input again.

Source: Hendrycks & Gimpel 2016.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from anima_fast.kernels import dispatch
from anima_fast.kernels.op import Inputs, Op, Sizes, passes, randn, wide

# Elements of a program: 16 for each thread of 8 warps.
TILE = 4096


def gelu_reference(a: Tensor) -> Tensor:
    """The definition; see `gelu`."""
    return torch.nn.functional.gelu(wide(a)).to(a.dtype)


@triton.jit
def gelu_value(a):
    """a·Φ(a); `a` is in the accumulator type."""
    return 0.5 * a * (1.0 + tl.math.erf(a * 0.7071067811865476))


@triton.jit
def gelu_slope(a):
    """Φ(a) + a·φ(a), the derivative of `gelu_value`."""
    density = 0.3989422804014327 * tl.math.exp(-0.5 * a * a)
    return 0.5 * (1.0 + tl.math.erf(a * 0.7071067811865476)) + a * density


@triton.jit
def _gelu_fwd(A, G, COUNT, TILE: tl.constexpr, ACC: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    m = o < COUNT
    a = tl.load(A + o, mask=m, other=0.0).to(ACC)
    tl.store(G + o, gelu_value(a), mask=m)


@triton.jit
def _gelu_bwd(DG, A, DA, COUNT, TILE: tl.constexpr, ACC: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    m = o < COUNT
    dg = tl.load(DG + o, mask=m, other=0.0).to(ACC)
    a = tl.load(A + o, mask=m, other=0.0).to(ACC)
    tl.store(DA + o, dg * gelu_slope(a), mask=m)


def gelu_forward(a: Tensor) -> Tensor:
    """g, dense, in a's dtype, without autograd."""
    if not dispatch.runs_triton(a):
        return gelu_reference(a)
    a = a.contiguous()
    g = dispatch.empty(*a.shape, like=a)
    _gelu_fwd[(dispatch.cdiv(a.numel(), TILE),)](
        a, g, a.numel(), TILE=TILE, ACC=dispatch.accumulator(a), num_warps=8
    )
    return g


def gelu_backward(dg: Tensor, a: Tensor) -> Tensor:
    """da, dense, in a's dtype, from dg of a's shape."""
    if not dispatch.runs_triton(a):
        return torch.ops.aten.gelu_backward(wide(dg), wide(a)).to(a.dtype)
    dg, a = dg.contiguous(), a.contiguous()
    da = dispatch.empty(*a.shape, like=a)
    _gelu_bwd[(dispatch.cdiv(a.numel(), TILE),)](
        dg, a, da, a.numel(), TILE=TILE, ACC=dispatch.accumulator(a), num_warps=8
    )
    return da


_op = torch.library.custom_op("anima_fast::gelu", gelu_forward, mutates_args=())
_op.register_fake(lambda a: dispatch.dense(a)[0])
_op_backward = torch.library.custom_op("anima_fast::gelu_backward", gelu_backward, mutates_args=())
_op_backward.register_fake(lambda dg, a: dispatch.dense(a)[0])


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dg: Tensor) -> Tensor:
    return _op_backward(dg, *ctx.saved_tensors)


_op.register_autograd(_backward, setup_context=_setup)


def gelu(a: Tensor) -> Tensor:
    """a·Φ(a), element by element.

    Args:
        a: any shape, fp32, fp16 or bf16; a copy is made when it is not contiguous.

    Returns:
        The shape and dtype of `a`.

    Raises:
        TypeError: a dtype that does not fit.
    """
    dispatch.check_dtypes(a=a)
    return _op(a)


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device | str) -> Inputs:
    return {"a": randn(*sizes.values(), dtype=dtype, device=device) * 2}


OP = Op(
    name="gelu",
    function=gelu,
    reference=gelu_reference,
    make_inputs=_inputs,
    grads=("a",),
    shapes=({"L": 1}, {"B": 2, "L": 3, "D": 7}, {"B": 2, "L": 27, "D": 97}),
    model_shapes=({"B": 1, "L": 3, "D": 8192},),
    summed=lambda _sizes: 1,
    real_shapes=lambda tokens: {"": {"B": 1, "L": tokens, "D": 8192}},
    cost=passes(2, 3),
    cost_note="read a, write g; read dg and a, write da",
)
