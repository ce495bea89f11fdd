"""The Anima DiT: a Cosmos-Predict2 style transformer that predicts the velocity of rectified flow.

    x = patches(latents, mask) W_x
    e = rmsnorm(sinusoid(σ)),   a = W2 silu(W1 sinusoid(σ))          shared by all blocks
    per block, for F in (self attention, cross attention, MLP):
        shift, scale, gate = split(B_F A_F silu(e) + a)
        x ← x + gate · F(LN(x)·(1 + scale) + shift)
    velocity = unpatch(W_out (LN(x)·(1 + scale) + shift))

Modules carry the published names, so a state dict loads as it is. All sizes come from its shapes.

Dtypes: weights and activations in `dtype`; norm statistics, modulation and RoPE angles in at least
float32; the sinusoid in float32. With float16 the residual stream, the timestep embedding and the
AdaLN linears stay in float32, because the residual stream exceeds what float16 can hold.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anima_fast.errors import UserError
from anima_fast.models.attention import ZeroKeys, attention
from anima_fast.models.checkpoint import (
    DIT_PREFIXES,
    LEFTOVERS,
    Checkpoint,
    load_into,
    open_checkpoint,
    strip_prefix,
    wrong_kind,
)
from anima_fast.models.rope import apply_rope, rope_angles

EPS = 1e-6
PATCH = 2


@dataclass(frozen=True)
class DitConfig:
    """Sizes of a DiT; the defaults of the last two are those of every Anima file."""

    model_channels: int
    num_blocks: int
    num_heads: int
    head_dim: int
    context_dim: int
    adaln_rank: int
    mlp_hidden: int
    in_channels: int = 16
    out_channels: int = 16

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> DitConfig:
        """Read every size from the shapes of a state dict without prefix; KeyError if one lacks."""
        width, patch_in = shapes["x_embedder.proj.1.weight"]
        head_dim = shapes["blocks.0.self_attn.q_norm.weight"][0]
        blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
        return cls(
            model_channels=width,
            num_blocks=len(blocks),
            num_heads=width // head_dim,
            head_dim=head_dim,
            context_dim=shapes["blocks.0.cross_attn.k_proj.weight"][1],
            adaln_rank=shapes["blocks.0.adaln_modulation_self_attn.1.weight"][0],
            mlp_hidden=shapes["blocks.0.mlp.layer1.weight"][0],
            in_channels=patch_in // PATCH**2 - 1,
            out_channels=shapes["final_layer.linear.weight"][0] // PATCH**2,
        )


@dataclass(frozen=True)
class Modulation:
    """The AdaLN vectors of one branch, each [B, 1, D]."""

    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None


@dataclass(frozen=True)
class Shared:
    """What all blocks of one forward read besides the tokens."""

    embedding: Tensor  # [B, 1, D], silu of the normed sinusoid
    shared_modulation: Tensor  # [B, 1, 3 D]
    context: Tensor  # [B, S, C]
    cos: Tensor  # [L, K]
    sin: Tensor  # [L, K]
    zero_keys: ZeroKeys
    attn_mode: str
    split_attn: bool


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 when it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x / sqrt(mean(x²) + ε) · weight over the last dimension, rounded once to x's dtype."""
    x_wide = wide(x)
    rstd = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + EPS)
    return (x_wide * rstd * weight).to(x.dtype)


def layernorm_modulate(x: Tensor, modulation: Modulation, dtype: torch.dtype) -> Tensor:
    """LN(x)·(1 + scale) + shift, computed wide and rounded once to `dtype`."""
    normed = F.layer_norm(wide(x), x.shape[-1:], eps=EPS)
    return (normed * (1 + modulation.scale) + modulation.shift).to(dtype)


def timestep_features(sigma: Tensor, channels: int) -> Tensor:
    """[cos(σ f), sin(σ f)], f_j = 10000^(−j/half): [B] → [B, channels] in at least float32."""
    half = channels // 2
    exponents = torch.arange(half, device=sigma.device, dtype=torch.float32) / half
    angles = wide(sigma)[:, None] * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], -1)


class PatchEmbed(nn.Module):
    """2x2 patches of latents and mask → tokens, features in (channel, row, column) order."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        features = (config.in_channels + 1) * PATCH**2
        self.proj = nn.Sequential(
            nn.Identity(), nn.Linear(features, config.model_channels, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C + 1, H, W] → [B, (H/2)(W/2), D]."""
        patches = F.pixel_unshuffle(x, PATCH)  # [B, (C + 1)·4, H/2, W/2]
        return self.proj(patches.flatten(2).transpose(1, 2))


class TimestepEmbedding(nn.Module):
    """linear_2(silu(linear_1(s))): the vector that every AdaLN of the model adds."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, channels, bias=False)
        self.linear_2 = nn.Linear(channels, 3 * channels, bias=False)

    def forward(self, s: Tensor) -> Tensor:
        """[B, D] → [B, 3 D]."""
        return self.linear_2(F.silu(self.linear_1(s)))


class RMSNorm(nn.Module):
    """RMS norm with a weight per feature; statistics and product in at least float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] → the same shape and dtype."""
        return rms_norm(x, self.weight)


class AdaLN(nn.Sequential):
    """B A silu(e): the low-rank modulation of one branch."""

    def __init__(self, channels: int, rank: int, outputs: int) -> None:
        super().__init__(
            nn.SiLU(), nn.Linear(channels, rank, bias=False), nn.Linear(rank, outputs, bias=False)
        )


class Attention(nn.Module):
    """Multi-head attention with normed queries and keys; self attention when RoPE is given."""

    def __init__(self, config: DitConfig, context_dim: int) -> None:
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.model_channels, inner, bias=False)
        self.k_proj = nn.Linear(context_dim, inner, bias=False)
        self.v_proj = nn.Linear(context_dim, inner, bias=False)
        self.q_norm = RMSNorm(config.head_dim)
        self.k_norm = RMSNorm(config.head_dim)
        self.output_proj = nn.Linear(inner, config.model_channels, bias=False)

    def forward(self, x: Tensor, context: Tensor, shared: Shared, *, rope: bool) -> Tensor:
        """x [B, L, D] attends to context [B, S, C]."""
        heads = (-1, self.head_dim)
        q = self.q_norm(self.q_proj(x).unflatten(-1, heads))  # [B, L, H, K]
        k = self.k_norm(self.k_proj(context).unflatten(-1, heads))  # [B, S, H, K]
        v = self.v_proj(context).unflatten(-1, heads)  # [B, S, H, K]
        if rope:
            q, k = apply_rope(q, shared.cos, shared.sin), apply_rope(k, shared.cos, shared.sin)
        zero_keys = None if rope else shared.zero_keys
        out = attention(
            q, k, v, zero_keys=zero_keys, mode=shared.attn_mode, split=shared.split_attn
        )
        return self.output_proj(out.flatten(2))


class Mlp(nn.Module):
    """layer2(gelu(layer1(x))), exact GELU."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(channels, hidden, bias=False)
        self.layer2 = nn.Linear(hidden, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] → [B, L, D]."""
        return self.layer2(F.gelu(self.layer1(x)))


class Block(nn.Module):
    """Self attention, cross attention and MLP, each modulated and gated."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        channels, rank = config.model_channels, config.adaln_rank
        self.self_attn = Attention(config, channels)
        self.cross_attn = Attention(config, config.context_dim)
        self.mlp = Mlp(channels, config.mlp_hidden)
        self.adaln_modulation_self_attn = AdaLN(channels, rank, 3 * channels)
        self.adaln_modulation_cross_attn = AdaLN(channels, rank, 3 * channels)
        self.adaln_modulation_mlp = AdaLN(channels, rank, 3 * channels)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        """[B, L, D] → [B, L, D] in the dtype of the residual stream."""
        dtype = self.mlp.layer1.weight.dtype
        m = modulate(self.adaln_modulation_self_attn, shared)
        h = layernorm_modulate(x, m, dtype)
        x = x + m.gate * self.self_attn(h, h, shared, rope=True)

        m = modulate(self.adaln_modulation_cross_attn, shared)
        h = layernorm_modulate(x, m, dtype)
        x = x + m.gate * self.cross_attn(h, shared.context, shared, rope=False)

        m = modulate(self.adaln_modulation_mlp, shared)
        h = layernorm_modulate(x, m, dtype)
        return x + m.gate * self.mlp(h)


def modulate(adaln: AdaLN, shared: Shared) -> Modulation:
    """split3(B A silu(e) + a) as shift, scale, gate."""
    vectors = adaln[2](adaln[1](shared.embedding)) + shared.shared_modulation
    return Modulation(*vectors.chunk(3, -1))


class FinalLayer(nn.Module):
    """Modulated norm and the projection to patches."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        channels = config.model_channels
        self.linear = nn.Linear(channels, config.out_channels * PATCH**2, bias=False)
        self.adaln_modulation = AdaLN(channels, config.adaln_rank, 2 * channels)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        """[B, L, D] → [B, L, 4 C], features in (row, column, channel) order."""
        vectors = self.adaln_modulation[2](self.adaln_modulation[1](shared.embedding))
        vectors = vectors + shared.shared_modulation[..., : vectors.shape[-1]]
        modulation = Modulation(*vectors.chunk(2, -1))
        return self.linear(layernorm_modulate(x, modulation, self.linear.weight.dtype))


BlockRunner = Callable[[int, Block, Tensor, Shared], Tensor]


class AnimaDiT(nn.Module):
    """The whole transformer; see the module docstring for the formula.

    Attributes: `attn_mode` and `split_attn` choose the attention (models/attention.py);
    `block_runner(index, block, x, shared)` replaces the plain call of a block when it is set
    (memory/offload.py: checkpointing, block swap).
    """

    def __init__(self, config: DitConfig, attn_mode: str = "torch") -> None:
        super().__init__()
        self.config = config
        self.attn_mode = attn_mode
        self.split_attn = False
        self.block_runner: BlockRunner | None = None
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = nn.Sequential(nn.Identity(), TimestepEmbedding(config.model_channels))
        self.t_embedding_norm = RMSNorm(config.model_channels)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.final_layer = FinalLayer(config)

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
        """Velocity at noise level σ.

        Args:
            latents: [B, 16, H, W] or [B, 16, 1, H, W], H and W even.
            sigma: [B] in [0, 1], the model's time.
            context: [B, S, C] text rows (the LLM adapter's output).
            zero_keys: count (one, or one per sample) of all-zero text rows that follow `context`
                and are attended to; None means that `context` already holds all its rows.
            padding_mask: [B, 1, h, w], all zeros when None; resized to the latents if it differs.

        Returns:
            Velocity of the latents' shape, in the compute dtype.

        Raises:
            ValueError: a shape that does not fit.
        """
        image = latents.squeeze(2) if latents.ndim == 5 else latents
        self._check(latents, image, sigma, context)
        height, width = image.shape[-2] // PATCH, image.shape[-1] // PATCH
        x = self.x_embedder(self._with_mask(image, padding_mask))  # [B, L, D]
        # float16 cannot hold the residual stream.
        x = x.float() if x.dtype == torch.float16 else x

        shared = self._shared(sigma, context, height, width, zero_keys)
        for index, block in enumerate(self.blocks):
            if self.block_runner is None:
                x = block(x, shared)
            else:
                x = self.block_runner(index, block, x, shared)
        patches = self.final_layer(x, shared)  # [B, L, 4 C]
        out = patches.view(len(x), height, width, PATCH, PATCH, -1)
        out = out.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, *image.shape[-2:])
        return out.to(self.dtype).view(len(x), -1, *latents.shape[2:])

    def _check(self, latents: Tensor, image: Tensor, sigma: Tensor, context: Tensor) -> None:
        channels = self.config.in_channels
        if (
            image.ndim != 4
            or image.shape[1] != channels
            or image.shape[2] % 2
            or image.shape[3] % 2
        ):
            raise ValueError(
                f"latents are {tuple(latents.shape)}, expected [B, {channels}, H, W] or "
                f"[B, {channels}, 1, H, W] with even H and W"
            )
        if sigma.shape != image.shape[:1]:
            raise ValueError(f"sigma is {tuple(sigma.shape)}, expected [B] = ({len(image)},)")
        if (
            context.ndim != 3
            or len(context) != len(image)
            or context.shape[2] != self.config.context_dim
        ):
            raise ValueError(
                f"context is {tuple(context.shape)}, expected [B, S, C] with B = {len(image)}, "
                f"C = {self.config.context_dim}"
            )

    def _with_mask(self, image: Tensor, mask: Tensor | None) -> Tensor:
        image = image.to(self.dtype)
        if mask is None:
            mask = image.new_zeros(len(image), 1, *image.shape[-2:])
        elif mask.shape[-2:] != image.shape[-2:]:
            mask = F.interpolate(mask.float(), size=image.shape[-2:], mode="nearest")
        return torch.cat([image, mask.to(image).expand(len(image), -1, -1, -1)], 1)

    def _shared(
        self, sigma: Tensor, context: Tensor, height: int, width: int, zero_keys: ZeroKeys
    ) -> Shared:
        embed = self.t_embedder[1]
        features = timestep_features(sigma, self.config.model_channels)
        features = features.to(embed.linear_1.weight.dtype)
        angles = rope_angles(self.config.head_dim, 1, height, width, sigma.device)
        return Shared(
            embedding=F.silu(self.t_embedding_norm(features))[:, None],
            shared_modulation=embed(features)[:, None],
            context=context.to(self.dtype),
            cos=angles.cos().to(self.dtype),
            sin=angles.sin().to(self.dtype),
            zero_keys=zero_keys,
            attn_mode=self.attn_mode,
            split_attn=self.split_attn,
        )


# Kept in float32 when the compute dtype is float16, because their results exceed its range.
FP32_PARTS = ("t_embedder.", "t_embedding_norm.", "final_layer.", ".adaln_modulation_")
MARKER = "x_embedder.proj.1.weight"


def load_dit(
    path_or_state_dict: str | os.PathLike | Mapping[str, Tensor],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    attn_mode: str = "torch",
) -> AnimaDiT:
    """Load a DiT with frozen weights, in eval mode.

    Args:
        path_or_state_dict: a .safetensors file or a state dict, with any of the published prefixes;
            a bundled LLM adapter and known leftovers are passed over.
        device: where the weights go.
        dtype: weights and activations; float16 keeps the residual stream and AdaLN in float32.
        attn_mode: torch, xformers, flash or sageattn.

    Returns:
        The module `(latents, sigma, context, *, zero_keys=None, padding_mask=None) -> velocity`.

    Raises:
        UserError: no DiT, a damaged one, or one with missing or unexpected tensors.
    """
    checkpoint = dit_tensors(open_checkpoint(path_or_state_dict))
    try:
        config = DitConfig.from_shapes(checkpoint.shapes)
        with torch.device("meta"):
            dit = AnimaDiT(config, attn_mode)
    except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
        raise UserError(
            f"{checkpoint.name} is no whole Anima DiT ({error} is missing or has a wrong shape): "
            "download it again"
        ) from error
    half = dtype == torch.float16

    def dtype_of(name: str) -> torch.dtype:
        return torch.float32 if half and any(part in f".{name}" for part in FP32_PARTS) else dtype

    load_into(dit, checkpoint, what="an Anima DiT", device=device, dtype_of=dtype_of)
    return dit.requires_grad_(False).eval()


def dit_tensors(checkpoint: Checkpoint) -> Checkpoint:
    """The DiT's own tensors of a file, under their published names without prefix.

    Where a prefix is found, tensors outside it belong to other models of an all-in-one file. Raises
    `UserError` when the file holds no DiT.
    """
    prefix = strip_prefix(checkpoint.keys(), MARKER, DIT_PREFIXES)
    if prefix is None:
        raise wrong_kind(checkpoint, "an Anima DiT")
    names = {key[len(prefix) :]: key for key in checkpoint.shapes if key.startswith(prefix)}
    own = {
        name: key
        for name, key in names.items()
        if not name.startswith("llm_adapter.") and not LEFTOVERS.fullmatch(name)
    }
    return checkpoint.renamed(own)
