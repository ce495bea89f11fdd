"""Attention for the fused block: separate forward and backward, keeping only out and lse.

torch        PyTorch's flash attention, which knows no zero keys: with lse' over the real keys,
             lse = log(e^{lse'} + n) and out = out'·e^{lse' − lse}. Its backward reads the lse
             and δ = do·out only, so the corrected pair makes it exact as well. Self attention is
             cuDNN's where PyTorch prefers that (data-center Hopper and Blackwell): it is faster
             there, but spends tens of milliseconds planning for each new count of keys
triton       kernels/attention.py, whose softmax starts at the zero keys; also with short float16
             sums (kernels/sums.py), and where PyTorch has no flash attention: in float32, before
             Ampere, and in its builds for Windows
others       xformers and flash run under autograd inside, and keep what that keeps

Where a sample leaves out zero rows that its keys end with (a batch that mixes texts above 512 rows
with shorter ones), the first two take one sample at a time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from anima_fast.kernels import dispatch
from anima_fast.kernels.attention import attention_backward, attention_forward
from anima_fast.kernels.sums import chain_of
from anima_fast.models.attention import HALF, ZeroRows, attention

aten = torch.ops.aten


@dataclass
class KeptAttention:
    """What backward needs, and who computed it: cudnn, flash, own or graph (by autograd)."""

    out: Tensor
    lse: Tensor | None = None
    rng: tuple[Tensor, ...] = ()
    by: str = "own"
    graph: tuple[Tensor, ...] = field(default=(), repr=False)


def backend(q: Tensor, k: Tensor, v: Tensor, mode: str) -> str:
    """Who computes the attention of these tensors: cudnn, flash, own or graph."""
    if mode not in ("torch", "sdpa"):
        return "own" if mode == "triton" else "graph"
    # No library ends its chains of float16 as early.
    if chain_of(q) and dispatch.runs_triton(q):
        return "own"
    if not q.is_cuda:
        return "flash"
    if q.dtype not in HALF or _capability(q.device.index) < (8, 0):
        return "own"
    if q.shape[1] == k.shape[1] and prefers_cudnn(q, k, v):
        return "cudnn"
    return "flash" if torch.backends.cuda.is_flash_attention_available() else "own"


def prefers_cudnn(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `scaled_dot_product_attention` would run cuDNN's kernels."""
    choice = torch._fused_sdp_choice(*(t.transpose(1, 2) for t in (q, k, v)))
    return choice == SDPBackend.CUDNN_ATTENTION.value


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def forward(q: Tensor, k: Tensor, v: Tensor, rows: ZeroRows | None, mode: str) -> KeptAttention:
    """Attention of q [B, L, H, K] over k, v [B, S, H, K] and zero keys, without autograd."""
    by = backend(q, k, v, mode)
    if by != "graph" and rows is not None and rows.leaves_out:
        parts = []
        for i in range(len(q)):
            one, seen = slice(i, i + 1), rows.kept(i, k.shape[1])
            parts.append(forward(q[one], k[one, :seen], v[one, :seen], rows.sample(i), mode))
        out, lse = (torch.cat(x) for x in zip(*((p.out, p.lse) for p in parts), strict=True))
        return KeptAttention(out, lse, parts[0].rng, parts[0].by)
    if by in ("cudnn", "flash"):
        return _flash_forward(q, k, v, rows, by)
    if by == "own":
        return KeptAttention(*attention_forward(q, k, v, rows.on_device if rows else None))
    with torch.enable_grad():
        leaves = tuple(t.detach().requires_grad_() for t in (q, k, v))
        out = attention(*leaves, zero_keys=rows, mode=mode)
    return KeptAttention(out.detach(), by=by, graph=(out, *leaves))


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: KeptAttention,
    *,
    into: tuple[Tensor, Tensor, Tensor],
    rows: ZeroRows | None = None,
) -> None:
    """Write dq, dk and dv into three tensors dense in K; the other arguments are the forward's."""
    if rows is not None and rows.leaves_out and kept.by != "graph":
        assert kept.lse is not None
        for i in range(len(q)):
            one, seen = slice(i, i + 1), rows.kept(i, k.shape[1])
            dq, dk, dv = (gradient[one] for gradient in into)
            part = KeptAttention(kept.out[one], kept.lse[one], kept.rng, kept.by)
            into_part = (dq, dk[:, :seen], dv[:, :seen])
            backward(do[one], q[one], k[one, :seen], v[one, :seen], part, into=into_part)
            dk[:, seen:].zero_()
            dv[:, seen:].zero_()
        return
    if kept.by == "own":
        attention_backward(do, q, k, v, kept.out, kept.lse, into=into)
        return
    if kept.by == "graph":
        out, *leaves = kept.graph
        found = torch.autograd.grad(out, leaves, do)
    else:
        found = _flash_backward(do, q, k, v, kept)
    for target, gradient in zip(into, found, strict=True):
        target.copy_(gradient)


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, rows: ZeroRows | None, by: str
) -> KeptAttention:
    heads = [t.transpose(1, 2) for t in (q, k, v)]  # [B, H, L, K]
    rng: tuple[Tensor, ...] = ()
    if not q.is_cuda:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*heads)
    elif by == "cudnn":
        out, lse, *_, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(*heads, None, True)
        rng = (seed, offset)
    else:
        out, lse, *_, seed, offset, _ = aten._scaled_dot_product_flash_attention(*heads)
        rng = (seed, offset)
    out = out.transpose(1, 2)  # [B, L, H, K]
    if rows is not None:
        zeros = rows.on_device.to(lse.dtype).log()[:, None, None]  # [B, 1, 1]
        real, lse = lse, torch.logaddexp(lse, zeros)
        out = (out * (real - lse).exp().transpose(1, 2)[..., None]).to(q.dtype)
    return KeptAttention(out.contiguous(), lse, rng, by)


def _flash_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: KeptAttention
) -> list[Tensor]:
    do, q, k, v, out = (t.transpose(1, 2) for t in (do, q, k, v, kept.out))
    # Two absent tables of sequence ends, two lengths, no dropout, no causal mask.
    plain = (None, None, q.shape[2], k.shape[2], 0.0, False)
    if not q.is_cuda:
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, out, kept.lse, 0.0, False
        )
    elif kept.by == "cudnn":
        found = aten._scaled_dot_product_cudnn_attention_backward(
            do, q, k, v, out, kept.lse, *kept.rng, None, *plain
        )
    else:
        found = aten._scaled_dot_product_flash_attention_backward(
            do, q, k, v, out, kept.lse, *plain, *kept.rng
        )
    return [t.transpose(1, 2) for t in found[:3]]
