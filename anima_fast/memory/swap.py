"""Block swap: the weights of some blocks are kept in host memory and fetched when they are used.

They are copied from pinned memory one swapped block ahead, on a stream of their own, used through
`functional_call`, and dropped. Backward fetches them again, so a swapped block is always
recomputed (memory/offload.py).

Frozen weights are only read. Trained ones (full fine-tuning) are swapped when there is a `sink`:
their gradients stay out of autograd's own accumulation, which would keep the device copies alive
from forward to backward, and are handed to the sink as soon as the block's backward is done. The
next fetch reads host memory again, so it sees every update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from anima_fast.errors import UserError
from anima_fast.models.dit_layers import Shared

BlockForward = Callable[[Tensor, Shared], Tensor]
# Gets the index of a block and the gradients of its trained weights by name, on the device.
Sink = Callable[[int, Mapping[str, Tensor]], None]


def swapped_indices(blocks: int, count: int) -> list[int]:
    """Which blocks are swapped: the middles of `count` equal parts, from 0 to blocks − 2."""
    most = max(blocks - 2, 0)
    if not 0 <= count <= most:
        raise UserError(
            f"--blocks_to_swap {count} does not fit a DiT of {blocks} blocks: give 0 to {most}"
        )
    return [(2 * i + 1) * blocks // (2 * count) for i in range(count)]


class BlockSwap:
    """Weights of some blocks in host memory, fetched one swapped block ahead.

    At most two blocks' weights are on the device at a time: the one in use and the next one.

    Args:
        blocks, count: all blocks of the DiT, and how many are swapped.
        device: where they are computed.
        fused: the fused blocks compute the modulation of all blocks at once, so its weights stay.
        sink: gets the gradients of trained weights; without one, trained weights stay there too.

    Raises `UserError` for too many blocks, or one without anything to swap.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        count: int,
        device: torch.device,
        *,
        fused: bool = False,
        sink: Sink | None = None,
    ) -> None:
        self.order = swapped_indices(len(blocks), count)
        self.device, self.sink = device, sink
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.parameters = {
            i: swapped_parameters(blocks[i], fused=fused, trained=sink is not None)
            for i in self.order
        }
        if not all(self.parameters.values()):
            raise UserError("--blocks_to_swap needs frozen DiT weights: it works for LoRA training")
        self.fetched: dict[int, tuple[dict[str, Tensor], torch.cuda.Event | None]] = {}
        for parameter in self.weights:
            parameter.data = in_host(parameter.data, pinned=self.device.type == "cuda")

    @property
    def weights(self) -> list[nn.Parameter]:
        """All weights that are swapped."""
        return [p for parameters in self.parameters.values() for p in parameters.values()]

    def __contains__(self, index: int) -> bool:
        return index in self.parameters

    def runner(self, index: int, block: nn.Module) -> BlockForward:
        """A function that runs the block on fetched weights; its second call is the recompute."""
        forward = True
        trained = {n: p for n, p in self.parameters[index].items() if p.requires_grad}

        def run(x: Tensor, shared: Shared) -> Tensor:
            nonlocal forward
            weights = self.fetch(index, forward=forward)
            forward = False
            if trained and torch.is_grad_enabled():
                fetched = [weights[name] for name in trained]
                take = self._taker(index, list(trained))
                attached = _Attach.apply(take, *trained.values(), *fetched)
                weights |= zip(trained, attached, strict=True)
            return functional_call(block, weights, (x, shared))

        return run

    def _taker(self, index: int, names: list[str]) -> Callable[[Sequence[Tensor | None]], None]:
        def take(grads: Sequence[Tensor | None]) -> None:
            found = zip(names, grads, strict=True)
            if self.sink is not None:
                self.sink(index, {name: grad for name, grad in found if grad is not None})

        return take

    def fetch(self, index: int, *, forward: bool) -> dict[str, Tensor]:
        """Weights of a block on the device; the next ones in that direction are started."""
        place = self.order.index(index)
        ahead = self.order[place + 1 :][:1] if forward else self.order[:place][-1:]
        self._start(index)
        weights, ready = self.fetched.pop(index)
        for stale in self.fetched.keys() - set(ahead):
            self._drop(stale)
        for nearby in ahead:
            self._start(nearby)
        if ready is not None:
            torch.cuda.current_stream(self.device).wait_event(ready)
        return weights

    def _start(self, index: int) -> None:
        """Begin to copy a block's weights unless that has begun."""
        if index in self.fetched:
            return
        # Allocated in the order of the computing stream, which the copying stream waits for: the
        # memory may have been in use until now.
        weights = {
            name: torch.empty_like(host, device=self.device)
            for name, host in self.parameters[index].items()
        }
        if self.stream is None:
            self._copy(index, weights)
            self.fetched[index] = weights, None
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self._copy(index, weights)
            self.fetched[index] = weights, self.stream.record_event()

    def _copy(self, index: int, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, host in self.parameters[index].items():
                weights[name].copy_(host, non_blocking=True)

    def _drop(self, index: int) -> None:
        """Drop weights that were fetched but not used, once their copy is done."""
        _, ready = self.fetched.pop(index)
        if ready is not None:
            torch.cuda.current_stream(self.device).wait_event(ready)


class _Attach(torch.autograd.Function):
    """Device copies of trained weights as part of the graph; their gradients go to `take`."""

    @staticmethod
    def forward(ctx, take, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.take, ctx.count = take, len(tensors) // 2
        ctx.set_materialize_grads(False)
        return tensors[ctx.count :]

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None) -> tuple[None, ...]:
        ctx.take(grads)
        return (None,) * (1 + 2 * ctx.count)


def swapped_parameters(
    block: nn.Module, *, fused: bool, trained: bool = False
) -> dict[str, nn.Parameter]:
    """Name → parameter of those that are swapped: not the trained ones unless `trained`."""
    return {
        name: parameter
        for name, parameter in block.named_parameters()
        if (trained or not parameter.requires_grad) and not (fused and "adaln_modulation" in name)
    }


def in_host(tensor: Tensor, *, pinned: bool) -> Tensor:
    """The tensor in host memory; a copy only where it is not there already."""
    there = tensor.device.type == "cpu" and (tensor.is_pinned() or not pinned)
    return tensor if there else host_copy(tensor, pinned=pinned)


def host_copy(tensor: Tensor, *, pinned: bool) -> Tensor:
    """A copy in host memory, complete when the call returns."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
    return host.copy_(tensor)
