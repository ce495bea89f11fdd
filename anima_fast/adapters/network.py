"""All adapters of a run: one flat buffer, groups of learning rates, saving and loading.

T-LoRA, fewer ranks at higher noise, is set on the network (`tlora`):

    r(σ) = ⌊(1 − σ)^α · (R − r_min)⌋ + r_min,    rank components r(σ) … R − 1 are masked

High noise decides layout, and with few ranks a LoRA trained on few pictures cannot memorise theirs.
The mask acts in training only, and the file is an ordinary one. Source: Soboleva et al., "T-LoRA:
Single Image Diffusion Model Customization Without Overfitting", arXiv 2507.05964, with σ for t / T.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from anima_fast.adapters import names
from anima_fast.adapters.deltas import Delta
from anima_fast.adapters.flat import FlatBuffer, ParamGroup
from anima_fast.adapters.formats import named_tensors, read_lora, unfold, write_lora
from anima_fast.adapters.layers import AdaptedLinear, LoRALinear
from anima_fast.errors import UserError
from anima_fast.models.adapter_kinds import LORA


class LoRANetwork(nn.Module):
    """All adapters of a run, `modules_by_name`; made by `add_lora`.

    `flat` [P]: all parameters; `flat_grad`: the gradients of the trained ones.
    """

    def __init__(
        self, adapters: Mapping[str, AdaptedLinear], groups: list[ParamGroup], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.modules_by_name = dict(adapters)
        self.adapters = nn.ModuleList(adapters.values())
        self._groups = groups
        self._dtype = dtype
        self._multiplier = 1.0
        self.tlora: tuple[int, float] | None = None
        self._build(next(self.parameters()).device)

    def _build(self, device: torch.device | str) -> None:
        trained = {id(p) for group in self._groups for p in group.params}
        frozen = [p for p in self.parameters() if id(p) not in trained]
        self.buffer = FlatBuffer(self._groups, frozen, device=device, dtype=self._dtype)
        self.flat, self.flat_grad = self.buffer.flat, self.buffer.flat_grad

    def to(self, device: torch.device | str) -> LoRANetwork:
        """Move buffers and parameters to a device; only before an optimizer is built."""
        self._build(device)
        return self

    @property
    def multiplier(self) -> float:
        """Strength of every adapter; settable."""
        return self._multiplier

    @multiplier.setter
    def multiplier(self, value: float) -> None:
        if value != self._multiplier:
            self._multiplier = value
            for adapter in self.adapters:
                adapter.multiplier = value

    def at_noise(self, sigma: Tensor) -> None:
        """Called before each forward with the batch's noise levels [B].

        Only T-LoRA uses them, in the adapters of the DiT: `tlora` is (smallest rank, power).
        """
        if self.tlora is None:
            return
        masks: dict[int, Tensor] = {}
        for name, adapter in self.modules_by_name.items():
            in_dit = not name.startswith((names.TEXT_ENCODER, names.ADAPTER))
            if in_dit and isinstance(adapter, LoRALinear):
                if adapter.rank not in masks:
                    masks[adapter.rank] = rank_mask(sigma, adapter.rank, *self.tlora)
                adapter.rank_mask = masks[adapter.rank]

    def param_groups(self, flat: bool = True) -> list[dict]:
        """Groups for an optimizer: {"params", "lr", "name"}.

        With `flat` a group is one slice of the buffer; without, it is the matrices, whose shapes
        some optimizers look at.
        """
        return [
            {"params": [one] if flat else list(group.params), "lr": group.lr, "name": group.name}
            for group, one in zip(self._groups, self.buffer.slices, strict=True)
        ]

    def zero_grad_flat(self) -> None:
        """Set all gradients to zero in place, so that they stay views of the buffer."""
        self.flat_grad.zero_()

    def deltas(self, dtype: torch.dtype | None = None) -> dict[str, Delta]:
        """The network as a file holds it: Δ by dotted name, on the CPU."""
        return {
            name: adapter.as_delta(lambda x: x.to("cpu", dtype or x.dtype, copy=True))
            for name, adapter in self.modules_by_name.items()
        }

    def state_tensors(
        self, dialect: str = "kohya", dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """The tensors of a LoRA file in a dialect."""
        return named_tensors(self.deltas(dtype), dialect)[0]

    def save(
        self,
        path: str | os.PathLike,
        dialect: str = "kohya",
        dtype: torch.dtype | None = None,
        metadata: Mapping[str, str] | None = None,
        fold_alpha: bool = False,
    ) -> None:
        """Write a .safetensors file atomically.

        Args:
            dialect: kohya, comfyui or diffusers.
            dtype: of the saved matrices; None keeps the training dtype.
            metadata: strings for the header.
            fold_alpha: multiply alpha / rank into the weights and leave `.alpha` out.

        Raises `UserError` for numbers that are not finite, or a disk that refuses.
        """
        # Programs disagree on what alpha means in a LoHa or LoKr, so it is the rank there.
        deltas = {n: d if d.kind is LORA else d.settled() for n, d in self.deltas(dtype).items()}
        write_lora(path, deltas, dialect, metadata=metadata, fold_alpha=fold_alpha)

    @torch.no_grad()
    def load(self, path: str | os.PathLike) -> list[str]:
        """Take the matrices of a LoRA file of any dialect, in place; the others keep their values.

        Returns the names in the file that this network does not have. Raises `UserError` when the
        file is not a LoRA, none of its modules fits, or a rank differs.
        """
        ignored: list[str] = []
        deltas, _, metadata = read_lora(path, ignored)
        deltas = unfold(deltas, metadata)
        known = deltas.keys() & self.modules_by_name.keys()
        if not known:
            raise UserError(f"{path} has none of the {len(self.modules_by_name)} trained modules")
        for name in known:
            own, given = self.modules_by_name[name].as_delta(), deltas[name]
            if _shapes(own) != _shapes(given):
                raise UserError(
                    f"{path}: {name} is a {_sizes(given)}, this network has a {_sizes(own)} there: "
                    "use --dim_from_weights, or the settings of that file"
                )
        for name in known:
            adapter, given = self.modules_by_name[name], deltas[name]
            # The file's scale may differ from this network's: the product stays that of the file.
            adapter.load(given.times(given.scale / adapter.scale))
        return sorted({*ignored, *(deltas.keys() - known)})

    @torch.no_grad()
    def scale_weight_norms(self, max_norm: float) -> tuple[int, float, float]:
        """Shrink each pair whose product (with alpha / rank) has a larger Frobenius norm.

        Returns how many, and the mean and the largest norm after that. Raises `ValueError` for an
        adapter that is not a LoRA.
        """
        adapters = [a for a in self.modules_by_name.values() if isinstance(a, LoRALinear)]
        if len(adapters) < len(self.modules_by_name):
            raise ValueError("only the product of a LoRA can be scaled by its two matrices")
        norms = torch.stack([_product_norm(adapter) for adapter in adapters])
        ratios = (max_norm / norms.clamp_min(1e-12)).clamp(max=1.0)
        for adapter, ratio in zip(adapters, ratios.sqrt(), strict=True):
            adapter.down.mul_(ratio)
            adapter.up.mul_(ratio)
        norms = norms * ratios
        return int((ratios < 1).sum()), norms.mean().item(), norms.max().item()

    def remove(self) -> None:
        """Detach every adapter from its layer."""
        for adapter in self.adapters:
            adapter.remove()


def _shapes(delta: Delta) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in delta.fields().items()}


def _sizes(delta: Delta) -> str:
    """Kind and sizes, for a message."""
    rank = f" of rank {delta.rank}" if delta.rank else ""
    outputs, inputs = delta.shape
    return f"{delta.title}{rank} for a layer of {inputs} inputs and {outputs} outputs"


def _product_norm(adapter: LoRALinear) -> Tensor:
    """‖up·down‖ · alpha / rank without building the product: ‖UD‖² = Σ (UᵀU) ∘ (DDᵀ)."""
    up, down = adapter.up.float(), adapter.down.float()
    square = ((up.T @ up) * (down @ down.T)).sum()
    return square.clamp_min(0).sqrt() * adapter.scale


def rank_mask(sigma: Tensor, rank: int, min_rank: int, alpha: float = 1.0) -> Tensor:
    """Rank components that samples of noise σ [B] may use: [B, R] of 0 and 1; alpha is α."""
    least = min(min_rank, rank)
    share = (1 - sigma.double()).clamp(0, 1) ** alpha
    ranks = (share * (rank - least)).floor() + least  # [B]
    index = torch.arange(rank, device=sigma.device)
    return (index < ranks[:, None]).float()
