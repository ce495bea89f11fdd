"""The loss of rectified flow per sample, and its gradient in the same pass.

    d = v̂ − (noise − x0)
    l2         ℓ = d²                          ℓ' = 2d
    l1         ℓ = |d|                         ℓ' = sign(d)
    huber      ℓ = 2c·(√(d² + c²) − c)         ℓ' = 2c·d/√(d² + c²)
    smooth_l1  ℓ = 2·(√(d² + c²) − c)          ℓ' = 2d/√(d² + c²)
    forward    loss_b = w_b·mean(cell·ℓ)       u = w_b/E·cell·ℓ'     E: elements of a sample
    backward   dv̂ = dloss_b·u

Target, error and unreduced loss are never written. u, the gradient for dloss = 1, is written while
d is in registers, and is all that is kept. It is float32 because it carries 1/E: float16 would lose
it before the loss scale in dloss could save it. √(d² + c²) − c is computed as d²/(√(d² + c²) + c),
which does not cancel. Arithmetic is float32; programs write partial sums of the loss, which torch
adds, so the result does not depend on timing.

Bytes an element: forward 12 and the prediction's (x0, noise, v̂, u), backward 4 and its gradient's.
Sources: Liu et al. 2022 (rectified flow), Charbonnier et al. 1997 (the smooth |d|).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from anima_fast.kernels import dispatch
from anima_fast.kernels.losses import LOSS_TYPES, element_loss, per_sample
from anima_fast.kernels.op import Cost, Inputs, Op, Sizes, randn, wide

# Elements of a program: 8 for each thread of 8 warps.
TILE = 2048


def flow_loss_reference(
    prediction: Tensor,
    latents: Tensor,
    noise: Tensor,
    weights: Tensor | None = None,
    *,
    loss_type: str = "l2",
    c: Tensor | None = None,
    cells: Tensor | None = None,
) -> Tensor:
    """The definition; see `flow_loss`."""
    d = wide(prediction) - (wide(noise) - wide(latents))
    loss = element_loss(d, loss_type, c)
    if cells is not None:
        loss = loss * wide(_match(cells, loss))
    losses = loss.flatten(1).mean(1)
    return losses if weights is None else losses * wide(weights)


@triton.jit
def _flow_loss_fwd(
    PREDICTION, LATENTS, NOISE, WEIGHTS, C, CELLS, UNIT, LOSS, COUNT, CELL_COUNT,
    TYPE: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_CELLS: tl.constexpr,
    TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o = part * TILE + tl.arange(0, TILE)
    m = o < COUNT
    o_e = b * COUNT + o
    latents = tl.load(LATENTS + o_e, mask=m, other=0.0).to(ACC)
    noise = tl.load(NOISE + o_e, mask=m, other=0.0).to(ACC)
    # Beyond COUNT d is 0, and so are ℓ and ℓ'.
    d = tl.load(PREDICTION + o_e, mask=m, other=0.0).to(ACC) - (noise - latents)
    share = tl.full([TILE], 1.0, dtype=ACC) / COUNT
    if HAS_WEIGHTS:
        share *= tl.load(WEIGHTS + b).to(ACC)
    if HAS_CELLS:
        share *= tl.load(CELLS + b * CELL_COUNT + o % CELL_COUNT, mask=m, other=0.0).to(ACC)
    if TYPE == "l2":
        loss = d * d
        slope = 2.0 * d
    elif TYPE == "l1":
        loss = tl.abs(d)
        slope = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))
    else:
        c = tl.load(C + b).to(ACC)
        root = tl.sqrt(d * d + c * c)
        # √(d² + c²) − c = d²/(√(d² + c²) + c)
        loss = 2.0 * d * d / (root + c)
        slope = 2.0 * d / root
        if TYPE == "huber":
            loss *= c
            slope *= c
    tl.store(UNIT + o_e, share * slope, mask=m)
    tl.store(LOSS + b * tl.num_programs(1) + part, tl.sum(share * loss, 0))


@triton.jit
def _flow_loss_bwd(DLOSS, UNIT, DPREDICTION, COUNT, dloss_b, TILE: tl.constexpr, ACC: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    m = o < COUNT
    dloss = tl.load(DLOSS + b * dloss_b).to(ACC)
    unit = tl.load(UNIT + b * COUNT + o, mask=m, other=0.0).to(ACC)
    tl.store(DPREDICTION + b * COUNT + o, dloss * unit, mask=m)


def flow_loss_forward(
    prediction: Tensor,
    latents: Tensor,
    noise: Tensor,
    weights: Tensor | None,
    loss_type: str,
    c: Tensor | None,
    cells: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(losses [B], dprediction for dlosses of 1), both wide, without autograd."""
    if not dispatch.runs_triton(prediction):
        return _forward_reference(prediction, latents, noise, weights, loss_type, c, cells)
    prediction, latents, noise = (t.contiguous() for t in (prediction, latents, noise))
    # Arguments that are not there are never read: any pointer serves.
    weights, c, cells = (None if t is None else t.contiguous() for t in (weights, c, cells))
    batch, count = len(prediction), prediction[0].numel()
    parts = dispatch.cdiv(count, TILE)
    wide_type = dispatch.wide_dtype(prediction)
    unit = dispatch.empty(*prediction.shape, like=prediction, dtype=wide_type)
    partial = dispatch.empty(batch, parts, like=prediction, dtype=wide_type)
    _flow_loss_fwd[(batch, parts)](
        prediction, latents, noise,
        unit if weights is None else weights, unit if c is None else c,
        unit if cells is None else cells,
        unit, partial, count, 1 if cells is None else cells[0].numel(),
        TYPE=loss_type, HAS_WEIGHTS=weights is not None, HAS_CELLS=cells is not None,
        TILE=TILE, ACC=dispatch.accumulator(prediction), num_warps=8,
    )  # fmt: skip
    return partial.sum(1), unit


def flow_loss_backward(dlosses: Tensor, unit: Tensor, dtype: torch.dtype) -> Tensor:
    """dprediction in `dtype`, from dlosses [B] and the second result of the forward."""
    if not dispatch.runs_triton(unit):
        return (per_sample(dlosses, unit) * unit).to(dtype)
    batch, count = len(unit), unit[0].numel()
    dprediction = dispatch.empty(*unit.shape, like=unit, dtype=dtype)
    _flow_loss_bwd[(batch, dispatch.cdiv(count, TILE))](
        dlosses, unit, dprediction, count, dlosses.stride(0),
        TILE=TILE, ACC=dispatch.accumulator(unit), num_warps=8,
    )  # fmt: skip
    return dprediction


def _forward_reference(
    prediction: Tensor,
    latents: Tensor,
    noise: Tensor,
    weights: Tensor | None,
    loss_type: str,
    c: Tensor | None,
    cells: Tensor | None,
) -> tuple[Tensor, Tensor]:
    losses = flow_loss_reference(
        prediction, latents, noise, weights, loss_type=loss_type, c=c, cells=cells
    )
    d = wide(prediction) - (wide(noise) - wide(latents))
    if loss_type == "l2":
        slope = 2 * d
    elif loss_type == "l1":
        slope = d.sign()
    else:
        c = per_sample(c, d)
        slope = 2 * d / torch.sqrt(d**2 + c**2)
        slope = c * slope if loss_type == "huber" else slope
    slope = slope / d[0].numel()
    if weights is not None:
        slope = slope * per_sample(weights, d)
    return losses, slope if cells is None else slope * wide(_match(cells, d))


def _match(cells: Tensor, like: Tensor) -> Tensor:
    """[B, 1, h, w] with the frame dimension that `like` may have."""
    return cells.reshape(len(like), 1, *like.shape[2:])


_op = torch.library.custom_op("anima_fast::flow_loss", flow_loss_forward, mutates_args=())


@_op.register_fake
def _(prediction, latents, noise, weights, loss_type, c, cells):
    wide_type = dispatch.wide_dtype(prediction)
    shapes = (prediction.shape[:1], prediction.shape)
    return tuple(torch.empty(s, dtype=wide_type, device=prediction.device) for s in shapes)


_op_backward = torch.library.custom_op(
    "anima_fast::flow_loss_backward", flow_loss_backward, mutates_args=()
)


@_op_backward.register_fake
def _(dlosses, unit, dtype):
    return torch.empty(unit.shape, dtype=dtype, device=unit.device)


def _setup(ctx, inputs, output) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])
    # Nobody sees the second output: no zeros for its gradient.
    ctx.set_materialize_grads(False)


def _backward(ctx, dlosses: Tensor | None, _dunit: Tensor | None) -> tuple[Tensor | None, ...]:
    if dlosses is None:
        return (None,) * 7
    return _op_backward(dlosses, *ctx.saved_tensors, ctx.dtype), *[None] * 6


_op.register_autograd(_backward, setup_context=_setup)


def flow_loss(
    prediction: Tensor,
    latents: Tensor,
    noise: Tensor,
    weights: Tensor | None = None,
    *,
    loss_type: str = "l2",
    c: Tensor | None = None,
    cells: Tensor | None = None,
) -> Tensor:
    """weights_b·mean(cells·ℓ(prediction − (noise − latents))) of every sample b.

    Only the prediction gets a gradient.

    Args:
        prediction: [B, ...], fp32, fp16 or bf16; copied, as all others, when it is not contiguous.
        latents, noise: of the prediction's shape.
        weights: [B], or None for 1.
        loss_type: l2, l1, huber or smooth_l1.
        c: [B], above 0, the threshold of huber and smooth_l1; the others ignore it.
        cells: a mask [B, 1, h, w] over all channels of a prediction [B, C, h, w] or
            [B, C, 1, h, w], or None.

    Returns:
        [B] float32.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or a loss type that do not fit.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type is {loss_type!r}, expected one of {', '.join(LOSS_TYPES)}")
    if c is None and loss_type in ("huber", "smooth_l1"):
        raise ValueError(f"c is None: {loss_type} needs one threshold per sample")
    if prediction.ndim < 2:
        raise ValueError(f"prediction is {tuple(prediction.shape)}, expected [B, ...]")
    shape = tuple(prediction.shape)
    tensors = {"prediction": prediction, "latents": latents, "noise": noise}
    for name in ("latents", "noise"):
        dispatch.check_shape(name, tensors[name], "prediction's [B, ...]", shape)
    for name, x in {"weights": weights, "c": c}.items():
        if x is not None:
            dispatch.check_shape(name, x, "[B]", shape[:1])
            tensors[name] = x
    if cells is not None:
        own, fitting = tuple(cells.shape), [(shape[0], 1, *shape[2:])]
        if len(shape) == 5 and shape[2] == 1:
            fitting.append((shape[0], 1, *shape[3:]))
        if own not in fitting:
            raise ValueError(f"cells are {own}, expected [B, 1, h, w] for a prediction {shape}")
        tensors["cells"] = cells
    dispatch.check_dtypes(**tensors)
    dispatch.check_devices(**tensors)
    return _op(prediction, latents, noise, weights, loss_type, c, cells)[0]


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device | str) -> Inputs:
    b, h, w = sizes["B"], sizes["h"], sizes["w"]
    shape = (b, sizes["C"], h, w)
    wide_dtype = torch.promote_types(dtype, torch.float32)
    cells = torch.rand(b, 1, h, w, dtype=torch.float64).to(wide_dtype).to(device)
    return {
        "prediction": randn(*shape, dtype=dtype, device=device),
        "latents": randn(*shape, dtype=wide_dtype, device=device),
        "noise": randn(*shape, dtype=wide_dtype, device=device),
        "weights": 1 + randn(b, dtype=wide_dtype, device=device).square(),
        "loss_type": LOSS_TYPES[sizes["type"]],
        "c": 0.1 + randn(b, dtype=wide_dtype, device=device).abs(),
        "cells": cells if sizes["masked"] else None,
    }


def _cost(sizes: Sizes, itemsize: int) -> Cost:
    count = sizes["B"] * sizes["C"] * sizes["h"] * sizes["w"]
    return Cost(forward_bytes=count * (12 + itemsize), backward_bytes=count * (4 + itemsize))


def _real_shapes(tokens: int) -> dict[str, Sizes]:
    height = 2 * math.isqrt(tokens)
    size = {"B": 1, "C": 16, "h": height, "w": 4 * tokens // height}
    return {"": {**size, "type": 0, "masked": 0}}


OP = Op(
    name="flow_loss",
    function=flow_loss,
    reference=flow_loss_reference,
    make_inputs=_inputs,
    grads=("prediction",),
    shapes=(
        {"B": 1, "C": 1, "h": 1, "w": 1, "type": 0, "masked": 0},
        {"B": 2, "C": 3, "h": 5, "w": 7, "type": 2, "masked": 1},
        {"B": 3, "C": 16, "h": 9, "w": 17, "type": 0, "masked": 1},
        {"B": 2, "C": 4, "h": 16, "w": 33, "type": 1, "masked": 0},
        {"B": 2, "C": 5, "h": 22, "w": 20, "type": 3, "masked": 1},
    ),
    model_shapes=(
        {"B": 1, "C": 16, "h": 128, "w": 128, "type": 2, "masked": 1},
        # So many samples that the error of their losses is no chance.
        {"B": 128, "C": 2, "h": 2, "w": 3, "type": 2, "masked": 0},
    ),
    summed=lambda sizes: sizes["C"] * sizes["h"] * sizes["w"],
    real_shapes=_real_shapes,
    cost=_cost,
    cost_note="read prediction, latents and noise, write the float32 gradient; scale that",
)
