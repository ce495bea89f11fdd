"""CUDA graphs of the fused blocks: one launch forward and one backward instead of thousands.

On small images a fast card finishes a kernel before Python has launched the next. A graph is
recorded (`torch.cuda.make_graphed_callables`) for each shape of the inputs when the shape comes
again, and replayed from then on: always when asked for, else where that pays. All graphs share one
memory pool, as only one is between its forward and its backward.

A graph repeats launches with the pointers and host numbers of its recording. So whatever it
depends on is an input that is copied in (tokens, modulation, text, angles, counts of zero keys), or
part of its key (shapes, strengths, addresses of weights and adapters), or makes the step run
plainly (dropout, rank masks, swapped, offloaded or eager blocks). The rows of the text are rounded
up to `ROWS` by zero rows, which take the place of zero keys: the same result, and few shapes.
Before a graph is used it must agree with the plain launches on values other than those of its
recording.

Whether a graph pays is measured by one plain forward: the host's time for its launches against the
card's from the first to the last. Where the card waits for the host, both are the same, and the
host's time is worth saving; where the card is the limit, its time is the longer one. A graph also
keeps its memory, so there must be enough left.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anima_fast.device import NOT_WHILE_RECORDING
from anima_fast.models.attention import prepare_zero_rows
from anima_fast.models.dit import AnimaDiT
from anima_fast.models.dit_layers import Shared, attached
from anima_fast.models.fuse import NotFused, say_once

# Text rows are a multiple of this inside a graph.
ROWS = 64
# Graphs of one run: each holds its launches in memory, and the pool what the largest needs.
MOST = 24
# Attentions whose launches do not depend on values.
ATTN_MODES = ("torch", "sdpa", "triton")
# Relative, of outputs and gradients: above bfloat16's rounding and a library's order of summation,
# far below the error of a value frozen at its recording.
TOLERANCE = 0.02
# A gradient below this share of the largest may be noise.
SMALL = 1e-3
# The card's time over the host's below which the host is the limit: a card that waits for every
# launch ends a little after the last.
WAITING = 1.25
# Plain forwards of a shape that are timed; the first compiles kernels and is not among them.
TRIES = 3
# Free memory that a recording must find, of what a forward keeps for backward: the graph holds as
# much itself, and its backward more.
ROOM = 2.0


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


class TimedForward:
    """Times the launches in it on host and card; `pays` waits until the card has run them."""

    def __enter__(self) -> TimedForward:
        self._events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._events[0].record()
        self.kept, self._start = -torch.cuda.memory_allocated(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.host = time.perf_counter() - self._start
        self.kept += torch.cuda.memory_allocated()
        self._events[1].record()

    def pays(self) -> bool:
        """Whether the card waited for the host, and there is memory for a graph."""
        start, end = self._events
        end.synchronize()
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        fits = torch.cuda.mem_get_info()[0] + cached >= ROOM * self.kept
        return fits and start.elapsed_time(end) / 1e3 <= WAITING * self.host


@dataclass
class GraphChoice:
    """What is known of one size of the inputs."""

    seen: int = 0
    launches: TimedForward | None = None
    paid: bool = False

    def pays(self) -> bool:
        """Whether a graph of this size pays, by the last timed forward."""
        launches, self.launches = self.launches, None
        self.paid = self.paid or (launches is not None and launches.pays())
        return self.paid

    def timing(self, timed: Callable[[], TimedForward]) -> AbstractContextManager:
        """What a plain forward runs in: it is timed where that decides."""
        self.seen += 1
        if not 1 < self.seen <= 1 + TRIES:
            return nullcontext()
        self.launches = timed()
        return self.launches


def make_pool() -> Any:
    """A memory pool that graphs share; None without a card."""
    return torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None


@dataclass
class BlockGraphs:
    """Runs the blocks of a DiT, by a graph where there is one.

    Attributes:
        always: record any shape that comes again; else only where it pays.
        capture, timed: make a graphed callable, time a forward.
        replayed: how many steps a graph has run.
        off: why there will be no more graphs; "" while there may be.
    """

    always: bool = True
    capture: Callable[..., Callable[..., Tensor]] = torch.cuda.make_graphed_callables
    timed: Callable[[], TimedForward] = TimedForward
    replayed: int = 0
    off: str = ""
    _pool: Any = field(default_factory=make_pool)
    _sizes: dict[Hashable, GraphChoice] = field(default_factory=dict)
    _seen: Counter[Hashable] = field(default_factory=Counter)
    _graphs: dict[Hashable, Callable[..., Tensor]] = field(default_factory=dict)
    _waiting: weakref.ref | None = None

    def __bool__(self) -> bool:
        """Whether any graph holds memory."""
        return bool(self._graphs)

    def __call__(self, dit: AnimaDiT, x: Tensor, shared: Shared) -> Tensor:
        """As `dit.run_blocks`."""
        if self.off or not torch.is_grad_enabled():
            return dit.run_blocks(x, shared)
        if not self.always:
            size = (*x.shape, -(-shared.context.shape[1] // ROWS))
            choice = self._sizes.setdefault(size, GraphChoice())
            if not choice.pays():
                with choice.timing(self.timed):
                    return dit.run_blocks(x, shared)
        if reason := why_not(dit, shared):
            if self.always:
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
        # A graph has one set of buffers: it cannot run again before its backward has run.
        if self._waiting is not None and self._waiting() is not None:
            return dit.run_blocks(x, shared)
        if key not in self._graphs:
            self._seen[key] += 1
            if self._seen[key] < 2 or len(self._graphs) >= MOST:
                return dit.run_blocks(x, shared)
            self._record(key, dit, shared, inputs)
            if self.off:
                return dit.run_blocks(x, shared)
        out = self._graphs[key](*inputs)
        self.replayed += 1
        if out.requires_grad:
            # The node of a Python function keeps its attributes until its graph is freed.
            out.grad_fn.alive = token = _Token()
            self._waiting = weakref.ref(token)
        return out

    def stop(self, reason: str) -> None:
        """Free the graphs and run plainly from now on."""
        self.off = reason
        self._graphs.clear()
        self._pool = None

    def _record(
        self, key: Hashable, dit: AnimaDiT, shared: Shared, inputs: tuple[Tensor, ...]
    ) -> None:
        own = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in inputs)
        stack = BlockStack(dit, replace(shared, embedding=None, shared_modulation=None))
        # The recorder replaces this attribute.
        plain = stack.forward
        try:
            with NOT_WHILE_RECORDING:
                graph = self.capture(stack, own, allow_unused_input=True, pool=self._pool)
            error = disagreement(graph, plain, inputs, tuple(stack.parameters()))
        except RuntimeError as failure:
            # Out of memory too: without graphs the step needs less.
            self.stop(f"recording failed: {str(failure).strip().splitlines()[0]}")
        else:
            self._graphs[key] = graph
            # Also true when the error is NaN.
            if not error <= TOLERANCE:
                self.stop(f"a recorded step is {error:.1%} off the plain one")
        if self.off:
            say_once(f"CUDA graphs are off: {self.off}")


def disagreement(
    graph: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
) -> float:
    """The largest relative difference of result and gradients between a graph and plain launches.

    Both get the inputs reversed, which exposes a value that was recorded instead of its address.
    Gradients that are None count as zeros; errors of gradients far smaller than the largest are
    taken relative to the largest.
    """
    given = [t.detach().flip(-1) if t.is_floating_point() else t for t in inputs]
    given = [t.requires_grad_(of.requires_grad) for t, of in zip(given, inputs, strict=True)]
    wanted = [t for t in (*given, *parameters) if t.requires_grad]
    found = []
    for run in (plain, graph):
        out = run(*given)
        # Scaled to 1 to stay within float16 range.
        dout = out.detach() / out.detach().abs().amax()
        grads = torch.autograd.grad(out, wanted, dout, allow_unused=True)
        pairs = zip(grads, wanted, strict=True)
        grads = [torch.zeros_like(t) if g is None else g for g, t in pairs]
        found.append([t.detach().float().clone() for t in (out, *grads)])
    scales = torch.stack([a.norm() for a in found[0]])
    scales = scales.clamp(min=SMALL * float(scales[1:].max()))
    errors = torch.stack([(a - b).norm() for a, b in zip(*found, strict=True)])
    return float((errors / scales).nan_to_num(torch.inf).max())


class _Token:
    """Lives as long as an autograd graph; weak references need a class."""


def adapters_of(dit: AnimaDiT) -> Iterator[Any]:
    """The adapters on the layers that the fused blocks compute, in layer order."""
    for block in dit.blocks:
        for layers in block.fused.modules.groups.values():
            for linear in layers:
                yield from attached(linear)


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
            block.fused.modules.check()
    except NotFused as reason:
        return str(reason)
    adapters = list(adapters_of(dit))
    if not adapters:
        return "no adapter on the blocks' layers, whose gradients would be compared"
    if any(adapter.drops for adapter in adapters):
        return "dropout, or T-LoRA's rank masks"
    if shared.zero_rows is not None and shared.zero_rows.leaves_out:
        return "a batch mixes captions above 512 tokens with shorter ones"
    return ""


def rounded_up(shared: Shared) -> Shared:
    """The same with a multiple of `ROWS` text rows, if every sample has enough zero keys."""
    rows = shared.zero_rows
    more = -shared.context.shape[1] % ROWS
    if rows is None or not more or min(rows.counts) < more:
        return shared
    counts = [count - more for count in rows.counts]
    left = prepare_zero_rows(counts, len(counts), shared.dtype, rows.on_device.device)
    return replace(shared, context=F.pad(shared.context, (0, 0, 0, more)), zero_rows=left)


def pointers(dit: AnimaDiT) -> Iterator[Hashable]:
    """Addresses of the blocks' weights and adapters, and the adapters' strengths."""
    for block in dit.blocks:
        for layers in block.fused.modules.packable():
            yield from (layer.weight.data_ptr() for layer in layers)
    for adapter in adapters_of(dit):
        yield from (adapter.multiplier * adapter.scale, adapter.training)
        yield from (p.data_ptr() for p in adapter.parameters())
