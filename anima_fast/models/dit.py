"""The Anima DiT: a Cosmos-Predict2 style transformer that predicts the velocity of rectified flow.

    x = W_x patches(latents, mask)
    e = rmsnorm(s),   a = W2 silu(W1 s),   s = sinusoid(σ)                  shared by all blocks
    per block, for F in (self attention, cross attention, MLP):
        shift, scale, gate = split3(B_F A_F silu(e) + a)
        x ← x + gate · F(LN(x)·(1 + scale) + shift)
    velocity = unpatch(W_out (LN(x)·(1 + scale) + shift))

Modules carry the published names, so a state dict loads as it is; all sizes come from its shapes.

Dtypes, without autocast: weights and activations in `dtype`; norm statistics, modulation and RoPE
angles in at least float32; σ stays as given until its sinusoid is rounded to the weights' dtype.
With float16 the timestep embedding and the AdaLN linears stay in float32, and so does the residual
stream, which exceeds what float16 can hold; fused blocks keep it in their own form (`stream`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anima_fast.models.attention import ZeroKeys, prepare_zero_rows
from anima_fast.models.checkpoint import (
    FOREIGN,
    LEFTOVERS,
    Checkpoint,
    load_network,
    strip_prefix,
    wrong_kind,
)
from anima_fast.models.dit_config import DitConfig
from anima_fast.models.dit_layers import (
    PATCH,
    AdaLN,
    CrossAttention,
    FinalLayer,
    Mlp,
    Modulation,
    PatchEmbed,
    RMSNorm,
    SelfAttention,
    Shared,
    TimestepEmbedding,
    layernorm_modulate,
    share_scale,
    timestep_features,
)
from anima_fast.models.rope import rope_angles
from anima_fast.models.saturation import Saturation

# How the blocks hold the residual stream: into it, and out of it.
Stream = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
# Kept in float32 when the compute dtype is float16, because their results exceed its range.
FP32_PARTS = re.compile(r"(t_embedder|t_embedding_norm|final_layer)\..*|.*\.adaln_modulation_.*")
# Tensors in a DiT file that do not belong to the DiT.
PASSED_OVER = (re.compile(r"llm_adapter\..*"), LEFTOVERS, FOREIGN)


class Block(nn.Module):
    """Self attention, cross attention and MLP; `fused`, when set, runs in place of `eager`."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.fused: Callable[[Block, Tensor, Shared], Tensor] | None = None
        channels, rank = config.model_channels, config.adaln_rank
        self.self_attn = SelfAttention(channels, channels, config.head_dim)
        self.cross_attn = CrossAttention(channels, config.context_dim, config.head_dim)
        self.mlp = Mlp(channels, config.mlp_hidden)
        self.adaln_modulation_self_attn = AdaLN(channels, rank, 3 * channels)
        self.adaln_modulation_cross_attn = AdaLN(channels, rank, 3 * channels)
        self.adaln_modulation_mlp = AdaLN(channels, rank, 3 * channels)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        """[B, L, D] → [B, L, D] in the dtype of the residual stream."""
        return self.eager(x, shared) if self.fused is None else self.fused(self, x, shared)

    def eager(self, x: Tensor, shared: Shared) -> Tensor:
        """The block as it is defined."""
        m = modulation(self.adaln_modulation_self_attn, shared)
        h = layernorm_modulate(x, m, shared.dtype)
        x = x + m.gate * self.self_attn(h, shared)

        m = modulation(self.adaln_modulation_cross_attn, shared)
        h = layernorm_modulate(x, m, shared.dtype)
        x = x + m.gate * self.cross_attn(h, shared)

        m = modulation(self.adaln_modulation_mlp, shared)
        h = layernorm_modulate(x, m, shared.dtype)
        return x + m.gate * self.mlp(h)


def modulation(adaln: AdaLN, shared: Shared) -> Modulation:
    """split3(B A silu(e) + a) as shift, scale, gate."""
    shift, scale, gate = (adaln(shared.embedding) + shared.shared_modulation).chunk(3, -1)
    return Modulation(shift, scale, gate)


# (index, block, x, shared) → x
RunBlock = Callable[[int, Block, Tensor, Shared], Tensor]
# (blocks, e, a) → the modulation of all blocks, [blocks, B, 9, D]
Modulate = Callable[[Sequence[Block], Tensor, Tensor], Tensor]


class AnimaDiT(nn.Module):
    """The transformer; see the module docstring for the formula.

    Attributes:
        attn_mode, split_attn: which attention (models/attention.py).
        block_runner: runs one block; None unless somebody sets it.
        graphs: runs all blocks (models/block_graphs.py), or None.
        modulate: computes the modulation of all blocks at once, for blocks that read it; or None.
        stream: how the blocks hold the residual stream of [B, L, D].
        saturation: counts what float16 products of fused blocks cannot hold, or None.
    """

    def __init__(self, config: DitConfig, attn_mode: str = "torch") -> None:
        super().__init__()
        self.config = config
        self.attn_mode = attn_mode
        self.split_attn = False
        self.block_runner: RunBlock | None = None
        self.graphs: Any = None
        self.modulate: Modulate | None = None
        self.stream: Stream = PLAIN_STREAM
        self.saturation: Saturation | None = None
        channels = config.model_channels
        self.x_embedder = PatchEmbed(config.in_channels, channels)
        self.t_embedder = nn.Sequential(nn.Identity(), TimestepEmbedding(channels))
        self.t_embedding_norm = RMSNorm(channels)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.final_layer = FinalLayer(channels, config.adaln_rank, config.out_channels)

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.x_embedder.proj[1].weight.dtype

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor,
        context: Tensor,
        *,
        zero_keys: ZeroKeys = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Velocity of the latents' shape, in the compute dtype (float32 for float16).

        Args:
            latents: [B, 16, H, W] or [B, 16, 1, H, W], H and W even.
            sigma: [B] in [0, 1], the model's time and noise level; give it in float32.
            context: [B, S, C] text rows (the LLM adapter's output).
            zero_keys: count (one, or one per sample) of all-zero text rows that follow `context`
                and are attended to; None means that `context` already holds all its rows. A
                negative count leaves out zero rows that `context` ends with.
            padding_mask: [B, 1, h, w], all zeros when None; resized to the latents if it differs.

        Raises `ValueError` for a shape that does not fit.
        """
        image = latents.squeeze(2) if latents.ndim == 5 else latents
        self._check(latents, image, sigma, context)
        height, width = (size // PATCH for size in image.shape[-2:])
        x = self.x_embedder(with_mask(image.to(self.dtype), padding_mask))  # [B, L, D]
        shared = self._shared(sigma, context, height, width, zero_keys)
        x = self.run_blocks(x, shared) if self.graphs is None else self.graphs(self, x, shared)

        patches = self.final_layer(x, shared)  # [B, L, 4 C]
        out = patches.view(len(x), height, width, PATCH, PATCH, -1)
        out = out.permute(0, 5, 1, 3, 2, 4)  # [B, C, H/2, 2, W/2, 2]
        return out.reshape(len(x), -1, *latents.shape[2:])

    def run_blocks(self, x: Tensor, shared: Shared) -> Tensor:
        """All blocks, one after another: [B, L, D] → [B, L, D]."""
        run = self.block_runner or (lambda index, block, x, shared: block(x, shared))
        into, out_of = self.stream
        x = into(x)
        for index, block in enumerate(self.blocks):
            x = run(index, block, x, shared)
        return out_of(x)

    def run_eagerly(self) -> None:
        """Take every hook out: each block runs as it is defined."""
        self.block_runner = self.graphs = self.modulate = self.saturation = None
        self.stream = PLAIN_STREAM
        for block in self.blocks:
            block.fused = None

    def _check(self, latents: Tensor, image: Tensor, sigma: Tensor, context: Tensor) -> None:
        channels, width = self.config.in_channels, self.config.context_dim
        if image.ndim != 4 or image.shape[1] != channels or any(n % 2 for n in image.shape[2:]):
            raise ValueError(
                f"latents are {tuple(latents.shape)}, expected [B, {channels}, H, W] or "
                f"[B, {channels}, 1, H, W] with even H and W"
            )
        batch = len(image)
        if sigma.shape != (batch,):
            raise ValueError(f"sigma is {tuple(sigma.shape)}, expected [B] = ({batch},)")
        if context.ndim != 3 or len(context) != batch or context.shape[2] != width:
            raise ValueError(
                f"context is {tuple(context.shape)}, expected [B, S, C] = ({batch}, S, {width})"
            )

    def _shared(
        self, sigma: Tensor, context: Tensor, height: int, width: int, zero_keys: ZeroKeys
    ) -> Shared:
        features = timestep_features(sigma, self.config.model_channels)
        features = features.to(self.t_embedding_norm.weight.dtype)  # [B, D]
        angles = rope_angles(self.config.head_dim, 1, height, width, sigma.device)
        embedding = self.t_embedding_norm(features)[:, None]
        shared_modulation = self.t_embedder(features)[:, None]
        modulations = None
        if self.modulate is not None:
            modulations = self.modulate(self.blocks, embedding, shared_modulation)
        return Shared(
            embedding=embedding,
            shared_modulation=shared_modulation,
            modulations=modulations,
            context=context.to(self.dtype),
            cos=angles.cos().to(self.dtype),
            sin=angles.sin().to(self.dtype),
            zero_rows=prepare_zero_rows(zero_keys, len(sigma), self.dtype, context.device),
            dtype=self.dtype,
            attn_mode=self.attn_mode,
            split_attn=self.split_attn,
        )


def no_half(x: Tensor) -> Tensor:
    """x, in float32 if it is float16, which cannot hold the residual stream."""
    return x.float() if x.dtype == torch.float16 else x


PLAIN_STREAM: Stream = (no_half, no_half)


def with_mask(image: Tensor, mask: Tensor | None) -> Tensor:
    """[B, C, H, W] and the padding mask [B, 1, h, w] (None: zeros) → [B, C + 1, H, W]."""
    if mask is None:
        mask = image.new_zeros(len(image), 1, *image.shape[2:])
    elif mask.shape[2:] != image.shape[2:]:
        mask = F.interpolate(mask.float(), size=image.shape[2:], mode="nearest")
    return torch.cat([image, mask.to(image).expand(len(image), -1, -1, -1)], 1)


def load_dit(
    path_or_state_dict: str | os.PathLike | Mapping[str, Tensor],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    attn_mode: str = "torch",
) -> AnimaDiT:
    """A DiT with frozen weights, in eval mode.

    Args:
        path_or_state_dict: a .safetensors file or a state dict, with any of the published prefixes;
            a bundled LLM adapter and known leftovers are ignored.
        device: where the weights go.
        dtype: weights and activations; float16 keeps the residual stream and AdaLN in float32.
        attn_mode: torch, xformers, flash or sageattn.

    Raises `UserError` for no DiT, a damaged one, or one with missing or unexpected tensors.
    """
    checkpoint = dit_tensors(Checkpoint.open(path_or_state_dict))

    def dtype_of(name: str) -> torch.dtype:
        half = dtype == torch.float16 and FP32_PARTS.fullmatch(name)
        return torch.float32 if half else dtype

    dit = load_network(
        checkpoint,
        DitConfig.from_shapes,
        lambda config: AnimaDiT(config, attn_mode),
        what="Anima DiT",
        device=device,
        dtype_of=dtype_of,
    )
    for block in dit.blocks:
        own, cross = block.self_attn, block.cross_attn
        share_scale([own.q_proj, own.k_proj, own.v_proj])
        share_scale([cross.k_proj, cross.v_proj])
    return dit


def dit_tensors(checkpoint: Checkpoint) -> Checkpoint:
    """The DiT's own tensors of a file, under their published names without prefix.

    Where a prefix is found, tensors outside it belong to other models of an all-in-one file. Raises
    `UserError` when the file holds no DiT.
    """
    prefix = strip_prefix(checkpoint.shapes)
    if prefix is None:
        raise wrong_kind(checkpoint, "an Anima DiT")
    names = {key.removeprefix(prefix): key for key in checkpoint.shapes if key.startswith(prefix)}
    own = {n: k for n, k in names.items() if not any(p.fullmatch(n) for p in PASSED_OVER)}
    return checkpoint.renamed(own)
