"""AdamW over the network's flat buffer in one launch (kernels/adamw.py), clipping included.

Everything but the step is that of `torch.optim.AdamW`: the same groups, state and state dict, so a
run can resume with either. The moments of all groups are in two buffers like the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anima_fast.kernels.adamw import adamw
from anima_fast.training.optimizers.build import optimizer_arguments
from anima_fast.training.optimizers.recipes import find_optimizer

if TYPE_CHECKING:
    from anima_fast.adapters.network import LoRANetwork
    from anima_fast.options.training import OptimizerOptions


class FlatAdamW(torch.optim.AdamW):
    """AdamW whose groups are adjacent slices of one float32 buffer.

    Args:
        groups: as for `torch.optim.AdamW`; each has one parameter, a slice of `flat`, in order.
        flat: all trained parameters [P], float32, contiguous.
        flat_grad: their gradients [P].
        arguments: lr, betas, eps, weight_decay.
    """

    # The class that resume states name, so that they fit either (training/state_checks.py).
    stands_for = torch.optim.AdamW

    def __init__(
        self, groups: list[dict], flat: Tensor, flat_grad: Tensor, **arguments: Any
    ) -> None:
        super().__init__(groups, **arguments)
        self._flat, self._flat_grad = flat.detach(), flat_grad
        self._moments = (torch.zeros_like(self._flat), torch.zeros_like(self._flat))
        sizes = torch.tensor([len(p) for p in self._parameters()])
        self._ends = sizes.cumsum(0).to(flat.device)
        self._clip: tuple[Tensor | None, float] = (None, 0.0)
        for p in self._parameters():
            self.state[p] = {"step": torch.zeros(())}
        self._adopt()

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _adopt(self) -> None:
        """Move the moments of every group into the buffers, of which its state becomes views."""
        first = 0
        for p in self._parameters():
            state, place = self.state[p], slice(first, first + len(p))
            for name, buffer in zip(("exp_avg", "exp_avg_sq"), self._moments, strict=True):
                if name in state:
                    buffer[place].copy_(state[name])
                state[name] = buffer[place]
            first += len(p)

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale the gradients down to `max_norm` (0 = off) in the next step.

        Returns their norm before, a float32 scalar on the device, without waiting for it.
        """
        norm = torch.linalg.vector_norm(self._flat_grad, dtype=torch.float32)
        self._clip = (norm, max_norm) if max_norm else (None, 0.0)
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update of every group; rates are read from the groups now."""
        assert closure is None
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        step = 0.0
        for p in self._parameters():
            self.state[p]["step"] += 1
            step = self.state[p]["step"].item()
        norm, max_norm = self._clip
        self._clip = (None, 0.0)
        rates = torch.tensor([float(group["lr"]) for group in self.param_groups])
        adamw(
            self._flat,
            self._flat_grad,
            *self._moments,
            range_ends=self._ends,
            lrs=rates.to(self._flat.device, non_blocking=True),
            step=step,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            norm=norm,
            max_norm=max_norm,
        )

    def load_state_dict(self, state_dict: dict) -> None:
        """Like `torch.optim.AdamW`; the moments go into the buffers."""
        super().load_state_dict(state_dict)
        self._adopt()


def build_flat_adamw(options: OptimizerOptions, network: LoRANetwork) -> FlatAdamW | None:
    """The optimizer of a run where it is plain AdamW over a float32 network, else None."""
    recipe, cls = find_optimizer(options.optimizer_type or "AdamW")
    arguments, groups = optimizer_arguments(options, recipe), network.param_groups()
    flat = network.flat[: network.buffer.trained]
    is_plain = set(arguments) <= {"lr", "betas", "eps", "weight_decay"}
    if cls is not torch.optim.AdamW or not is_plain or flat.dtype != torch.float32:
        return None
    # The parameters must be adjacent slices of `flat`, without settings of their own.
    params = [p for group in groups for p in group["params"]]
    ends = [p.storage_offset() + p.numel() for p in params]
    if [p.storage_offset() for p in params] != [0, *ends[:-1]]:
        return None
    if not all(set(group) <= {"params", "lr", "name"} for group in groups):
        return None
    return FlatAdamW(groups, flat, network.flat_grad, **arguments)
