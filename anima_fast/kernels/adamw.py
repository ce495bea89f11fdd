"""One step of AdamW over a flat buffer, in place, with clipping and rates per range folded in.

    g ← g·min(1, max_norm/(norm + 10⁻⁶))                            clipping, when asked for
    m ← m + (1 − β₁)·(g − m)          v ← β₂·v + (1 − β₂)·g²
    p ← p·(1 − lr·λ) − (lr/(1 − β₁ᵗ))·m/(√v/√(1 − β₂ᵗ) + ε)         λ: weight decay, t: step

One launch for all parameters, where torch's own makes several passes or a launch per group of
tensors. What may change from step to step without the host knowing is on the device: the
norm, which is never waited for, and the learning rates. The bias corrections are computed on the
host, in float64. A NaN norm makes every parameter NaN, as torch's clipping does.

Elements [range_ends[i−1], range_ends[i]) have the rate lrs[i]; every program walks the list, so it
should be short. Elements beyond the last end are padding and stay as they are.

Arithmetic is float32, and so are m and v; p is rounded once, to nearest. In 16 bit an update below
half a unit in the last place of p is lost (for bfloat16, below 0.2 to 0.4 % of p): train in float32
and cast for the model. Bytes an element: read p, g, m, v, write p, m, v: 28 in float32.

Source: Loshchilov & Hutter 2019, in the order and with the ε of torch.optim.AdamW.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from anima_fast.kernels import dispatch
from anima_fast.kernels.op import Cost, Inputs, Op, Sizes, randn, wide

# Elements of a program: two loads of 16 bytes of each float32 buffer for every thread of 8 warps.
TILE = 2048
# What torch.nn.utils.clip_grad_norm_ adds to the norm.
NORM_EPS = 1e-6


def adamw_reference(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    range_ends: Tensor,
    lrs: Tensor,
    step: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    norm: Tensor | None = None,
    max_norm: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, without changing its arguments: new p, m and v; see `adamw`."""
    which = torch.searchsorted(range_ends, torch.arange(len(p), device=p.device), right=True)
    live = which < len(range_ends)
    lr = torch.cat([lrs, lrs[:1]])[which]
    p_new, g = wide(p), wide(g)
    if max_norm > 0 and norm is not None:
        g = g * (max_norm / (norm + NORM_EPS)).clamp(max=1)
    m_new = m + (1 - beta1) * (g - m)
    v_new = beta2 * v + (1 - beta2) * g * g
    root = v_new.sqrt() / math.sqrt(1 - beta2**step) + eps
    p_new = p_new * (1 - lr * weight_decay) - lr / (1 - beta1**step) * m_new / root
    new = ((p_new, p), (m_new, m), (v_new, v))
    return tuple(torch.where(live, changed.to(old.dtype), old) for changed, old in new)


@triton.jit
def _adamw_fwd(
    P, G, M, V, ENDS, LRS, NORM, COUNT, RANGES,
    beta1_rest, beta2, beta2_rest, bias1, root_bias2, eps, weight_decay, max_norm,
    CLIP: tl.constexpr, NORM_EPS: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = o < COUNT
    # Padding is written back as it was: a mask that ends at a loaded number would split the loads
    # and stores of 16 bytes into single elements.
    live = o < tl.load(ENDS + RANGES - 1)
    # From the last range to the first: the range with the first end beyond o wins.
    lr = tl.zeros([TILE], dtype=ACC)
    for i in range(RANGES):
        r = RANGES - 1 - i
        lr = tl.where(o < tl.load(ENDS + r), tl.load(LRS + r).to(ACC), lr)
    p = tl.load(P + o, mask=inside, other=0.0).to(ACC)
    g = tl.load(G + o, mask=inside, other=0.0).to(ACC)
    m = tl.load(M + o, mask=inside, other=0.0).to(ACC)
    v = tl.load(V + o, mask=inside, other=0.0).to(ACC)
    if CLIP:
        # Not a minimum: that would drop a NaN.
        factor = max_norm / (tl.load(NORM).to(ACC) + NORM_EPS)
        g *= tl.where(factor > 1.0, 1.0, factor)
    # m ← m + (1 − β₁)·(g − m), v ← β₂·v + (1 − β₂)·g²
    m_new = m + beta1_rest * (g - m)
    v_new = beta2 * v + beta2_rest * g * g
    # p ← p·(1 − lr·λ) − (lr/(1 − β₁ᵗ))·m/(√v/√(1 − β₂ᵗ) + ε)
    step = lr / bias1 * m_new / (tl.sqrt(v_new) / root_bias2 + eps)
    tl.store(P + o, tl.where(live, p * (1.0 - lr * weight_decay) - step, p), mask=inside)
    tl.store(M + o, tl.where(live, m_new, m), mask=inside)
    tl.store(V + o, tl.where(live, v_new, v), mask=inside)


@torch.library.custom_op("anima_fast::adamw", mutates_args=("p", "m", "v"))
def _op(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    range_ends: Tensor,
    lrs: Tensor,
    step: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    norm: Tensor | None,
    max_norm: float,
) -> None:
    if not dispatch.runs_triton(p):
        new = adamw_reference(
            p, g, m, v, range_ends=range_ends, lrs=lrs, step=step, beta1=beta1, beta2=beta2,
            eps=eps, weight_decay=weight_decay, norm=norm, max_norm=max_norm,
        )  # fmt: skip
        for old, changed in zip((p, m, v), new, strict=True):
            old.copy_(changed)
        return
    _adamw_fwd[(dispatch.cdiv(len(p), TILE),)](
        p, g, m, v, range_ends, lrs, m if norm is None else norm, len(p), len(range_ends),
        # 1 − β and the corrections in float64: 1 − β₂ from a float32 β₂ has three digits fewer.
        1 - beta1, beta2, 1 - beta2, 1 - beta1**step, math.sqrt(1 - beta2**step),
        eps, weight_decay, max_norm,
        CLIP=max_norm > 0, NORM_EPS=NORM_EPS, TILE=TILE, ACC=dispatch.accumulator(p), num_warps=8,
    )  # fmt: skip


_op.register_fake(lambda *_: None)


@torch.no_grad()
def adamw(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    range_ends: Tensor,
    lrs: Tensor,
    step: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    norm: Tensor | None = None,
    max_norm: float = 0.0,
) -> None:
    """One AdamW step: p, m and v are changed in place, without waiting for the device.

    Args:
        p: [N], dense, fp32, fp16 or bf16.
        g: [N], dense, p's dtype or fp32; not changed.
        m, v: [N], dense, fp32: the moments, zeros before step 1.
        range_ends: [n] int64, ascending: where each range of p ends; beyond N is N.
        lrs: [n] fp32, the learning rate of each range.
        step: t, 1 for the first step.
        beta1, beta2, eps, weight_decay: as in torch.optim.AdamW.
        norm: 0-dim fp32, the norm of all gradients; None when nothing is clipped.
        max_norm: what it is clipped to; 0 does not clip.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or numbers that do not fit.
    """
    moments, scalars = {"m": m, "v": v}, {} if norm is None else {"norm": norm}
    if p.ndim != 1:
        raise ValueError(f"p is {tuple(p.shape)}, expected [N]: flatten it")
    if range_ends.ndim != 1 or not len(range_ends):
        raise ValueError(f"range_ends is {tuple(range_ends.shape)}, expected [n] with n from 1")
    for name, x in {"g": g, **moments}.items():
        dispatch.check_shape(name, x, "p's [N]", tuple(p.shape))
    dispatch.check_shape("lrs", lrs, "range_ends' [n]", tuple(range_ends.shape))
    for name, x in scalars.items():
        dispatch.check_shape(name, x, "[]", ())
    wide_dtype = dispatch.wide_dtype(p)
    dispatch.check_dtypes(p=p)
    if g.dtype not in (p.dtype, wide_dtype):
        raise TypeError(f"g is {g.dtype}, expected p's {p.dtype} or {wide_dtype}")
    for name, x in {**moments, "lrs": lrs, **scalars}.items():
        if x.dtype != wide_dtype:
            raise TypeError(f"{name} is {x.dtype}, expected {wide_dtype}")
    if range_ends.dtype != torch.int64:
        raise TypeError(f"range_ends is {range_ends.dtype}, expected torch.int64")
    for name, x in {"p": p, "g": g, **moments, "range_ends": range_ends, "lrs": lrs}.items():
        if not x.is_contiguous():
            raise ValueError(f"{name} has stride {x.stride()}, expected dense memory")
    dispatch.check_devices(p=p, g=g, **moments, range_ends=range_ends, lrs=lrs, **scalars)
    if not step >= 1:
        raise ValueError(f"step is {step}, expected 1 or more")
    for name, beta in {"beta1": beta1, "beta2": beta2}.items():
        if not 0 <= beta < 1:
            raise ValueError(f"{name} is {beta}, expected 0 <= {name} < 1")
    if max_norm > 0 and norm is None:
        raise ValueError(f"max_norm is {max_norm} and norm is None: clipping needs the norm")
    _op(
        p, g, m, v, range_ends, lrs, float(step), beta1, beta2, eps, weight_decay, norm,
        float(max_norm),
    )  # fmt: skip


def adamw_copy(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, **options: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`adamw` on copies, which are returned: p, m and v after the step."""
    new = tuple(dispatch.empty(*x.shape, like=x).copy_(x) for x in (p, m, v))
    adamw(new[0], g, new[1], new[2], **options)
    return new


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device | str) -> Inputs:
    count, ranges = sizes["N"], sizes["ranges"]
    wide_dtype = torch.promote_types(dtype, torch.float32)
    g = randn(count, dtype=dtype, device=device)
    # A fifth of the buffer is padding. Rates are so large that p depends on the update.
    ends = [(count - count // 5) * (i + 1) // ranges for i in range(ranges)]
    return {
        "p": randn(count, dtype=dtype, device=device),
        "g": g,
        "m": randn(count, dtype=wide_dtype, device=device) * 0.5,
        "v": randn(count, dtype=wide_dtype, device=device).square(),
        "range_ends": torch.tensor(ends, dtype=torch.int64).to(device),
        "lrs": 0.4 / torch.arange(1, ranges + 1, dtype=wide_dtype, device=device),
        "step": sizes["step"],
        "beta1": 0.9,
        "beta2": 0.99,
        "eps": 1e-2,
        "weight_decay": 0.2,
        "norm": wide(g).norm() if sizes["clip"] else None,
        "max_norm": 2.0 if sizes["clip"] else 0.0,
    }


def _cost(sizes: Sizes, itemsize: int) -> Cost:
    return Cost(forward_bytes=sizes["N"] * (3 * itemsize + 16), backward_bytes=0)


# A LoRA of rank 16 on attention and MLP of the 28 blocks: (in + out) of each layer, times the rank.
_LORA = 28 * 16 * (4 * 4096 + 2 * 4096 + 2 * 3072 + 2 * 10240)

OP = Op(
    name="adamw",
    function=adamw_copy,
    reference=adamw_reference,
    make_inputs=_inputs,
    grads=(),
    shapes=(
        {"N": 1, "ranges": 1, "step": 1, "clip": 0},
        {"N": 37, "ranges": 3, "step": 7, "clip": 1},
        {"N": 4101, "ranges": 5, "step": 2, "clip": 1},
        {"N": 6144, "ranges": 2, "step": 1000, "clip": 0},
    ),
    model_shapes=({"N": 65536, "ranges": 2, "step": 300, "clip": 1},),
    # Element by element: the norm is given.
    summed=lambda _sizes: 1,
    real_shapes=lambda _tokens: {"rank 16": {"N": _LORA, "ranges": 1, "step": 10, "clip": 1}},
    cost=_cost,
    cost_note="read p, g, m and v, write p, m and v, without a benchmark's copies",
)
