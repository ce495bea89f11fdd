"""The DiT as a training step computes it, in an emulated arithmetic (emulated.py), with autograd.

    h = stored(LN(x)·(1 + scale) + shift)
    y = stored(h Wᵀ + s·(h Aᵀ) Bᵀ)      products of W emulated, those of the adapter in float32 sums
    x = residual(x + gate·F(h))

What the fused block keeps or hands to a product is stored in 16 bit here, forward and backward;
norms, rotations, GELU, softmax and the adapters' gradients are float32. `models/dit.py` is the
definition: in the arithmetic "float32" both compute the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anima_fast.bench.emulated import Arithmetic, product
from anima_fast.models.dit import AnimaDiT, Block, with_mask
from anima_fast.models.dit_layers import (
    PATCH,
    AdaLN,
    Attention,
    FinalLayer,
    Modulation,
    layernorm_modulate,
    timestep_features,
)
from anima_fast.models.rope import apply_rope, rope_angles


@dataclass(frozen=True)
class Adapter:
    """The LoRA of one layer: down [R, in], up [out, R], and alpha / R."""

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class Conditions:
    """What all blocks read besides the tokens, in one arithmetic.

    Attributes:
        embedding, shared_modulation: [B, 1, D] and [B, 1, 3 D].
        context: text rows [B, S, C].
        zero_rows: for each sample how many zero rows follow; negative: how many it leaves out.
        cos, sin: of the rotary embedding, [L, K].
    """

    embedding: Tensor
    shared_modulation: Tensor
    context: Tensor
    zero_rows: Sequence[int]
    cos: Tensor
    sin: Tensor


class _Stored(torch.autograd.Function):
    """A tensor that memory holds in 16 bit; its gradient too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, math: Arithmetic) -> Tensor:
        ctx.math = math
        return math.stored(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return ctx.math.stored(dx), None


class _Residual(torch.autograd.Function):
    """The residual stream between two sublayers, and its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, math: Arithmetic) -> Tensor:
        ctx.math = math
        return math.stored_rows(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return ctx.math.stored_rows(dx), None


class _Linear(torch.autograd.Function):
    """x Wᵀ + s·(x Aᵀ) Bᵀ of rows [M, in]: the adapter's products sum in float32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, down: Tensor, up: Tensor, scale: float, math: Arithmetic
    ) -> Tensor:
        w, factor = math.weight(w)
        down, up = math.stored(down), math.stored(up)
        h = math.stored(x @ down.T)  # [M, R]
        ctx.save_for_backward(x, w, down, up, h)
        ctx.factor, ctx.scale, ctx.math = factor, scale, math
        return math.product(x, w.T) * factor + scale * (h @ up.T)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, down, up, h = ctx.saved_tensors
        g = ctx.math.stored(ctx.scale * (dy @ up))  # [M, R]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = ctx.math.product(dy, w) * ctx.factor + g @ down
        return dx, None, g.T @ x, ctx.scale * (dy.T @ h), None, None


class _Attention(torch.autograd.Function):
    """softmax(q kᵀ / √K) v over heads [B, H, L, K], with `bias` [B, S] on the logits of a key.

    The unnormalised probabilities are rounded before P v, as flash attention does, and its sum runs
    over the rounded ones' float32 originals. `zeros` [B] counts the zero keys.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, zeros: Tensor, math: Arithmetic
    ) -> Tensor:
        s = _logits(q, k, bias, math)
        zeros = zeros[:, None, None, None]
        # A zero key has the logit 0.
        largest = s.amax(-1, keepdim=True)
        largest = torch.where(zeros > 0, largest.clamp_min(0), largest)
        p = torch.exp(s - largest)
        total = p.sum(-1, keepdim=True) + zeros * torch.exp(-largest)
        out = math.stored(math.product(math.stored(p), v) / total)
        ctx.save_for_backward(q, k, v, bias, out, largest + total.log())
        ctx.math = math
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, lse = ctx.saved_tensors
        math: Arithmetic = ctx.math
        dout = math.stored(dout)
        p = torch.exp(_logits(q, k, bias, math) - lse)
        dv = math.product(math.stored(p).transpose(-1, -2), dout)
        dp = math.product(dout, v.transpose(-1, -2))
        ds = math.stored(p * (dp - (dout * out).sum(-1, keepdim=True)))
        root = q.shape[-1] ** -0.5
        dq = math.product(ds, k) * root
        dk = math.product(ds.transpose(-1, -2), q) * root
        return dq, dk, dv, None, None, None


def _logits(q: Tensor, k: Tensor, bias: Tensor, math: Arithmetic) -> Tensor:
    s = product(q, k.transpose(-1, -2), math.logits) * q.shape[-1] ** -0.5
    return s + bias[:, None, None, :]


class EmulatedBlock:
    """A block of the DiT with adapters, in an arithmetic.

    Args:
        block: with its weights, best in float32.
        adapters: of its layers, by the name within the block.
        math: the arithmetic.
    """

    def __init__(self, block: Block, adapters: Mapping[str, Adapter], math: Arithmetic) -> None:
        self.block, self.adapters, self.math = block, adapters, math

    def __call__(self, x: Tensor, given: Conditions) -> Tensor:
        """[B, L, D] → [B, L, D]."""
        block, math = self.block, self.math
        for name in ("self_attn", "cross_attn", "mlp"):
            m = modulation(getattr(block, f"adaln_modulation_{name}"), given, math)
            h = self._stored(layernorm_modulate(x, m, torch.float32))
            x = _Residual.apply(x + m.gate * getattr(self, f"_{name}")(h, given), math)
        return x

    def _self_attn(self, h: Tensor, given: Conditions) -> Tensor:
        return self._attention("self_attn", h, h, given, rotated=True)

    def _cross_attn(self, h: Tensor, given: Conditions) -> Tensor:
        return self._attention("cross_attn", h, given.context, given, rotated=False)

    def _mlp(self, h: Tensor, given: Conditions) -> Tensor:
        h = self._stored(F.gelu(self._linear("mlp.layer1", h)))
        return self._linear("mlp.layer2", h)

    def _attention(
        self, name: str, h: Tensor, context: Tensor, given: Conditions, *, rotated: bool
    ) -> Tensor:
        layer: Attention = getattr(self.block, name)
        split = (-1, layer.head_dim)
        q = layer.q_norm(self._linear(f"{name}.q_proj", h).unflatten(-1, split))  # [B, L, H, K]
        k = layer.k_norm(self._linear(f"{name}.k_proj", context).unflatten(-1, split))
        v = self._linear(f"{name}.v_proj", context).unflatten(-1, split)  # [B, S, H, K]
        bias, zeros = h.new_zeros(context.shape[:2]), h.new_zeros(len(h))
        if rotated:
            q, k = apply_rope(q, given.cos, given.sin), apply_rope(k, given.cos, given.sin)
        else:
            for sample, count in enumerate(given.zero_rows):
                zeros[sample] = max(count, 0)
                bias[sample, context.shape[1] + min(count, 0) :] = -torch.inf
        q, k, v = (x.transpose(1, 2) for x in (self._stored(q), self._stored(k), v))
        out = _Attention.apply(q, k, v, bias, zeros, self.math)
        return self._linear(f"{name}.output_proj", out.transpose(1, 2).flatten(2))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        layer: Any = self.block.get_submodule(name)
        adapter = self.adapters[name]
        down, up = adapter.down, adapter.up
        y = _Linear.apply(x.flatten(0, -2), layer.weight, down, up, adapter.scale, self.math)
        return self._stored(y.view(*x.shape[:-1], -1))

    def _stored(self, x: Tensor) -> Tensor:
        return _Stored.apply(x, self.math)


def _small(x: Tensor, math: Arithmetic) -> Tensor:
    """What bf16 rounds of the timestep embedding and AdaLN, which fp16 keeps in float32."""
    return math.stored(x) if math.dtype == torch.bfloat16 else x


def _small_linear(layer: nn.Linear, x: Tensor, math: Arithmetic) -> Tensor:
    return _small(F.linear(x, _small(layer.weight, math)), math)


def modulation(adaln: AdaLN, given: Conditions, math: Arithmetic) -> Modulation:
    """Shift, scale and gate of a sublayer, or shift and scale of the final layer."""
    x = _small(F.silu(given.embedding), math)
    for layer in (adaln[1], adaln[2]):
        x = _small_linear(layer, x, math)
    x = _small(x + given.shared_modulation[..., : x.shape[-1]], math)
    return Modulation(*x.chunk(x.shape[-1] // given.embedding.shape[-1], -1))


def enter(
    dit: AnimaDiT,
    latents: Tensor,
    sigma: Tensor,
    context: Tensor,
    zero_rows: Sequence[int],
    math: Arithmetic,
) -> tuple[Tensor, Conditions]:
    """The tokens [B, L, D] before the first block, and what all blocks read of the DiT's inputs."""
    image = math.stored(with_mask(latents, None))
    patches = F.pixel_unshuffle(image, PATCH).flatten(2).transpose(1, 2)  # [B, L, 68]
    w, factor = math.weight(dit.x_embedder.proj[1].weight)
    x = math.stored_rows(math.stored(math.product(patches.flatten(0, 1), w.T) * factor))

    features = _small(timestep_features(sigma, dit.config.model_channels), math)  # [B, D]
    embedding = _small(dit.t_embedding_norm(features), math)
    shared: Any = dit.t_embedder[1]
    hidden = _small(F.silu(_small_linear(shared.linear_1, features, math)), math)
    shared_modulation = _small_linear(shared.linear_2, hidden, math)
    height, width = (size // PATCH for size in latents.shape[-2:])
    angles = rope_angles(dit.config.head_dim, 1, height, width, latents.device)
    conditions = Conditions(
        embedding[:, None], shared_modulation[:, None], math.stored(context), zero_rows,
        math.stored(angles.cos()), math.stored(angles.sin()),
    )  # fmt: skip
    return x.view(len(latents), -1, x.shape[-1]), conditions


def leave(layer: FinalLayer, x: Tensor, given: Conditions, math: Arithmetic) -> Tensor:
    """The velocity as patches, [B, L, 4 C]: the final layer, which fp16 keeps in float32."""
    m = modulation(layer.adaln_modulation, given, math)
    h = layernorm_modulate(x, m, torch.float32)
    if math.dtype != torch.bfloat16:
        return F.linear(h, layer.linear.weight)
    return _Stored.apply(F.linear(_Stored.apply(h, math), math.stored(layer.linear.weight)), math)
