"""What an arithmetic does to training: LoRA gradients and velocity of a DiT against float32.

The blocks come from the file one after the other, in float32; each computes in every arithmetic
before the next is read, and once more in backward. So memory holds one block, and for each
arithmetic the inputs of all. The network is a LoRA on the default layers with fixed random factors
of which the second is not zero; the loss is that of training, at a fixed noise level each sample.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anima_fast.adapters.layers import initial_lora
from anima_fast.adapters.targets import find_targets
from anima_fast.bench.emulated import BF16, FLOAT32, FP16_FULL, FP16_SHORT, Arithmetic, Count
from anima_fast.bench.emulated_block import Adapter, EmulatedBlock, enter, leave
from anima_fast.models.checkpoint import Checkpoint, check_shapes, load_into
from anima_fast.models.dit import AnimaDiT, Block, dit_tensors
from anima_fast.models.dit_config import TEXT_ROWS, DitConfig
from anima_fast.models.dit_layers import PATCH
from anima_fast.models.flow import noisy_latents, velocity_target

WAYS = (BF16, FP16_FULL, FP16_SHORT)
SIGMAS = (0.25, 0.75)
RANK = 16
# Of the second factor: Δ(x) is then some 5 % of a published layer's output.
UP = 0.02
# Of random text: the rows of the published adapter's output have about this deviation.
TEXT_DEVIATION, TEXT_LENGTH = 0.043, 77
# A loss scale brings float32's largest gradient behind the last block here.
LARGEST_GRADIENT = 16.0

Show = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Sample:
    """What the DiT sees and should say.

    Attributes:
        latents: noisy, [B, 16, h, w].
        sigma: [B].
        target: the velocity, as `latents`.
        context: text rows [B, S, C].
        zero_rows: for each sample the zero rows after them (data/batches.py).
        about: where they come from, for the table.
    """

    latents: Tensor
    sigma: Tensor
    target: Tensor
    context: Tensor
    zero_rows: tuple[int, ...]
    about: str

    @property
    def tokens(self) -> int:
        """Image tokens of all samples."""
        return self.latents[:, 0].numel() // PATCH**2

    def to(self, device: torch.device) -> Sample:
        """The same on a device."""
        names = ("latents", "sigma", "target", "context")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    @classmethod
    def of(cls, latents: Tensor, context: Tensor, zero_rows: Sequence[int], about: str) -> Sample:
        """Clean latents [B, 16, h, w] with fixed noise at the fixed noise levels, in turn."""
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
        sigma = torch.tensor([SIGMAS[i % len(SIGMAS)] for i in range(len(latents))])
        noisy, target = noisy_latents(latents, noise, sigma), velocity_target(latents, noise)
        return cls(noisy, sigma, target, context.float(), tuple(zero_rows), about)


def random_sample(config: DitConfig, tokens: int) -> Sample:
    """Random latents of at most `tokens` image tokens a sample, and random text."""
    side = max(1, math.isqrt(tokens))
    generator = torch.Generator().manual_seed(2)
    shape = (len(SIGMAS), config.in_channels, PATCH * side, PATCH * side)
    latents = torch.randn(shape, generator=generator)
    text = torch.randn(len(SIGMAS), TEXT_LENGTH, config.context_dim, generator=generator)
    about = "random latents and text"
    rows = [TEXT_ROWS - TEXT_LENGTH] * len(SIGMAS)
    return Sample.of(latents, text * TEXT_DEVIATION, rows, about)


class DitFile:
    """A DiT on disk, read part by part into float32.

    Raises `UserError`, here or when a part is read, for what `load_dit` refuses.
    """

    def __init__(self, source: str | Path | Mapping[str, Tensor]) -> None:
        self.tensors = dit_tensors(Checkpoint.open(source))
        self.config = DitConfig.from_shapes(self.tensors.shapes)
        with torch.device("meta"):
            self._whole = AnimaDiT(self.config)
        expected = {name: tuple(p.shape) for name, p in self._whole.state_dict().items()}
        check_shapes(expected, self.tensors, "the Anima DiT")
        self._adapters: dict[int, dict[str, Adapter]] = {}
        for target in find_targets(self._whole, None, None):
            _, index, name = target.name.split(".", 2)
            shape = (target.linear.out_features, target.linear.in_features)
            # Values by name: a block's adapters do not depend on the others.
            generator = torch.Generator().manual_seed(int(index))
            down = initial_lora(shape, RANK, generator).down
            up = torch.randn(shape[0], RANK, generator=generator) * UP
            self._adapters.setdefault(int(index), {})[name] = Adapter(down, up, 1.0)

    def head(self) -> AnimaDiT:
        """The DiT without its blocks."""
        with torch.device("meta"):
            dit = AnimaDiT(replace(self.config, num_blocks=0))
        names = {name: name for name in self.tensors.shapes if not name.startswith("blocks.")}
        return self._filled(dit, names)

    def block(self, index: int) -> Block:
        """One block."""
        with torch.device("meta"):
            block = Block(self.config)
        return self._filled(block, {name: f"blocks.{index}.{name}" for name in block.state_dict()})

    def adapters(self, index: int) -> dict[str, Adapter]:
        """The adapters of a block by layer."""
        return self._adapters[index]

    def _filled(self, module: Any, names: Mapping[str, str]) -> Any:
        tensors = self.tensors.renamed(names)
        load_into(module, tensors, what="the Anima DiT", dtype_of=lambda _: torch.float32)
        return module


@dataclass
class Agreement:
    """Of gradients that come layer by layer: their cosine with float32's, of all and the worst."""

    dot: float = 0.0
    own: float = 0.0
    exact: float = 0.0
    worst_layer: str = ""
    worst: float = math.inf

    def add(self, layer: str, own: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
        """Take in the gradients of one layer's factors."""
        a, b = (torch.cat([g.double().flatten() for g in some]) for some in (own, exact))
        dot, own_square, exact_square = ((x @ y).item() for x, y in ((a, b), (a, a), (b, b)))
        self.dot, self.own, self.exact = (
            self.dot + dot, self.own + own_square, self.exact + exact_square,
        )  # fmt: skip
        cosine = _cosine(dot, own_square, exact_square)
        # No number is worse than any.
        if not cosine >= self.worst:
            self.worst, self.worst_layer = cosine, layer

    @property
    def cosine(self) -> float:
        """Of all gradients."""
        return _cosine(self.dot, self.own, self.exact)


def _cosine(dot: float, a: float, b: float) -> float:
    return dot / math.sqrt(a * b) if a * b > 0 else math.nan


@dataclass(frozen=True)
class Row:
    """How one arithmetic agrees with float32; no number where something was not finite.

    Attributes:
        precision: its name.
        cosine, one_minus_cosine: of all LoRA gradients.
        worst_layer, worst_cosine: the layer whose gradients agree least.
        velocity: the relative error of the velocity.
        saturated: values beyond float16's largest; None where nobody counts them.
    """

    precision: str
    cosine: float
    one_minus_cosine: float
    worst_layer: str
    worst_cosine: float
    velocity: float
    saturated: int | None = None


class Pass(ABC):
    """One arithmetic on its way through the blocks, forward and back.

    Attributes:
        way: the arithmetic.
        states: the input of each block, and the output of the last; backward takes them away.
        velocity: as patches [B, L, 4 C], after `finish`.
        gradient: with respect to the output of the block that is next in backward, times the loss
            scale, which a cosine does not see.
        agreement: of what is behind.
    """

    def __init__(self, way: Arithmetic) -> None:
        self.way = way
        self.states: list[Tensor] = []
        self.velocity = self.gradient = torch.empty(0)
        self.agreement = Agreement()

    @abstractmethod
    def forward(self, index: int, block: Block) -> None:
        """Take one block, which is in float32, forward."""

    @abstractmethod
    def finish(self, scale: float) -> None:
        """Velocity and loss; the gradient of `scale` times the loss."""

    @abstractmethod
    def backward(self, index: int, block: Block) -> dict[str, tuple[Tensor, ...]]:
        """The gradients of a block's adapters by layer; moves the pass below the block."""

    @property
    @abstractmethod
    def saturated(self) -> int | None:
        """`Row.saturated` so far."""


class EmulatedPass(Pass):
    """A pass whose products are emulated."""

    def __init__(self, model: DitFile, head: AnimaDiT, sample: Sample, way: Arithmetic) -> None:
        # A count of its own.
        super().__init__(replace(way, beyond=Count()))
        self.model, self.head, self.sample = model, head, sample
        given = (sample.latents, sample.sigma, sample.context, sample.zero_rows)
        with torch.no_grad():
            x, self.conditions = enter(head, *given, self.way)
        self.states.append(x)

    @torch.no_grad()
    def forward(self, index: int, block: Block) -> None:
        run = EmulatedBlock(block, self.model.adapters(index), self.way)
        self.states.append(run(self.states[-1], self.conditions))

    def finish(self, scale: float) -> None:
        x = self.states.pop().requires_grad_()
        with torch.enable_grad():
            velocity = leave(self.head.final_layer, x, self.conditions, self.way)
            loss = scale * (velocity - as_patches(self.sample.target)).square().mean()
            (self.gradient,) = torch.autograd.grad(loss, x)
        self.velocity = velocity.detach()

    def backward(self, index: int, block: Block) -> dict[str, tuple[Tensor, ...]]:
        leaves = {
            name: replace(a, down=a.down.clone().requires_grad_(), up=a.up.clone().requires_grad_())
            for name, a in self.model.adapters(index).items()
        }
        factors = [factor for a in leaves.values() for factor in (a.down, a.up)]
        # Nothing is trained below the first block.
        x = self.states.pop().requires_grad_(index > 0)
        with torch.enable_grad():
            y = EmulatedBlock(block, leaves, self.way)(x, self.conditions)
            found = torch.autograd.grad(y, factors + [x] * (index > 0), self.gradient)
        if index:
            self.gradient = found[-1]
        return {name: found[2 * i : 2 * i + 2] for i, name in enumerate(leaves)}

    @property
    def saturated(self) -> int | None:
        return self.way.beyond.value


Make = Callable[[DitFile, AnimaDiT, Sample, Arithmetic], Pass]


def compare(
    model: DitFile,
    sample: Sample,
    ways: Iterable[Arithmetic] = WAYS,
    show: Show = lambda title, done, total: None,
    make: Make = EmulatedPass,
) -> list[Row]:
    """A row for each arithmetic, on the same model, adapters and sample; `make`: their passes.

    Raises `UserError` for tensors that cannot be read.
    """
    head, blocks = model.head(), model.config.num_blocks
    passes = [make(model, head, sample, way) for way in (FLOAT32, *ways)]
    for index in range(blocks):
        block = model.block(index)
        for one in passes:
            one.forward(index, block)
        # Before the next one is read.
        del block
        show("forward", index + 1, blocks)
    exact, *others = passes
    exact.finish(1.0)
    scale = loss_scale(exact.gradient)
    for one in others:
        one.finish(scale if one.way.dtype == torch.float16 else 1.0)
    for index in reversed(range(blocks)):
        block = model.block(index)
        gradients = exact.backward(index, block)
        for one in others:
            for name, found in one.backward(index, block).items():
                one.agreement.add(f"blocks.{index}.{name}", found, gradients[name])
        del block
        show("backward", blocks - index, blocks)
    return [_row(one, exact.velocity) for one in others]


def loss_scale(gradient: Tensor) -> float:
    """The power of two that brings the largest of float32's gradients to `LARGEST_GRADIENT`."""
    largest = gradient.abs().max().item()
    return 2.0 ** round(math.log2(LARGEST_GRADIENT / largest)) if 0 < largest < math.inf else 1.0


def as_patches(velocity: Tensor) -> Tensor:
    """[B, C, h, w] → [B, L, 4 C], in the order of the final layer."""
    batch, channels, height, width = velocity.shape
    patches = velocity.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, channels * PATCH**2)


def _row(one: Pass, exact: Tensor) -> Row:
    a, error = one.agreement, (one.velocity - exact).norm() / exact.norm()
    return Row(
        one.way.name, a.cosine, 1 - a.cosine, a.worst_layer, a.worst, error.item(), one.saturated
    )  # fmt: skip
