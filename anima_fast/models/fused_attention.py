"""Attention for the fused block: forward and backward apart, with nothing kept but out and lse.

torch        PyTorch's flash attention, which knows no zero keys: with lse' over the real keys,
             lse = log(e^{lse'} + n) and out = out'·e^{lse' − lse}. Its backward reads the lse
             and δ = do·out only, so the corrected pair makes it exact as well
triton       kernels/attention.py, whose softmax starts at the zero keys; also for float32 on a
             card, where PyTorch has no flash attention
others       xformers and flash run under autograd inside, and keep what they keep

Where a sample leaves out zero rows that its keys end with (a batch that mixes texts above 512 rows
with shorter ones), the first two take one sample at a time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anima_fast.kernels.attention import attention_backward, attention_forward
from anima_fast.models.attention import HALF, ZeroRows, attention

aten = torch.ops.aten


@dataclass
class Kept:
    """What backward needs: tensors for `save_for_backward`, and a graph for other backends."""

    out: Tensor
    lse: Tensor | None = None
    rng: tuple[Tensor, ...] = ()
    graph: tuple[Tensor, ...] = field(default=(), repr=False)


def uses_flash(q: Tensor, mode: str) -> bool:
    """Whether PyTorch's flash attention runs.

    On a card it is for 16 bit and compute capability 8.0 or more, on the CPU for any dtype.
    """
    if mode not in ("torch", "sdpa"):
        return False
    return not q.is_cuda or (q.dtype in HALF and _capability(q.device.index) >= (8, 0))


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def forward(q: Tensor, k: Tensor, v: Tensor, rows: ZeroRows | None, mode: str) -> Kept:
    """Attention without autograd.

    Args:
        q: [B, L, H, K].
        k, v: [B, S, H, K].
        rows: the zero keys.
        mode: as `models.attention.attention`.
    """
    own = uses_flash(q, mode) or mode in ("torch", "sdpa", "triton")
    if own and rows is not None and rows.leaves_out:
        parts = []
        for i in range(len(q)):
            one, seen = slice(i, i + 1), rows.kept(i, k.shape[1])
            parts.append(forward(q[one], k[one, :seen], v[one, :seen], rows.sample(i), mode))
        out, lse = (torch.cat(x) for x in zip(*((p.out, p.lse) for p in parts), strict=True))
        return Kept(out, lse, parts[0].rng)
    if uses_flash(q, mode):
        return _flash_forward(q, k, v, rows)
    if mode in ("torch", "sdpa", "triton"):
        return Kept(*attention_forward(q, k, v, rows.on_device if rows else None))
    with torch.enable_grad():
        leaves = tuple(t.detach().requires_grad_() for t in (q, k, v))
        out = attention(*leaves, zero_keys=rows, mode=mode)
    return Kept(out.detach(), graph=(out, *leaves))


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Kept,
    mode: str,
    *,
    into: tuple[Tensor, Tensor, Tensor],
    rows: ZeroRows | None = None,
) -> None:
    """Write dq, dk and dv into three tensors of q's, k's and v's shapes.

    Args:
        do: [B, L, H, K].
        q, k, v, mode: as given to the forward.
        kept: what the forward returned.
        into: dense in K, parts of packed gradients.
        rows: as given to the forward.
    """
    if rows is not None and rows.leaves_out and not kept.graph:
        for i in range(len(q)):
            one, seen = slice(i, i + 1), rows.kept(i, k.shape[1])
            dq, dk, dv = (gradient[one] for gradient in into)
            part = Kept(kept.out[one], kept.lse[one], kept.rng)
            backward(
                do[one], q[one], k[one, :seen], v[one, :seen], part, mode,
                into=(dq, dk[:, :seen], dv[:, :seen]),
            )  # fmt: skip
            dk[:, seen:].zero_()
            dv[:, seen:].zero_()
        return
    if kept.graph:
        out, *leaves = kept.graph
        found = torch.autograd.grad(out, leaves, do)
    elif uses_flash(q, mode):
        found = _flash_backward(do, q, k, v, kept)
    else:
        attention_backward(do, q, k, v, kept.out, kept.lse, into=into)
        return
    for target, gradient in zip(into, found, strict=True):
        target.copy_(gradient)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, rows: ZeroRows | None) -> Kept:
    heads = [t.transpose(1, 2) for t in (q, k, v)]  # [B, H, L, K]
    if q.is_cuda:
        out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_flash_attention(*heads)
        rng = (seed, offset)
    else:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*heads)
        rng = ()
    out = out.transpose(1, 2)  # [B, L, H, K]
    if rows is not None:
        zeros = rows.on_device.to(lse.dtype).log()[:, None, None]  # [B, 1, 1]
        real, lse = lse, torch.logaddexp(lse, zeros)
        out = (out * (real - lse).exp().transpose(1, 2)[..., None]).to(q.dtype)
    return Kept(out.contiguous(), lse, rng)


def _flash_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Kept) -> list[Tensor]:
    do, q, k, v, out = (t.transpose(1, 2) for t in (do, q, k, v, kept.out))
    if q.is_cuda:
        found = aten._scaled_dot_product_flash_attention_backward(
            do, q, k, v, out, kept.lse, None, None, q.shape[2], k.shape[2], 0.0, False, *kept.rng
        )
    else:
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, out, kept.lse, 0.0, False
        )
    return [t.transpose(1, 2) for t in found[:3]]
