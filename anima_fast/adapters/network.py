"""All adapters of a run: one flat buffer, groups of learning rates, saving and loading."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from anima_fast.adapters import names
from anima_fast.adapters.flat import FlatBuffer, Group
from anima_fast.adapters.formats import named_tensors, read_lora, unfold, write_lora
from anima_fast.adapters.layers import AdaptedLinear, LoRALinear
from anima_fast.adapters.parts import Part
from anima_fast.adapters.rank_masks import rank_mask
from anima_fast.errors import UserError


class LoRANetwork(nn.Module):
    """All adapters of a run; made by `add_lora`.

    Attributes:
        modules_by_name: `AdaptedLinear` by dotted name.
        flat: all parameters [P], `flat_grad`: the gradients of the trained ones.
    """

    def __init__(
        self, adapters: Mapping[str, AdaptedLinear], groups: list[Group], dtype: torch.dtype
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

    @property
    def flat(self) -> Tensor:
        """All parameters, one buffer."""
        return self.buffer.flat

    @property
    def flat_grad(self) -> Tensor:
        """The gradients of all trained parameters, one buffer."""
        return self.buffer.flat_grad

    def to(self, device: torch.device | str) -> LoRANetwork:
        """Move buffers and parameters to a device; only before an optimizer is made."""
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
        """Tell the adapters of the DiT the noise levels [B] of the batch to come.

        Only T-LoRA looks at them (rank_masks.py): `tlora` is (smallest rank, power).
        """
        if self.tlora is None:
            return
        masks: dict[int, Tensor] = {}
        for name, adapter in self.modules_by_name.items():
            if not name.startswith((names.TEXT_ENCODER, names.ADAPTER)):
                if adapter.rank not in masks:
                    masks[adapter.rank] = rank_mask(sigma, adapter.rank, *self.tlora)
                adapter.rank_mask = masks[adapter.rank]

    def param_groups(self, flat: bool = True) -> list[dict]:
        """Groups for an optimizer: {"params", "lr", "name"}.

        With `flat` a group is one parameter, its slice of the buffer (for elementwise optimizers);
        without, it is the matrices (for optimizers that look at their shapes).
        """
        slices = self.buffer.group_slices()
        return [
            {"params": [one] if flat else list(group.params), "lr": group.lr, "name": group.name}
            for group, one in zip(self._groups, slices, strict=True)
        ]

    def zero_grad_flat(self) -> None:
        """Set all gradients to zero, in place: they stay views of the buffer."""
        self.flat_grad.zero_()

    def is_finite(self) -> bool:
        """Whether every parameter is finite (waits for the device)."""
        return bool(torch.isfinite(self.flat).all())

    def parts(self, dtype: torch.dtype | None = None) -> dict[str, Part]:
        """The network as file parts by dotted name, on the CPU."""

        def copy(x: Tensor) -> Tensor:
            return x.to("cpu", dtype or x.dtype, copy=True)

        return {name: adapter.part(copy) for name, adapter in self.modules_by_name.items()}

    def state_tensors(
        self, dialect: str = "kohya", dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """The tensors of a LoRA file in a dialect."""
        return named_tensors(self.parts(dtype), dialect)[0]

    def save(
        self,
        path: str | os.PathLike,
        dialect: str = "kohya",
        dtype: torch.dtype | None = None,
        metadata: Mapping[str, str] | None = None,
        fold_alpha: bool = False,
    ) -> None:
        """Write a LoRA file atomically.

        Args:
            path: the .safetensors file.
            dialect: kohya, comfyui or diffusers.
            dtype: of the saved matrices; None keeps the training dtype.
            metadata: strings for the header.
            fold_alpha: multiply alpha / rank into the weights and leave `.alpha` out.

        Raises:
            UserError: numbers that are not finite, or a disk that refuses.
        """
        # Programs disagree on what alpha means in a LoHa and a LoKr, so there it is the rank.
        parts = {n: p if p.kind == "lora" else p.settled() for n, p in self.parts(dtype).items()}
        write_lora(path, parts, dialect, metadata=metadata, fold_alpha=fold_alpha)

    @torch.no_grad()
    def load(self, path: str | os.PathLike) -> list[str]:
        """Take the matrices of a LoRA file of any dialect, in place.

        Returns:
            Names in the file that this network does not have; modules that the file does not have
            keep their values.

        Raises:
            UserError: no LoRA, none of its modules fits, or a rank differs.
        """
        ignored: list[str] = []
        parts, _, metadata = read_lora(path, ignored)
        parts = unfold(parts, metadata)
        known = parts.keys() & self.modules_by_name.keys()
        if not known:
            raise UserError(f"{path} has none of the {len(self.modules_by_name)} trained modules")
        shapes = {n: {k: t.shape for k, t in p.fields().items()} for n, p in parts.items()}
        for name in known:
            own, part = self.modules_by_name[name].part(), parts[name]
            if {k: t.shape for k, t in own.fields().items()} != shapes[name]:
                raise UserError(
                    f"{path}: {name} is a {_sizes(part)}, this network has a {_sizes(own)} there: "
                    "use --dim_from_weights, or the settings of that file"
                )
        for name in known:
            own, part = self.modules_by_name[name], parts[name]
            # The file's scale may differ from this network's: the product stays that of the file.
            own.load(part.times(part.scale / own.scale))
        return sorted({*ignored, *(parts.keys() - known)})

    @torch.no_grad()
    def scale_weight_norms(self, max_norm: float) -> tuple[int, float, float]:
        """Shrink each pair whose product (with alpha / rank) has a larger Frobenius norm.

        Returns:
            (pairs shrunk, mean norm, largest norm), norms after shrinking.

        Raises:
            ValueError: an adapter that is no plain LoRA.
        """
        if any(adapter.kind != "lora" for adapter in self.adapters):
            raise ValueError("only the product of a LoRA can be scaled by its two matrices")
        norms = torch.stack([_product_norm(a) for a in self.adapters])
        ratios = (max_norm / norms.clamp_min(1e-12)).clamp(max=1.0)
        for adapter, ratio in zip(self.adapters, ratios.sqrt(), strict=True):
            adapter.down.mul_(ratio)
            adapter.up.mul_(ratio)
        norms = norms * ratios
        return int((ratios < 1).sum()), norms.mean().item(), norms.max().item()

    def remove(self) -> None:
        """Detach every adapter from its layer."""
        for adapter in self.adapters:
            adapter.remove()


def _sizes(part: Part) -> str:
    """Kind and sizes of a part, for a message."""
    rank = f" of rank {part.rank}" if part.rank else ""
    return f"{part.network}{rank} for a layer of {part.shape[1]} inputs and {part.shape[0]} outputs"


def _product_norm(adapter: LoRALinear) -> Tensor:
    """‖up·down‖ · alpha / rank without building the product: ‖UD‖² = Σ (UᵀU) ∘ (DDᵀ)."""
    up, down = adapter.up.float(), adapter.down.float()
    square = ((up.T @ up) * (down @ down.T)).sum()
    return square.clamp_min(0).sqrt() * adapter.scale
