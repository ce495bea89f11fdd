"""The LLM adapter: T5 token ids read Qwen3 hidden states and become the DiT's text rows.

    x = embed(t5_ids)
    per layer: x += SelfAttn(RMS(x));  x += CrossAttn(RMS(x), states);  x += MLP(RMS(x))
    context = RMS(W_out x + b), rows outside the T5 mask set to zero

Both attentions norm q and k per head and rotate them (RoPE, θ = 10000, each sequence by its own
index). Masks hide keys only; a caption without any Qwen3 token gets zero from cross attention.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anima_fast.errors import UserError
from anima_fast.models.checkpoint import (
    DIT_PREFIXES,
    LEFTOVERS,
    Checkpoint,
    load_into,
    open_checkpoint,
    wrong_kind,
)
from anima_fast.models.rope import apply_rope, sequence_angles

EPS = 1e-6
THETA = 10000.0


@dataclass(frozen=True)
class AdapterConfig:
    """Sizes of an LLM adapter."""

    width: int
    source_width: int
    layers: int
    head_dim: int
    hidden: int
    vocabulary: int
    context_dim: int

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> AdapterConfig:
        """Read every size from the shapes of a state dict without prefix; KeyError if one lacks."""
        layers = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
        return cls(
            width=shapes["embed.weight"][1],
            source_width=shapes["blocks.0.cross_attn.k_proj.weight"][1],
            layers=len(layers),
            head_dim=shapes["blocks.0.self_attn.q_norm.weight"][0],
            hidden=shapes["blocks.0.mlp.0.weight"][0],
            vocabulary=shapes["embed.weight"][0],
            context_dim=shapes["out_proj.weight"][0],
        )


class AdapterNorm(nn.Module):
    """RMS norm that rounds to the weight's dtype before it multiplies the weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] → the same shape in the weight's dtype."""
        x_wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + EPS)
        return (x_wide * rstd).to(self.weight.dtype) * self.weight


class AdapterAttention(nn.Module):
    """Attention with normed, rotated q and k and a mask over the keys."""

    def __init__(self, config: AdapterConfig, source_width: int) -> None:
        super().__init__()
        width = config.width
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(source_width, width, bias=False)
        self.v_proj = nn.Linear(source_width, width, bias=False)
        self.q_norm = AdapterNorm(config.head_dim)
        self.k_norm = AdapterNorm(config.head_dim)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, source: Tensor, key_mask: Tensor) -> Tensor:
        """x [B, N, D] reads source [B, S, C] where key_mask [B, S] is true."""
        heads = (-1, self.head_dim)
        q = self._rotate(self.q_norm(self.q_proj(x).unflatten(-1, heads)))  # [B, N, H, K]
        k = self._rotate(self.k_norm(self.k_proj(source).unflatten(-1, heads)))  # [B, S, H, K]
        v = self.v_proj(source).unflatten(-1, heads)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=key_mask[:, None, None, :],
        ).transpose(1, 2)
        # A sample without any key gets zero, whatever the backend makes of an empty softmax.
        out = torch.where(key_mask.any(-1)[:, None, None, None], out, 0.0)
        return self.o_proj(out.flatten(2))

    def _rotate(self, x: Tensor) -> Tensor:
        angles = sequence_angles(self.head_dim, x.shape[1], THETA, x.device)
        return apply_rope(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))


class AdapterBlock(nn.Module):
    """Self attention over T5 tokens, cross attention to Qwen3 states, MLP; pre-norm residual."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.norm_self_attn = AdapterNorm(config.width)
        self.self_attn = AdapterAttention(config, config.width)
        self.norm_cross_attn = AdapterNorm(config.width)
        self.cross_attn = AdapterAttention(config, config.source_width)
        self.norm_mlp = AdapterNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.width),
        )

    def forward(self, x: Tensor, t5_mask: Tensor, states: Tensor, source_mask: Tensor) -> Tensor:
        """[B, N, D] → [B, N, D]; masks are boolean."""
        h = self.norm_self_attn(x)
        x = x + self.self_attn(h, h, t5_mask)
        x = x + self.cross_attn(self.norm_cross_attn(x), states, source_mask)
        return x + self.mlp(self.norm_mlp(x))


class LLMAdapter(nn.Module):
    """The whole adapter; see the module docstring for the formula."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(AdapterBlock(config) for _ in range(config.layers))
        self.out_proj = nn.Linear(config.width, config.context_dim)
        self.norm = AdapterNorm(config.context_dim)

    def forward(
        self, t5_ids: Tensor, t5_mask: Tensor, source_states: Tensor, source_mask: Tensor
    ) -> Tensor:
        """The DiT's text rows.

        Args:
            t5_ids, t5_mask: [B, N] integers; 1 marks a real token.
            source_states: [B, S, C] Qwen3 states after its final norm.
            source_mask: [B, S]; 1 marks a real token; a row may be all 0.

        Returns:
            [B, N, context width] in the adapter's dtype, rows of masked T5 tokens exactly 0.
        """
        t5_mask, source_mask = t5_mask.bool(), source_mask.bool()
        x = self.embed(t5_ids)
        states = source_states.to(x.dtype)
        for block in self.blocks:
            x = block(x, t5_mask, states, source_mask)
        context = self.norm(self.out_proj(x))
        return torch.where(t5_mask[..., None], context, 0.0)


PREFIXES = (*(prefix + "llm_adapter." for prefix in DIT_PREFIXES), "")
MARKER = "out_proj.weight"


def adapter_tensors(checkpoint: Checkpoint) -> Checkpoint | None:
    """The adapter's tensors of a DiT file or a file of its own; None if it has none."""
    keys = checkpoint.keys()
    for prefix in PREFIXES:
        if prefix + MARKER in keys and prefix + "embed.weight" in keys:
            names = {key[len(prefix) :]: key for key in keys if key.startswith(prefix)}
            return checkpoint.renamed(
                {n: k for n, k in names.items() if not LEFTOVERS.fullmatch(n)}
            )
    return None


def has_llm_adapter(path_or_state_dict: str | os.PathLike | Mapping[str, Tensor]) -> bool:
    """Whether a file holds an LLM adapter. Raises `UserError` when it cannot be read."""
    return adapter_tensors(open_checkpoint(path_or_state_dict)) is not None


def load_llm_adapter(
    path_or_state_dict: str | os.PathLike | Mapping[str, Tensor],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> LLMAdapter:
    """Load the LLM adapter of a DiT file, or a file of its own, frozen and in eval mode.

    Args:
        path_or_state_dict: keys with or without a DiT prefix and `llm_adapter.`.
        device, dtype: where and in which dtype the weights are.

    Returns:
        The module `(t5_ids, t5_mask, source_states, source_mask) -> context`.

    Raises:
        UserError: no adapter in it, or one with missing or unexpected tensors.
    """
    source = open_checkpoint(path_or_state_dict)
    checkpoint = adapter_tensors(source)
    if checkpoint is None:
        raise UserError(
            f"{source.name} holds no LLM adapter (no llm_adapter.out_proj.weight): give its file "
            "with --llm_adapter_path"
        )
    try:
        config = AdapterConfig.from_shapes(checkpoint.shapes)
        with torch.device("meta"):
            adapter = LLMAdapter(config)
    except (KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
        raise wrong_kind(source, "a whole LLM adapter") from error
    load_into(adapter, checkpoint, what="an LLM adapter", device=device, dtype_of=lambda _: dtype)
    return adapter.requires_grad_(False).eval()
