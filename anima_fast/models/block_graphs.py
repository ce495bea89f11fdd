"""CUDA graphs of the fused blocks: one launch forward and one backward instead of thousands.

On small images a fast card is done with a kernel before Python has launched the next. A graph is
recorded for each shape of the inputs when the shape comes for the second time, and replayed from
then on. All graphs share one memory pool, as only one is between its forward and its backward.

A graph repeats launches with the pointers and host numbers of its recording. So whatever it
depends on is an input that is copied in (tokens, modulation, text, angles, counts of zero keys), or
part of its key (shapes, strengths, where weights and adapters lie), or sends the step the plain way
(dropout, rank masks, swapped, offloaded or eager blocks). The rows of the text are rounded up to
`ROWS` by zero rows, which take the place of zero keys: the same result, and few shapes.

Recording and replaying are PyTorch's (`torch.cuda.make_graphed_callables`).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anima_fast.models.attention import prepare_zero_rows
from anima_fast.models.dit_layers import Shared
from anima_fast.models.fuse import NotFused, say_once
from anima_fast.models.recording import NOT_WHILE_RECORDING

if TYPE_CHECKING:
    from anima_fast.models.dit import AnimaDiT

# Text rows are a multiple of this inside a graph.
ROWS = 64
# Graphs of one run: each holds its launches in memory, and the pool what the largest needs.
MOST = 24
# Attentions whose launches are known not to depend on values.
ATTN_MODES = ("torch", "sdpa", "triton")


class BlockStack(nn.Module):
    """All blocks as a function of tensors; its parameters are the adapters'."""

    def __init__(self, dit: AnimaDiT, shared: Shared) -> None:
        super().__init__()
        # In a list, so that the frozen weights are not among the parameters.
        self._dit, self._shared = [dit], shared
        adapters = (p for adapter in adapters_of(dit) for p in adapter.parameters())
        self.adapters = nn.ParameterList(p for p in adapters if p.requires_grad)

    def forward(
        self,
        x: Tensor,
        modulations: Tensor,
        context: Tensor,
        cos: Tensor,
        sin: Tensor,
        counts: Tensor | None = None,
    ) -> Tensor:
        """[B, L, D] → [B, L, D]; the others as in `Shared`, counts [B] of its zero rows."""
        rows = self._shared.zero_rows
        shared = replace(
            self._shared,
            modulations=modulations,
            context=context,
            cos=cos,
            sin=sin,
            zero_rows=None if rows is None else replace(rows, on_device=counts),
        )
        return self._dit[0].run_blocks(x, shared)


def make_pool() -> Any:
    """A memory pool that graphs share; None without a card."""
    return torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None


@dataclass
class BlockGraphs:
    """Runs the blocks of a DiT, by a graph where there is one.

    Attributes:
        capture: makes a graphed callable, as `torch.cuda.make_graphed_callables`.
        replayed: steps that a graph has run.
        off: why a recording failed; "" while none has.
    """

    capture: Callable[..., Callable[..., Tensor]] = torch.cuda.make_graphed_callables
    replayed: int = 0
    off: str = ""
    _pool: Any = field(default_factory=make_pool)
    _seen: Counter[Hashable] = field(default_factory=Counter)
    _graphs: dict[Hashable, Callable[..., Tensor]] = field(default_factory=dict)
    _waiting: weakref.ref | None = None

    def __call__(self, dit: AnimaDiT, x: Tensor, shared: Shared) -> Tensor:
        """As `dit.run_blocks`."""
        if not torch.is_grad_enabled():
            return dit.run_blocks(x, shared)
        if reason := self.off or why_not(dit, shared):
            say_once(f"CUDA graphs are off: {reason}")
            return dit.run_blocks(x, shared)
        shared = rounded_up(shared)
        counts = () if shared.zero_rows is None else (shared.zero_rows.on_device,)
        inputs = (x, shared.modulations, shared.context, shared.cos, shared.sin, *counts)
        key = (
            tuple((*t.shape, t.dtype, t.requires_grad) for t in inputs),
            shared.attn_mode,
            tuple(pointers(dit)),
        )
        # A graph has one set of buffers: it cannot run again before its backward has.
        if self._waiting is not None and self._waiting() is not None:
            return dit.run_blocks(x, shared)
        if key not in self._graphs:
            self._seen[key] += 1
            if self._seen[key] < 2 or len(self._graphs) >= MOST:
                return dit.run_blocks(x, shared)
            self._record(key, dit, shared, inputs)
            if self.off:
                return self(dit, x, shared)
        out = self._graphs[key](*inputs)
        self.replayed += 1
        if out.requires_grad:
            # The node of a Python function holds what is put on it until its graph is freed.
            out.grad_fn.alive = token = _Token()
            self._waiting = weakref.ref(token)
        return out

    def _record(
        self, key: Hashable, dit: AnimaDiT, shared: Shared, inputs: tuple[Tensor, ...]
    ) -> None:
        own = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in inputs)
        stack = BlockStack(dit, replace(shared, embedding=None, shared_modulation=None))
        try:
            with NOT_WHILE_RECORDING:
                self._graphs[key] = self.capture(
                    stack, own, allow_unused_input=True, pool=self._pool
                )
        except RuntimeError as error:
            # Out of memory too: without graphs the step needs less.
            self.off = f"recording failed: {str(error).strip().splitlines()[0]}"
            self._graphs.clear()
            self._pool = None


class _Token:
    """Lives as long as an autograd graph; weak references need a class."""


def adapters_of(dit: AnimaDiT) -> Iterator[Any]:
    """The adapters on the layers that the fused blocks compute, in the order of the layers."""
    for block in dit.blocks:
        for layers in block.fused.parts.groups.values():
            for linear in layers:
                yield from getattr(linear, "adapters", ())


def why_not(dit: AnimaDiT, shared: Shared) -> str:
    """Why the blocks cannot run as a graph, "" when they can."""
    if dit.block_runner is not None:
        return "blocks are swapped or offloaded"
    if any(block.fused is None or block.fused.pack is not None for block in dit.blocks):
        return "not all blocks run through the fused kernels on the card alone"
    if shared.attn_mode not in ATTN_MODES:
        return f"--attn_mode {shared.attn_mode}"
    try:
        for block in dit.blocks:
            block.fused.parts.check()
    except NotFused as reason:
        return str(reason)
    if any(adapter.drops for adapter in adapters_of(dit)):
        return "dropout, or T-LoRA's rank masks"
    if shared.zero_rows is not None and shared.zero_rows.leaves_out:
        return "a batch mixes captions above 512 tokens with shorter ones"
    return ""


def rounded_up(shared: Shared) -> Shared:
    """The same with a multiple of `ROWS` text rows, where every sample has zero keys to give."""
    rows = shared.zero_rows
    more = -shared.context.shape[1] % ROWS
    if rows is None or not more or min(rows.counts) < more:
        return shared
    counts = [count - more for count in rows.counts]
    left = prepare_zero_rows(counts, len(counts), shared.dtype, rows.on_device.device)
    return replace(shared, context=F.pad(shared.context, (0, 0, 0, more)), zero_rows=left)


def pointers(dit: AnimaDiT) -> Iterator[Hashable]:
    """Where the blocks' weights and adapters lie, and the adapters' strengths."""
    for block in dit.blocks:
        for layers in block.fused.parts.packable():
            yield from (layer.weight.data_ptr() for layer in layers)
    for adapter in adapters_of(dit):
        yield from (adapter.multiplier * adapter.scale, adapter.training)
        yield from (p.data_ptr() for p in adapter.parameters())
