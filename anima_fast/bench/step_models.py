"""The 2B DiT with random weights, its step, and everyone who can run it.

`Bench` is one DiT with one LoRA of rank 32; eager, compiled and fused blocks are switched on it, so
that they share weights, inputs and optimizer. `Diffusers` is the same step through diffusers'
transformer and peft, where they are installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from anima_fast.adapters.lora import LoRANetwork, add_lora
from anima_fast.kernels.sums import CHAINS, set_sums
from anima_fast.measure.timer import on_card
from anima_fast.memory.offload import SaverSettings, compile_blocks, install_block_runner
from anima_fast.models.block_graphs import BlockGraphs
from anima_fast.models.dit import FP32_PARTS, PLAIN_STREAM, AnimaDiT, DitConfig
from anima_fast.models.dit_config import PUBLISHED
from anima_fast.models.flow import (
    FlowSettings,
    flow_loss,
    fused_flow_loss,
    noisy_latents,
    velocity_target,
)
from anima_fast.models.modulation import batched_modulation
from anima_fast.training.optimizers.build import clip_flat_grad
from anima_fast.training.optimizers.flat_adamw import FlatAdamW
from anima_fast.training.run import LossScaler

DEVICE = "cuda" if on_card() else "cpu"
TINY = DitConfig(
    model_channels=64, num_blocks=3, num_heads=2, head_dim=32, context_dim=24,
    adaln_rank=8, mlp_hidden=256,
)  # fmt: skip
CONFIG = PUBLISHED if on_card() else TINY
DTYPE = torch.bfloat16 if on_card() else torch.float32
RANK = 32 if on_card() else 4
# Rows of a middling caption, padded to 512 as in training.
TEXT_ROWS, PADDED_ROWS = (96, 512) if on_card() else (5, 20)
POLICIES = ("none", "mlp", "block")
# So small that hundreds of steps leave the loss where it was: providers can be compared by it.
RATE = 1e-8


def random_dit(config: DitConfig, dtype: torch.dtype = DTYPE) -> AnimaDiT:
    """A frozen DiT whose weights are drawn on the device, scaled by 1/√fan_in."""
    with torch.device("meta"):
        dit = AnimaDiT(config)
    # Cast before memory is taken: the card never holds a float32 copy.
    dit = dit.to(dtype).to_empty(device=DEVICE).requires_grad_(False)
    fill(dit)
    return dit.eval()


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random matrices scaled by 1/√fan_in, vectors of ones."""
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)


@dataclass
class Inputs:
    """One batch: latents and noise [B, 16, h, w] float32, σ [B], text rows [B, S, C]."""

    latents: Tensor
    noise: Tensor
    sigma: Tensor
    context: Tensor
    zero_keys: int
    settings: FlowSettings = field(default_factory=FlowSettings)

    @classmethod
    def random(cls, config: DitConfig, tokens: int, batch: int) -> Inputs:
        """Drawn on the device, for square images of `tokens` patches of 2x2 latents."""
        side = 2 * round(tokens**0.5)
        shape = (batch, config.in_channels, side, side)
        latents, noise = (torch.randn(shape, device=DEVICE) for _ in range(2))
        context = torch.randn(batch, TEXT_ROWS, config.context_dim, device=DEVICE, dtype=DTYPE)
        sigma = torch.rand(batch, device=DEVICE)
        return cls(latents, noise, sigma, context, PADDED_ROWS - TEXT_ROWS)

    def loss(self, velocity: Callable[[Tensor], Tensor], *, fused: bool = False) -> Tensor:
        """The mean flow loss of a model's velocity, as in training."""
        x = noisy_latents(self.latents, self.noise, self.sigma, self.settings).to(DTYPE)
        if fused:
            latents, noise = self.latents, self.noise
            return fused_flow_loss(velocity(x), latents, noise, self.sigma, self.settings).mean()
        target = velocity_target(self.latents, self.noise)
        return flow_loss(velocity(x), target, self.sigma, self.settings).mean()


class Phases:
    """A training step in three calls, which share the loss."""

    loss: Tensor
    inputs: Inputs

    def forward(self) -> None:
        """Loss of the batch."""
        raise NotImplementedError

    def backward(self) -> None:
        """Gradients."""
        self.loss.backward()
        del self.loss

    def forget(self) -> None:
        """Free what is kept of the size before, which is no memory of the next one."""

    def gradient(self) -> Tensor:
        """All gradients, as one vector."""
        raise NotImplementedError

    def optimize(self) -> None:
        """Clip, step, zero."""
        raise NotImplementedError

    def __call__(self) -> None:
        """The whole step."""
        self.forward()
        self.backward()
        self.optimize()


class Bench(Phases):
    """Our DiT; `switch` chooses who runs its blocks."""

    def __init__(self, config: DitConfig, rank: int = RANK, dtype: torch.dtype = DTYPE) -> None:
        torch.manual_seed(0)
        self.dit = random_dit(config, dtype)
        self.network: LoRANetwork = add_lora(
            self.dit, rank=rank, alpha=float(rank), unet_lr=RATE, seed=1
        )
        self.network.to(DEVICE)
        # `up` starts at zero in training; any other value makes every gradient count.
        fill(self.network)
        groups = self.network.param_groups()
        eager = torch.optim.AdamW(groups, fused=True if on_card() else None)
        flat = self.network.flat[: self.network.buffer.trained]
        own = FlatAdamW(self.network.param_groups(), flat, self.network.flat_grad)
        for p, state in own.state.items():
            # The same moments for both, so that none pays for the other's in its peak.
            eager.state[p] = {**state, "step": torch.zeros((), device=DEVICE)}
        # Loss and optimizer are the project's kernels where the blocks are, as in the trainer.
        self.optimizers: dict[bool, torch.optim.AdamW] = {False: eager, True: own}
        self.own = False
        self.half: HalfDit | None = None
        self.scaler = LossScaler(DEVICE, enabled=False)
        self.graphs = BlockGraphs()
        # What stands in each block, and around all, for a provider, kept for its next turn.
        self._compiled: list[Any] = []
        self._fused: dict[tuple[str, bool], tuple[list[Any], Any, Any]] = {}

    def switch(self, provider: str) -> None:
        """To eager, compile, or own and a policy, by our attention, as graphs or in fp16.

        The last four as in "own mlp", "own none triton-attention", "own none graphs" and
        "own none fp16-short".
        """
        words, blocks = provider.split(), list(self.dit.blocks)
        if words[0] not in ("eager", "compile", "own"):
            raise ValueError(f"the step has no provider {provider}")
        self.own = words[0] == "own"
        self.dit.attn_mode = "triton" if "triton-attention" in words else "torch"
        self._compute_in("fp16-short" in words)
        way = (words[-1], False) if not self.own else (words[1], "fp16-short" in words)
        if self.own and way not in self._fused:
            install_block_runner(self.dit, SaverSettings(words[1]), fused=True)
            fused_blocks = [block.fused for block in blocks]
            self._fused[way] = fused_blocks, self.dit.stream, self.dit.saturation
        if provider == "compile" and not self._compiled:
            install_block_runner(self.dit)
            # Room for a graph per block and size: beyond the limit blocks would silently run
            # eagerly. A second size would else be compiled for unknown shapes, which are slower.
            compile_blocks(self.dit, dynamic=False, cache_size_limit=8 * len(blocks))
            self._compiled = [block._compiled_call_impl for block in blocks]
        nothing = [None] * len(blocks)
        around = nothing, PLAIN_STREAM, None
        fused, self.dit.stream, self.dit.saturation = self._fused[way] if self.own else around
        compiled = self._compiled if provider == "compile" else nothing
        for block, runner, graph in zip(blocks, fused, compiled, strict=True):
            block.fused, block._compiled_call_impl = runner, graph
        self.dit.modulate = batched_modulation if words[0] == "own" else None
        self.dit.graphs = self.graphs if "graphs" in words else None

    def _compute_in(self, half: bool) -> None:
        """Weights and sums as the trainer has them in fp16 with short sums, or as before."""
        if half and self.half is None:
            self.half = HalfDit(self.dit)
        if self.half is not None:
            self.half.switch(half)
        set_sums(max(CHAINS) if half else 0)
        self.scaler = self.half.scaler if half and self.half else LossScaler(DEVICE, enabled=False)

    def forward(self) -> None:
        i = self.inputs

        def velocity(x: Tensor) -> Tensor:
            return self.dit(x, i.sigma, i.context, zero_keys=i.zero_keys)

        self.loss = i.loss(velocity, fused=self.own)

    def backward(self) -> None:
        self.scaler.scale(self.loss).backward()
        del self.loss

    def forget(self) -> None:
        self.dit.graphs, self.graphs = None, BlockGraphs()

    def gradient(self) -> Tensor:
        scaled = self.scaler.is_enabled()
        return (
            self.network.flat_grad / self.scaler.get_scale() if scaled else self.network.flat_grad
        )

    def optimize(self) -> None:
        optimizer = self.optimizers[self.own]
        self.scaler.unscale_(optimizer)
        if self.own:
            optimizer.clip_gradients(1.0)
        else:
            clip_flat_grad(self.network.flat_grad, 1.0)
        self.scaler.step(optimizer)
        self.scaler.update()
        self.network.zero_grad_flat()


class HalfDit:
    """The weights of a DiT in bfloat16, and as `load_dit` has them for float16, by turns.

    A 16-bit weight changes where it is: a card has no room for two models. Both types hold the
    numbers that are drawn, but for the smallest. What stays in float32 beside float16 is kept
    twice.
    """

    def __init__(self, dit: AnimaDiT) -> None:
        if dit.dtype != torch.bfloat16:
            raise ValueError(f"fp16 takes turns with bf16 alone, not with {dit.dtype}")
        self.dit, self.half = dit, False
        self.scaler = LossScaler(DEVICE, enabled=True)
        self._wide = [p for n, p in dit.named_parameters() if FP32_PARTS.fullmatch(n)]
        self._others = [p.data.float() for p in self._wide]

    def switch(self, half: bool) -> None:
        """To float16, or back."""
        if half == self.half:
            return
        self.half = half
        here = [p.data for p in self._wide]
        for parameter, other in zip(self._wide, self._others, strict=True):
            parameter.data = other
        self._others = here
        wide = set(map(id, self._wide))
        dtype = torch.float16 if half else torch.bfloat16
        for parameter in self.dit.parameters():
            if id(parameter) not in wide:
                moved = parameter.data.to(dtype)
                parameter.data = parameter.data.view(dtype).copy_(moved)


class Diffusers(Phases):
    """diffusers' transformer with peft's LoRA on the same ten layers of each block."""

    LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def __init__(self, config: DitConfig, rank: int = RANK) -> None:
        from diffusers import CosmosTransformer3DModel
        from peft import LoraConfig

        torch.manual_seed(0)
        with torch.device(DEVICE):
            self.model = CosmosTransformer3DModel(
                # The padding mask goes in as the 17th channel: its own way needs torchvision.
                in_channels=config.in_channels + 1,
                out_channels=config.out_channels,
                num_attention_heads=config.num_heads,
                attention_head_dim=config.head_dim,
                num_layers=config.num_blocks,
                mlp_ratio=config.mlp_hidden / config.model_channels,
                text_embed_dim=config.context_dim,
                adaln_lora_dim=config.adaln_rank,
                rope_scale=(1.0, 4.0, 4.0),
                concat_padding_mask=False,
                extra_pos_embed_type=None,
            )
        self.model.to(DTYPE).requires_grad_(False)
        fill(self.model)
        self.model.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, target_modules=list(self.LAYERS))
        )
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in self.trained:
            parameter.data = parameter.data.float()
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, fused=True if on_card() else None)

    def forward(self) -> None:
        i = self.inputs
        padded = nn.functional.pad(i.context, (0, 0, 0, i.zero_keys))

        def velocity(x: Tensor) -> Tensor:
            image = torch.cat([x, torch.zeros_like(x[:, :1])], 1)[:, :, None]
            with torch.autocast(DEVICE, DTYPE, enabled=DTYPE.itemsize == 2):
                return self.model(image, i.sigma.to(DTYPE), padded).sample[:, :, 0]

        self.loss = i.loss(velocity)

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.trained])

    def optimize(self) -> None:
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
