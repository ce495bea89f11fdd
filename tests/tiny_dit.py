"""Tiny DiTs and adapters with random weights under the published names, and their inputs."""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from anima_fast.models.dit import AnimaDiT, DitConfig, load_dit
from anima_fast.models.llm_adapter import AdapterConfig, LLMAdapter

TINY = DitConfig(
    model_channels=64,
    num_blocks=3,
    num_heads=2,
    head_dim=32,
    context_dim=24,
    adaln_rank=8,
    mlp_hidden=128,
)
TINY_ADAPTER = AdapterConfig(
    width=64, source_width=40, layers=2, head_dim=32, hidden=128, vocabulary=50, context_dim=64
)


def recipe(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, Tensor]:
    """Weights made from names alone (the recipe of the golden vectors)."""
    return {name: _recipe_tensor(name, tuple(shape), seed) for name, shape in shapes.items()}


def _recipe_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    rng = np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0xFFFFFFFF)
    a = rng.standard_normal(int(np.prod(shape))).astype(np.float32).reshape(shape)
    if name.endswith("gamma") or (name.endswith("weight") and len(shape) == 1):
        a = 1 + np.float32(0.1) * a
    elif name.endswith("bias"):
        a = np.float32(0.05) * a
    else:
        a = a / np.sqrt(np.float32(np.prod(shape[1:])))
    return torch.from_numpy(a.astype(np.float32))


def dit_shapes(config: DitConfig = TINY) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of a DiT without adapter."""
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in AnimaDiT(config).state_dict().items()}


def dit_weights(config: DitConfig = TINY, seed: int = 1) -> dict[str, Tensor]:
    """Random float32 weights of a DiT."""
    return recipe(dit_shapes(config), seed)


def adapter_weights(config: AdapterConfig = TINY_ADAPTER, seed: int = 2) -> dict[str, Tensor]:
    """Random float32 weights of an adapter, without prefix."""
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in LLMAdapter(config).state_dict().items()}
    return recipe(shapes, seed)


def make_dit(config: DitConfig = TINY, dtype: torch.dtype = torch.float32, **options) -> AnimaDiT:
    """A loaded DiT with random weights."""
    return load_dit(dit_weights(config), dtype=dtype, **options)


def make_inputs(
    config: DitConfig = TINY, batch: int = 2, rows: int = 5, size: tuple[int, int] = (8, 12)
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [B, 16, H, W], sigma [B] and context [B, S, C]."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(batch, config.in_channels, *size, generator=generator)
    sigma = torch.rand(batch, generator=generator)
    context = torch.randn(batch, rows, config.context_dim, generator=generator)
    return latents, sigma, context


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest expected value."""
    scale = expected.double().abs().max().clamp_min(1e-30)
    return float((found.double() - expected.double()).abs().max() / scale)
