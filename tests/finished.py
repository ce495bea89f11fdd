"""Checkpoints and networks of a tiny DiT, for the tests of what is done with finished files."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_dit import TINY, TINY_ADAPTER, adapter_weights, dit_weights, make_dit
from torch import Tensor

from anima_fast.adapters.lora import add_lora
from anima_fast.models.llm_adapter import load_llm_adapter

KINDS = ("lora", "loha", "lokr")


def checkpoint_tensors(prefix: str = "net.", *, adapter: bool = True) -> dict[str, Tensor]:
    """A tiny DiT in float32, with a bundled LLM adapter, under published names."""
    tensors = {prefix + name: tensor for name, tensor in dit_weights(TINY).items()}
    if adapter:
        own = adapter_weights(TINY_ADAPTER)
        tensors |= {f"{prefix}llm_adapter.{name}": tensor for name, tensor in own.items()}
    return tensors


def write_checkpoint(
    path: Path,
    prefix: str = "net.",
    *,
    dtype: torch.dtype = torch.float32,
    adapter: bool = True,
    more: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write that DiT; `more` are further tensors as they are."""
    own = checkpoint_tensors(prefix, adapter=adapter)
    tensors = {name: tensor.to(dtype) for name, tensor in own.items()}
    save_file({**tensors, **(more or {})}, path, metadata)
    return path


def write_network(
    path: Path,
    *,
    kind: str = "lora",
    rank: int = 4,
    alpha: float = 2.0,
    size: float = 0.1,
    seed: int = 1,
    adapter: bool = False,
    dialect: str = "kohya",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    **options,
) -> Path:
    """Write a network with random values for the tiny DiT."""
    llm_adapter = load_llm_adapter(adapter_weights(TINY_ADAPTER)) if adapter else None
    network = add_lora(
        make_dit(), kind=kind, rank=rank, alpha=alpha, seed=seed, llm_adapter=llm_adapter, **options
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        network.flat.add_(size * torch.randn(network.flat.shape, generator=generator))
    network.save(path, dialect, dtype, metadata)
    return path
