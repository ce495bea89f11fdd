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
from anima_fast.kernels.op import wide
from anima_fast.models.checkpoint import (
    DIT_PREFIXES,
    LEFTOVERS,
    Checkpoint,
    count_blocks,
    detect_kind,
    load_network,
    size_of,
    strip_prefix,
    wrong_kind,
)
from anima_fast.models.rope import apply_rope, sequence_angles

EPS = 1e-6
PREFIXES = tuple(prefix + "llm_adapter." for prefix in DIT_PREFIXES)
# The first of these marks a bundled adapter; a separate file needs both.
MARKERS = ("out_proj.weight", "embed.weight")


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
        """Read every size from the shapes of a state dict without prefix; raises as `size_of`."""
        vocabulary, width = size_of(shapes, "embed.weight")
        head_dim = size_of(shapes, "blocks.0.self_attn.q_norm.weight")[0]
        if head_dim % 2 or width % head_dim:
            raise UserError(f"width {width} does not divide into heads of {head_dim}")
        return cls(
            width=width,
            source_width=size_of(shapes, "blocks.0.cross_attn.k_proj.weight")[1],
            layers=count_blocks(shapes),
            head_dim=head_dim,
            hidden=size_of(shapes, "blocks.0.mlp.0.weight")[0],
            vocabulary=vocabulary,
            context_dim=size_of(shapes, "out_proj.weight")[0],
        )


@dataclass(frozen=True)
class AttentionKeys:
    """What an attention reads besides its tokens: the key mask and the rotations."""

    mask: Tensor  # [B, S], true where a key counts
    q_angles: Tensor  # [N, K]
    k_angles: Tensor  # [S, K]


class AdapterNorm(nn.Module):
    """RMS norm that rounds to the weight's dtype before the product; `fused`: as one kernel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fused = False
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] → the same shape in the weight's dtype."""
        if self.fused:
            # Imported here so that the eager adapter runs without Triton.
            from anima_fast.kernels.rmsnorm import rmsnorm

            return rmsnorm(x, self.weight)
        x_wide = wide(x)
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

    def forward(self, x: Tensor, source: Tensor, keys: AttentionKeys) -> Tensor:
        """x [B, N, D] reads source [B, S, C] where the mask is true; without any key it gets 0."""
        heads = (-1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).unflatten(-1, heads)), keys.q_angles)  # [B, N, H, K]
        k = rotate(self.k_norm(self.k_proj(source).unflatten(-1, heads)), keys.k_angles)
        v = self.v_proj(source).unflatten(-1, heads)  # [B, S, H, K]
        q, k, v = (h.transpose(1, 2) for h in (q, k, v))
        # An empty softmax is NaN in some backends, forward or backward: a sample without keys
        # attends to all of them and its result is dropped.
        empty = ~keys.mask.any(-1)  # [B]
        mask = (keys.mask | empty[:, None])[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        out = out.masked_fill(empty[:, None, None, None], 0.0)
        return self.o_proj(out.flatten(2))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """RoPE of x [B, L, H, K] by angles [L, K], whose cosines are rounded to x's dtype."""
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
        up = nn.Linear(config.width, config.hidden)
        self.mlp = nn.Sequential(up, nn.GELU(), nn.Linear(config.hidden, config.width))

    def forward(
        self, x: Tensor, states: Tensor, t5: AttentionKeys, source: AttentionKeys
    ) -> Tensor:
        """x [B, N, D] → [B, N, D]; states [B, S, C]."""
        h = self.norm_self_attn(x)
        x = x + self.self_attn(h, h, t5)
        x = x + self.cross_attn(self.norm_cross_attn(x), states, source)
        return x + self.mlp(self.norm_mlp(x))


class LLMAdapter(nn.Module):
    """The adapter of the module docstring; `fused` says whether every norm is one kernel."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config, self.fused = config, False
        # Without values: drawing normal numbers on the meta device imports dynamo, which takes 2 s.
        table = torch.empty(config.vocabulary, config.width)
        self.embed = nn.Embedding.from_pretrained(table, freeze=False)
        self.blocks = nn.ModuleList(AdapterBlock(config) for _ in range(config.layers))
        self.out_proj = nn.Linear(config.width, config.context_dim)
        self.norm = AdapterNorm(config.context_dim)

    def fuse_norms(self, on: bool = True) -> None:
        """Run every norm as one kernel, or not."""
        self.fused = on
        for module in self.modules():
            if isinstance(module, AdapterNorm):
                module.fused = on

    def forward(
        self, t5_ids: Tensor, t5_mask: Tensor, source_states: Tensor, source_mask: Tensor
    ) -> Tensor:
        """The DiT's text rows: [B, N, context width], rows of masked T5 tokens exactly 0.

        Args:
            t5_ids, t5_mask: [B, N] integers; 1 marks a real token.
            source_states: [B, S, C] Qwen3 states after its final norm.
            source_mask: [B, S]; 1 marks a real token; a row may be all 0.

        Raises `ValueError` for states of another width, or masks that do not fit.
        """
        self._check(t5_ids, t5_mask, source_states, source_mask)
        x = self.embed(t5_ids)
        states = source_states.to(x.dtype)
        head_dim, device = self.config.head_dim, x.device
        t5_angles = sequence_angles(head_dim, x.shape[1], device)
        source_angles = sequence_angles(head_dim, states.shape[1], device)
        t5 = AttentionKeys(t5_mask.bool(), t5_angles, t5_angles)
        source = AttentionKeys(source_mask.bool(), t5_angles, source_angles)
        for block in self.blocks:
            x = block(x, states, t5, source)
        context = self.norm(self.out_proj(x))
        return context.masked_fill(~t5.mask[..., None], 0.0)

    def _check(self, ids: Tensor, mask: Tensor, states: Tensor, source_mask: Tensor) -> None:
        width = self.config.source_width
        if states.ndim != 3 or states.shape[2] != width or len(states) != len(ids):
            raise ValueError(
                f"source_states are {tuple(states.shape)}, expected [B, S, C] = "
                f"({len(ids)}, S, {width})"
            )
        if mask.shape != ids.shape or source_mask.shape != states.shape[:2]:
            raise ValueError(
                f"masks are {tuple(mask.shape)} and {tuple(source_mask.shape)}, expected "
                f"{tuple(ids.shape)} and {tuple(states.shape[:2])}"
            )


def adapter_tensors(checkpoint: Checkpoint) -> Checkpoint | None:
    """The adapter's tensors, without prefix, of a DiT file or a separate file, or None."""
    keys = checkpoint.shapes
    prefix = strip_prefix(keys, PREFIXES, MARKERS, at_least=1)
    if prefix is None:
        prefix = strip_prefix(keys, ("",), MARKERS, at_least=2)
    if prefix is None:
        return None
    names = {key.removeprefix(prefix): key for key in keys if key.startswith(prefix)}
    return checkpoint.renamed({n: k for n, k in names.items() if not LEFTOVERS.fullmatch(n)})


def has_llm_adapter(path_or_state_dict: str | os.PathLike | Mapping[str, Tensor]) -> bool:
    """Whether a file holds an LLM adapter. Raises `UserError` when it cannot be read."""
    return adapter_tensors(Checkpoint.open(path_or_state_dict)) is not None


def load_llm_adapter(
    path_or_state_dict: str | os.PathLike | Mapping[str, Tensor],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> LLMAdapter:
    """The LLM adapter of a DiT file or of a separate file, frozen and in eval mode.

    Keys may have a DiT prefix and `llm_adapter.`. Raises `UserError` when there is no adapter, or
    one with missing or unexpected tensors.
    """
    source = Checkpoint.open(path_or_state_dict)
    checkpoint = adapter_tensors(source)
    if checkpoint is None and detect_kind(source) in ("dit", "llm_adapter"):
        raise UserError(
            f"{source.name} holds no LLM adapter (no llm_adapter.out_proj.weight): give its file "
            "with --llm_adapter_path"
        )
    if checkpoint is None:
        raise wrong_kind(source, "a file with an LLM adapter")
    return load_network(
        checkpoint,
        AdapterConfig.from_shapes,
        LLMAdapter,
        what="LLM adapter",
        device=device,
        dtype_of=lambda _: dtype,
    )
