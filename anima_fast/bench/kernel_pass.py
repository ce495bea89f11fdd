"""One arithmetic of `parity precision` by what a training run computes with: a card's own kernels.

Each block is loaded into a DiT of one block, in the dtype of the arithmetic and with its adapters,
and runs fused, under short sums where the arithmetic has them; float32 runs the eager block on the
references. What passes from block to block is whatever the DiT itself hands on, residual stream and
gradient alike, so that one block at a time gives what the whole DiT does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from anima_fast.adapters.lora import add_lora
from anima_fast.bench.emulated import Arithmetic
from anima_fast.bench.parity import full_precision
from anima_fast.bench.precision import RANK, DitFile, Pass, Sample, as_patches
from anima_fast.kernels import dispatch
from anima_fast.kernels.gemm import gemm
from anima_fast.kernels.sums import use_sums
from anima_fast.models.dit import AnimaDiT, Block, load_dit
from anima_fast.models.dit_layers import Shared
from anima_fast.models.fuse import fuse_blocks

# What a block makes of its input
Run = Callable[[Block, Tensor, Shared], Tensor]


class KernelPass(Pass):
    """A pass on `device`, whose states stay there."""

    def __init__(
        self, model: DitFile, head: AnimaDiT, sample: Sample, way: Arithmetic, device: torch.device
    ) -> None:
        super().__init__(way)
        self.model, self.head, self.device = model, head.state_dict(), device
        self.sample = sample.to(device)
        # Of the last block; `finish` needs its final layer.
        self.dit: AnimaDiT | None = None
        self._beyond = 0

    @property
    def exact(self) -> bool:
        """Whether it is what the others are compared with."""
        return self.way.dtype == torch.float32

    @torch.no_grad()
    def forward(self, index: int, block: Block) -> None:
        self.dit, _ = self._loaded(index, block)

        def run(block: Block, x: Tensor, shared: Shared) -> Tensor:
            # The DiT embeds the latents each time; behind the first block they have become more.
            x = self.states[-1] if index else x
            self.states += [block(x, shared)] if index else [x, block(x, shared)]
            return self.states[-1]

        self._velocity(self.dit, run)
        if self.dit.saturation is not None:
            self._beyond += sum(self.dit.saturation.take().values())

    def finish(self, scale: float) -> None:
        dit, self.dit = self.dit, None
        assert dit is not None
        x = self.states.pop().requires_grad_()
        with torch.enable_grad():
            velocity = as_patches(self._velocity(dit, lambda *_: x).float())
            loss = scale * (velocity - as_patches(self.sample.target)).square().mean()
            (self.gradient,) = torch.autograd.grad(loss, x)
        self.velocity = velocity.detach()

    def backward(self, index: int, block: Block) -> dict[str, tuple[Tensor, ...]]:
        dit, factors = self._loaded(index, block)
        # Nothing is trained below the first block.
        x = self.states.pop().requires_grad_(index > 0)
        seen = []

        def run(block: Block, _: Tensor, shared: Shared) -> Tensor:
            seen.append(block(x, shared))
            return seen[0]

        leaves = [factor for pair in factors.values() for factor in pair]
        with torch.enable_grad(), self._arithmetic():
            self._velocity(dit, run)
            found = torch.autograd.grad(seen[0], leaves + [x] * (index > 0), self.gradient)
        if index:
            self.gradient = found[-1]
        return {name: found[2 * i : 2 * i + 2] for i, name in enumerate(factors)}

    @property
    def saturated(self) -> int | None:
        return self._beyond if self.way.dtype == torch.float16 else None

    def _loaded(
        self, index: int, block: Block
    ) -> tuple[AnimaDiT, dict[str, tuple[Tensor, Tensor]]]:
        """A DiT of this block, and the factors of its adapters by layer."""
        tensors = self.head | {f"blocks.0.{name}": x for name, x in block.state_dict().items()}
        mode = "torch" if self.exact else "triton"
        dit = load_dit(tensors, device=self.device, dtype=self.way.dtype, attn_mode=mode)
        network = add_lora(dit, rank=RANK, alpha=RANK, seed=0).to(self.device)
        factors = {}
        for name, given in self.model.adapters(index).items():
            adapter = network.modules_by_name[f"blocks.0.{name}"]
            adapter.down.data.copy_(given.down)
            adapter.up.data.copy_(given.up)
            factors[name] = (adapter.down, adapter.up)
        if not self.exact:
            fuse_blocks(dit)
        return dit, factors

    def _velocity(self, dit: AnimaDiT, run: Run) -> Tensor:
        s = self.sample
        dit.block_runner = lambda _, block, x, shared: run(block, x, shared)
        with self._arithmetic():
            return dit(s.latents, s.sigma, s.context, zero_keys=list(s.zero_rows))

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        mode = "reference" if self.exact else kernel_mode(self.device)
        with dispatch.use(mode), use_sums(self.way.sums.chain), full_precision():
            yield


def kernel_mode(device: torch.device) -> str:
    """How `dispatch.use` runs kernels there: off a card they are interpreted."""
    return "auto" if device.type == "cuda" else "triton"


def kernel_product(a: Tensor, b: Tensor, chain: int) -> Tensor:
    """a [M, K] @ b [K, N] of float16 by the product kernel, in float32."""
    with dispatch.use(kernel_mode(a.device)):
        return gemm(a, b.T, dtype=torch.float32, chain=chain)
