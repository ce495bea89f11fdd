"""Every launch of one DiT block, forward and backward, as a card would get it, without a card.

The block stands in a one-block DiT with a LoRA on its ten default layers and runs as in training,
through the runner that `install_block_runner` installs, on tensors without memory that pretend to
be on a card (pretend.py). What is counted is what one block adds to a step:

    launches   by name; the accumulation of the adapters' gradients is among them
    units      bytes read and written, in tensors [B, L, D] of the activations' dtype
    kept       bytes between forward and backward, without weights and the block's result; what all
               blocks read (text rows, angles, modulation) is in it
    peak       the largest sum of bytes during a block: of fwd and both above what was there when it
               started, of bwd above what is kept

The gradient of the result arrives in bwd; workspace inside of libraries is not seen. The fused
blocks' modulation is made for all blocks at once, before the first, so it is not in these rows; the
eager block makes its own. A product counts as one launch, though cuBLAS may split a long sum.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from anima_fast.adapters.lora import add_lora
from anima_fast.bench.choice import Choice, name_of
from anima_fast.bench.dry import WithoutMemory, intercepted
from anima_fast.bench.pretend import Card, pretended
from anima_fast.bench.recorder import Launched, Recorder
from anima_fast.bench.run_file import Measurement
from anima_fast.bench.tables import table
from anima_fast.errors import UserError
from anima_fast.kernels.dispatch import SHARED_KIB
from anima_fast.memory.offload import SaverSettings, install_block_runner
from anima_fast.models.dit import AnimaDiT, load_dit
from anima_fast.models.dit_config import PUBLISHED, TEXT_ROWS, DitConfig
from anima_fast.models.dit_layers import Shared
from anima_fast.models.recompute import POLICIES

PLAIN = ("eager", *(f"own {policy}" for policy in POLICIES))
TRITON = " triton-attention"
PROVIDERS = (*PLAIN, f"own none{TRITON}")
LEGEND = {"B": "batch", "L": "tokens", "S": "text", "R": "rank"}
MODES = {"fwd": ("fwd",), "bwd": ("bwd",), "both": ("fwd", "bwd")}


@dataclass(frozen=True)
class BlockSizes:
    """B, L, S and R of a run, the dtype of its activations and the model."""

    batch: int = 1
    tokens: int = 4096
    text: int = 96
    rank: int = 32
    dtype: torch.dtype = torch.bfloat16
    model: DitConfig = PUBLISHED

    @property
    def shape(self) -> tuple[int, int, int]:
        """[B, L, D]."""
        return self.batch, self.tokens, self.model.model_channels

    @property
    def unit(self) -> int:
        """Bytes of one [B, L, D] tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        width = self.model.model_channels
        return f"B={self.batch} L={self.tokens} S={self.text} D={width} R={self.rank}"


@dataclass(frozen=True)
class BlockLaunches:
    """What one block does under one provider; see the module docstring.

    Attributes:
        launches: in order.
        kept: bytes.
        peaks: bytes by mode.
    """

    provider: str
    card: Card
    sizes: BlockSizes
    launches: tuple[Launched, ...]
    kept: int
    peaks: dict[str, int]

    def measurements(self) -> Iterator[Measurement]:
        """Rows of a run file."""
        dtype = name_of(self.sizes.dtype)
        row = Measurement(
            "block", "launches", None, "launches", str(self.sizes), dtype, self.provider,
            source="compiler", note=f"sm_{self.card.arch}",
        )  # fmt: skip
        unit = self.sizes.unit
        for mode, phases in MODES.items():
            found = [one for one in self.launches if one.phase in phases]
            counts = Counter(one.name for one in found)
            parts = dict(sorted(counts.items(), key=lambda part: (-part[1], part[0])))
            yield replace(row, mode=mode, value=len(found), parts=parts)
            moved: Counter[str] = Counter()
            for one in found:
                moved[one.name] += one.read + one.written
            units = {name: round(size / unit, 4) for name, size in moved.most_common()}
            total = round(moved.total() / unit, 4)
            yield replace(row, metric="units", unit="[L, D]", mode=mode, value=total, parts=units)
        memory = {("kept", ""): self.kept, **{("peak", m): p for m, p in self.peaks.items()}}
        for (metric, mode), size in memory.items():
            note = f"{row.note}: {size / unit:.2f} tensors [B, L, D]"
            yield replace(row, metric=metric, unit="bytes", mode=mode, value=size, note=note)


def rows(choice: Choice) -> Iterator[list[Measurement]]:
    """Rows of `bench run`, provider by provider; of the first architecture that is asked for."""
    for found in _chosen(choice, PROVIDERS):
        yield [
            row
            for row in found.measurements()
            if choice.wants(row.metric)
            and (not choice.modes or not row.mode or row.mode in choice.modes)
        ]


def timeline(choice: Choice) -> Iterator[str]:
    """Launch by launch, as text: what `bench profile block` prints; of `own none` by itself."""
    for found in _chosen(choice, PROVIDERS if choice.providers else PROVIDERS[1:2]):
        unit = found.sizes.unit
        lines = [
            (one.phase, one.name, f"{one.read / unit:.2f}", f"{one.written / unit:.2f}",
             f"{one.operations / 1e9:.1f}")
            for one in found.launches
        ]  # fmt: skip
        count = f"{found.provider}, {found.sizes}, sm_{found.card.arch}: {len(lines)} launches"
        yield f"{count}; read and written in tensors [B, L, D]"
        yield table(("", "launch", "read", "written", "GFLOP"), lines, left=2)


def _chosen(choice: Choice, providers: Sequence[str]) -> Iterator[BlockLaunches]:
    card = Card(choice.archs[0]) if choice.archs else Card()
    sizes: dict[str, Any] = {
        LEGEND[letter]: n for letter, n in choice.sizes.items() if letter in LEGEND
    }
    for dtype in choice.dtypes or ("bfloat16",):
        for provider in providers:
            if not choice.providers or provider.split()[0] in choice.providers:
                each = BlockSizes(**sizes, dtype=getattr(torch, dtype))
                yield block_launches(provider, each, card)


def block_launches(
    provider: str, sizes: BlockSizes | None = None, card: Card | None = None
) -> BlockLaunches:
    """Run one block on tensors without memory and record it.

    Args:
        provider: eager, or own and a policy; triton-attention may follow.
        sizes: 1024x1024, batch 1, rank 32, bfloat16 when None.
        card: whose path is taken; one of compute capability 8.9 under Linux when None.

    Raises:
        UserError: an unknown provider or architecture, or kernels are interpreted.
    """
    sizes, card = sizes or BlockSizes(), card or Card()
    if card.arch not in SHARED_KIB:
        known = ", ".join(map(str, SHARED_KIB))
        raise UserError(f"--arch {card.arch} is unknown: use one of {known}")
    recorder = Recorder()
    dit = _model(provider, sizes)
    with pretended(card), intercepted(card.arch, recorder.launched, intermediate=True):
        with WithoutMemory():
            x, shared = _inputs(dit, sizes)
        with recorder:
            kept, peaks = _step(recorder, dit, x, shared)
    return BlockLaunches(provider, card, sizes, tuple(recorder.launches), kept, peaks)


def _model(provider: str, sizes: BlockSizes) -> AnimaDiT:
    """One block with its adapters and its runner."""
    who = provider.removesuffix(TRITON)
    if who not in PLAIN:
        raise UserError(f"provider {provider!r} is unknown: use one of {', '.join(PROVIDERS)}")
    policy = "none" if who == "eager" else who.removeprefix("own ")
    with torch.device("meta"):
        weights = AnimaDiT(replace(sizes.model, num_blocks=1)).state_dict()
    mode = "torch" if who == provider else "triton"
    dit = load_dit(weights, device="meta", dtype=sizes.dtype, attn_mode=mode)
    add_lora(dit, rank=sizes.rank, alpha=float(sizes.rank), device="meta")
    install_block_runner(dit, SaverSettings(policy), fused=who != "eager")
    return dit


def _inputs(dit: AnimaDiT, sizes: BlockSizes) -> tuple[Tensor, Shared]:
    """x₀ with a gradient, and what the block reads besides."""
    height = next(n for n in range(int(sizes.tokens**0.5), 0, -1) if sizes.tokens % n == 0)
    context = torch.empty(sizes.batch, sizes.text, sizes.model.context_dim, dtype=sizes.dtype)
    sigma = torch.empty(sizes.batch)
    padding = max(0, TEXT_ROWS - sizes.text)
    shared = dit._shared(sigma, context, height, sizes.tokens // height, padding)
    # float16 cannot hold the residual stream.
    stream = torch.float32 if sizes.dtype == torch.float16 else sizes.dtype
    leaf = torch.empty((), dtype=stream).requires_grad_()
    return _Before.apply(leaf, sizes.shape), shared


class _Before(torch.autograd.Function):
    """The block before: makes x₀ and lets its gradient go."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, shape: tuple[int, ...]) -> Tensor:
        return leaf.new_empty(shape)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[None, None]:
        return None, None


class _After(torch.autograd.Function):
    """The block after: lets the result go and makes its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.new_empty(ctx.shape)


def _step(
    recorder: Recorder, dit: AnimaDiT, x: Tensor, shared: Shared
) -> tuple[int, dict[str, int]]:
    """Kept bytes, and peaks by mode, of a forward and a backward."""
    rows = shared.zero_rows
    read = [x, *vars(shared).values(), *(vars(rows).values() if rows else ())]
    given = {t.untyped_storage()._cdata for t in read if isinstance(t, Tensor)}
    saved: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata in given:
            saved[storage._cdata] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = dit.run_blocks(x, shared)
    forward = recorder.peak
    loss = _After.apply(out)
    # From here on the graph alone holds what backward reads, as in training.
    del out, x
    recorder.phase = "bwd"
    kept = recorder.watch()
    loss.backward(torch.empty_like(loss))
    peaks = {"fwd": forward, "bwd": recorder.peak, "both": max(forward, kept + recorder.peak)}
    return kept + sum(saved.values()), peaks
