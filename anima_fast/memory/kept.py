"""What autograd keeps of a call between forward and backward, counted without computing anything.

The code that trains runs on tensors of the meta device, which have shapes and no values, and every
tensor that it saves for backward is added up. So the count follows the model, the adapters and
their options by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from anima_fast.models.dit import AnimaDiT, Block
from anima_fast.models.dit_layers import Shared, attached

Storages = dict[int, torch.UntypedStorage]


def storages(tensors: Iterable[Tensor]) -> Storages:
    """The storages of tensors by their id, which no other storage gets while they are held."""
    return {id(storage): storage for storage in (t.untyped_storage() for t in tensors)}


def kept(run: Callable[[], Tensor], there: Storages) -> tuple[Tensor, Storages]:
    """The result of a call on meta tensors and what it keeps for backward, the result left out.

    `there`: what is in memory anyway, such as weights.
    """
    saved: Storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in there:
            saved[id(storage)] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    # Dropout draws random numbers, and a run's own must not depend on this.
    with torch.random.fork_rng(devices=[]), FusedAttention(), hooks:
        out = run()
    saved.pop(id(out.untyped_storage()), None)
    return out, saved


def size(found: Storages) -> int:
    """Bytes of storages."""
    return sum(storage.nbytes() for storage in found.values())


class _Attention(torch.autograd.Function):
    """What PyTorch's fused attention keeps: its inputs, its result and the log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, mask, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


class FusedAttention(TorchFunctionMode):
    """On the meta device PyTorch would take the plain attention, which keeps L·L numbers a head."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3], kwargs.get("attn_mask"))
        return func(*args, **kwargs)


class BlockCount:
    """Counts what the eager blocks of a DiT on the meta device keep, with adapters attached.

    Attributes:
        blocks: bytes of each block.
        around: bytes of everything else, with what several blocks read.
    """

    def __init__(self, dit: AnimaDiT, adapters: Iterable[Tensor]) -> None:
        self.blocks: list[int] = []
        self.around = 0
        self._dit = dit
        self._weights = storages([*dit.parameters(), *adapters])
        self._shared: Storages = {}
        # Blocks with the same adapters keep the same.
        self._known: dict[tuple, int] = {}

    def count(self, latents: Tensor, context: Tensor, *, zero_keys: int) -> BlockCount:
        """Run a forward of latents [B, C, h, w] and context [B, S, C]; returns itself."""
        sigma = torch.empty(len(latents), device="meta")
        dit, before = self._dit, self._dit.block_runner
        dit.block_runner = self._run
        try:
            _, found = kept(
                lambda: dit(latents, sigma, context, zero_keys=zero_keys), self._weights
            )
        finally:
            dit.block_runner = before
        # The loss keeps the float32 difference of velocity and target.
        self.around = size(found | self._shared) + 4 * latents.numel()
        return self

    def _run(self, index: int, block: Block, x: Tensor, shared: Shared) -> Tensor:
        read = storages(value for value in vars(shared).values() if isinstance(value, Tensor))
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        adapters = tuple(_adapter_shapes(linear) for linear in linears)
        key = (x.requires_grad, adapters)
        if key not in self._known:
            _, found = kept(lambda: block(x, shared), self._weights)
            self._shared |= {one: found.pop(one) for one in read.keys() & found.keys()}
            self._known[key] = size(found)
        self.blocks.append(self._known[key])
        trained = x.requires_grad or shared.context.requires_grad or any(adapters)
        # Says only whether gradients go on: what the block kept is counted.
        return torch.empty_like(x).requires_grad_(trained)


def _adapter_shapes(linear: nn.Linear) -> tuple:
    """Kind and shapes of the adapters on a layer."""
    return tuple((a.title, *(tuple(p.shape) for p in a.parameters())) for a in attached(linear))
