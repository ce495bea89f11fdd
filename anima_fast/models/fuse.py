"""Installing the fused block (block.py): which tensors of an eager block it reads, and when it may.

`fuse_blocks` sets `block.fused` of every block. Each call collects the weights and adapters that
the eager block has at that moment and hands them to the fused Function; where it does not support
them, the eager block runs and the reason is logged once.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anima_fast.kernels.products import stacked
from anima_fast.kernels.row_powers import powers_of, with_powers, without_powers
from anima_fast.models.block import GROUPS, KINDS, NAMES, BlockSettings, FusedBlockFunction
from anima_fast.models.dit import AnimaDiT, Block
from anima_fast.models.dit_layers import Shared, attached
from anima_fast.models.modulation import adaln_layers, batched_modulation, pack
from anima_fast.models.recompute import block_policies, recomputed
from anima_fast.models.saturation import Saturation

log = logging.getLogger(__name__)

NORMS = ("self_attn.q_norm", "self_attn.k_norm", "cross_attn.q_norm", "cross_attn.k_norm")


class NotFused(Exception):
    """Why a block must run eagerly."""


@dataclass(frozen=True)
class FrozenLinear:
    """A frozen linear layer and its adapter; `down` and `up` have no rows without one."""

    weight: Tensor
    down: Tensor
    up: Tensor
    scale: float
    factor: Tensor | None


# The place of each group's first layer among the counts of its block.
PLACES = dict(zip(GROUPS, itertools.accumulate(map(len, GROUPS.values()), initial=0), strict=False))
COUNTS = sum(map(len, GROUPS.values()))


class BlockModules:
    """The modules of a block, looked up once: on small images a step is short."""

    def __init__(self, block: Block) -> None:
        self.groups = {
            group: [block.get_submodule(name) for name in names] for group, names in GROUPS.items()
        }
        self.norms = [block.get_submodule(name) for name in NORMS]
        self.linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        self.parameters = dict(block.named_parameters())

    def check(self) -> None:
        """Raise `NotFused`, with the reason, for what the fused block does not compute."""
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                raise NotFused(f"{name} is trained: full fine-tuning")
        for name, linear in self.linears.items():
            adapters = attached(linear)
            if len(adapters) > 1:
                raise NotFused(f"{name} has {len(adapters)} adapters")
            for adapter in adapters:
                if adapter.title != "LoRA":
                    raise NotFused(f"{name} has a {adapter.title} adapter")
            if "adaln" in name and any(adapter.drops for adapter in adapters):
                raise NotFused(f"{name}: an AdaLN adapter with dropout")
            if not adapters and "forward" in linear.__dict__:
                raise NotFused(f"{name} has a replaced forward")

    def packable(self) -> list[list[nn.Module]]:
        """Layers that read one input, and norms that one launch reads."""
        return [*self.groups.values(), self.norms]


def _layer(linear: nn.Linear, batch: int, length: int) -> FrozenLinear:
    weight = linear.weight
    for adapter in attached(linear):
        scale, factor = adapter.draw(batch, length, weight)
        if scale:
            flat = None if factor is None else factor.reshape(batch * length, -1)
            return FrozenLinear(weight, adapter.down, adapter.up, scale, flat)
    return FrozenLinear(weight, weight[:0], weight[:, :0], 0.0, None)


def fuse_blocks(
    dit: AnimaDiT, recompute: str | int | list[str] = "none", *, swapped: Collection[int] = ()
) -> None:
    """Let every block of a DiT run fused; call it where the weights are on their device.

    Weights of layers that read one input, and of all AdaLN, move into packed buffers; their names
    and values stay the same. Adapters may be attached before or later.

    Args:
        recompute: as `recompute.block_policies`, which raises `ValueError`.
        swapped: blocks whose weights are in host memory (memory/offload.py): they are not packed,
            and run with policy `none`, as their runner recomputes them.
    """
    for index, policy in enumerate(block_policies(recompute, len(dit.blocks))):
        policy = "none" if index in swapped else policy
        # Now, not on the first call: by then a swapped block holds its fetched weights.
        dit.blocks[index].fused = FusedBlock(index, policy, BlockModules(dit.blocks[index]))
    groups: list[Sequence[nn.Module]] = [*adaln_layers(dit.blocks)]
    for index, block in enumerate(dit.blocks):
        if index not in swapped:
            groups += block.fused.modules.packable()
    for layers in groups:
        if len(layers) > 1 and not any(layer.weight.requires_grad for layer in layers):
            pack(layers)
    dit.modulate = batched_modulation
    if dit.dtype == torch.float16:
        dit.stream = (with_powers, without_powers)
        names = [name for group in GROUPS.values() for name in group]
        names = [f"blocks.{index}.{name}" for index in range(len(dit.blocks)) for name in names]
        dit.saturation = Saturation(names, dit.x_embedder.proj[1].weight.device)
        for block in dit.blocks:
            block.fused.counts = dit.saturation.counts


@dataclass
class FusedBlock:
    """How one block runs fused.

    `pack` and `unpack` store x₀ with policy `block`; `counts` are those of `Saturation`.
    """

    index: int
    policy: str
    modules: BlockModules
    pack: Callable[[Tensor], Any] | None = None
    unpack: Callable[[Any], Tensor] | None = None
    counts: Tensor | None = None

    def __call__(self, block: Block, x: Tensor, shared: Shared) -> Tensor:
        """x₃ [B, L, D]; from the eager block where it must run, which is logged once."""
        try:
            self.modules.check()
        except NotFused as reason:
            say_once(f"fused kernels are off, the eager block runs: {reason}")
            return self.eager(block, x, shared)
        return self.fused(block, x, shared)

    def eager(self, block: Block, x: Tensor, shared: Shared) -> Tensor:
        """The eager block; it cannot leave out the MLP alone, so `mlp` becomes `block`."""
        packed = powers_of(x, shared.embedding.shape[-1])

        def run(x: Tensor, shared: Shared) -> Tensor:
            return with_powers(block.eager(without_powers(x), shared))

        run = run if packed else block.eager
        if self.policy == "none" or not torch.is_grad_enabled():
            return run(x, shared)
        return recomputed(run, x, shared, self.pack, self.unpack)

    def fused(self, block: Block, x: Tensor, shared: Shared) -> Tensor:
        """The fused Function on the weights and adapters of this moment."""
        modules = self.modules
        norms = stacked([norm.weight[None] for norm in modules.norms])
        modulations = shared.modulations
        assert modulations is not None
        # The second half of the angles repeats the first.
        half = shared.cos.shape[-1] // 2
        tensors: dict[str, Tensor | None] = {
            "x0": x,
            "context": shared.context,
            "modulation": modulations[self.index],
            "cos": shared.cos[:, :half],
            "sin": shared.sin[:, :half],
            "norm.self": norms[:2],
            "norm.cross": norms[2:],
        }
        linear: dict[str, dict[str, Any]] = {}
        # In this order the eager block draws dropout.
        for group, linears in modules.groups.items():
            read = shared.context if group == "cross_kv" else x
            layers = [_layer(linear, *read.shape[:2]) for linear in linears]
            linear[group] = {
                "scales": [layer.scale for layer in layers],
                # One for the group (models/dit.py).
                "weight_scale": linears[0].weight_scale,
            }
            if self.counts is not None:
                place = self.index * COUNTS + PLACES[group]
                linear[group]["counter"] = (self.counts, place)
            for kind in KINDS:
                values = (getattr(layer, kind) for layer in layers)
                tensors.update(zip(NAMES[group][kind], values, strict=True))
        settings = BlockSettings(
            policy=self.policy,
            attn_mode=shared.attn_mode,
            dtype=shared.dtype,
            head_dim=block.self_attn.head_dim,
            linear=linear,
            rows=shared.zero_rows,
            pack=self.pack,
            unpack=self.unpack,
        )
        return FusedBlockFunction.apply(settings, list(tensors), *tensors.values())


@functools.cache
def say_once(text: str) -> None:
    """Warn with this text, once."""
    log.warning(text)
