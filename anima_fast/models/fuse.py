"""Installing the fused block (block.py): which tensors of an eager block it reads, and when it may.

`fuse_blocks` sets `block.fused` of every block. On each call it collects the weights and adapters
that the eager block has at that moment and hands them to the fused Function; where it cannot take
them on, the eager block runs and the reason is logged once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anima_fast.models.block import GROUPS, FusedBlockFunction, Settings
from anima_fast.models.dit_layers import Shared
from anima_fast.models.modulation import adaln_layers, pack
from anima_fast.models.recompute import block_policies

if TYPE_CHECKING:
    from anima_fast.models.dit import AnimaDiT, Block

log = logging.getLogger(__name__)

NORMS = ("self_attn.q_norm", "self_attn.k_norm", "cross_attn.q_norm", "cross_attn.k_norm")


class NotFused(Exception):
    """Why a block must run eagerly."""


@dataclass(frozen=True)
class Layer:
    """A frozen linear layer and its adapter; `down` and `up` have no rows without one."""

    weight: Tensor
    down: Tensor
    up: Tensor
    scale: float
    factor: Tensor | None


def submodule(block: nn.Module, name: str) -> nn.Module:
    """The module at a dotted name."""
    for part in name.split("."):
        block = getattr(block, part)
    return block


def gather(block: Block, tokens: int, rows: int, batch: int) -> dict[str, list[Layer]]:
    """Weights and adapters of a block, dropout drawn in the order of the eager block.

    Args:
        block: the eager block.
        tokens, rows: L and S.
        batch: B.

    Raises:
        NotFused: trained weights, several adapters on one layer, or dropout on AdaLN adapters.
    """
    for name, parameter in block.named_parameters():
        if parameter.requires_grad:
            raise NotFused(f"{name} is trained: full fine-tuning")
    for name, module in block.named_modules():
        adapters = getattr(module, "adapters", ())
        if len(adapters) > 1:
            raise NotFused(f"{name} has {len(adapters)} adapters")
        if "adaln" in name and any(adapter.drops for adapter in adapters):
            raise NotFused(f"{name}: an AdaLN adapter with dropout")
    groups = {}
    for group, names in GROUPS.items():
        length = rows if group == "cross_kv" else tokens
        groups[group] = [_layer(submodule(block, name), batch, length) for name in names]
    return groups


def _layer(linear: nn.Linear, batch: int, length: int) -> Layer:
    weight = linear.weight
    for adapter in getattr(linear, "adapters", ()):
        scale, factor = adapter.draw(batch, length, weight)
        if scale:
            flat = None if factor is None else factor.reshape(batch * length, -1)
            return Layer(weight, adapter.down, adapter.up, scale, flat)
    return Layer(weight, weight[:0], weight[:, :0], 0.0, None)


def fuse_blocks(
    dit: AnimaDiT, recompute: str | int = "none", *, swapped: Collection[int] = ()
) -> None:
    """Let every block of a DiT run fused; call it where the weights are on their device.

    Weights of layers that read one input, and of all AdaLN, move into packed buffers and stay what
    they are under their own names.

    Args:
        dit: the model; adapters may be attached before or later.
        recompute: none, mlp, block, or a count of blocks at `block`, the rest at `none`.
        swapped: blocks whose weights live elsewhere (memory/offload.py): they are not packed, and
            kept whole, as their runner computes them again.

    Raises:
        ValueError: another `recompute`.
    """
    for index, policy in enumerate(block_policies(recompute, len(dit.blocks))):
        dit.blocks[index].fused = FusedBlock(index, "none" if index in swapped else policy)
    for index, block in enumerate(dit.blocks):
        if index in swapped:
            continue
        for names in GROUPS.values():
            layers = [submodule(block, name) for name in names]
            if len(layers) > 1 and not any(layer.weight.requires_grad for layer in layers):
                pack(layers)
    for layers in adaln_layers(dit.blocks):
        if not any(layer.weight.requires_grad for layer in layers):
            pack(layers)


def unfuse_blocks(dit: AnimaDiT) -> None:
    """Let every block run eagerly again."""
    for block in dit.blocks:
        block.fused = None


@dataclass
class FusedBlock:
    """How one block runs fused; `block.fused` of an eager block.

    Attributes:
        policy: none, mlp or block.
        pack, unpack: with policy `block`, where x₀ waits (memory/offload.py).
    """

    index: int
    policy: str = "none"
    pack: Callable[[Tensor], Any] | None = None
    unpack: Callable[[Any], Tensor] | None = None

    def __call__(self, block: Block, x: Tensor, shared: Shared) -> Tensor | None:
        """x₃ [B, L, D], or None where the eager block must run, which is logged once."""
        batch, tokens, _ = x.shape
        try:
            groups = gather(block, tokens, shared.context.shape[1], batch)
        except NotFused as reason:
            _say_once(f"fused kernels are off, the eager block runs: {reason}")
            return None
        half = shared.cos.shape[-1] // 2
        tensors: dict[str, Tensor | None] = {
            "x0": x,
            "context": shared.context,
            "modulation": shared.modulations[self.index],
            "cos": shared.cos[:, :half],
            "sin": shared.sin[:, :half],
            "norm.self": _norms(block, NORMS[:2]),
            "norm.cross": _norms(block, NORMS[2:]),
        }
        for group, layers in groups.items():
            for i, layer in enumerate(layers):
                tensors[f"weight.{group}.{i}"] = layer.weight
                tensors[f"down.{group}.{i}"] = layer.down
                tensors[f"up.{group}.{i}"] = layer.up
                tensors[f"factor.{group}.{i}"] = layer.factor
        settings = Settings(
            policy=self.policy,
            attn_mode=shared.attn_mode,
            dtype=shared.dtype,
            head_dim=block.self_attn.head_dim,
            scales={group: [layer.scale for layer in layers] for group, layers in groups.items()},
            rows=shared.zero_rows,
            pack=self.pack,
            unpack=self.unpack,
        )
        return FusedBlockFunction.apply(settings, list(tensors), *tensors.values())


def _norms(block: Block, names: Sequence[str]) -> Tensor:
    return torch.stack([submodule(block, name).weight for name in names])


_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        log.warning(text)
