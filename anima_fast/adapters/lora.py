"""The network of a run: LoRA, LoHa or LoKr adapters on the layers of a frozen model.

`add_lora` attaches adapters (layers.py, lycoris.py) to the linear layers of a DiT (and, when asked,
of the LLM adapter and the text encoder) by replacing their `forward`; state dict and module tree
stay as they are. All parameters live in one flat buffer (flat.py). Names, default targets, initial
values and dropouts are those of sd-scripts, so that files and settings carry over.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from anima_fast.adapters import names
from anima_fast.adapters.flat import FlatBuffer, Group
from anima_fast.adapters.formats import named_tensors, read_lora, unfold, write_lora
from anima_fast.adapters.layers import AdaptedLinear, Dropouts, LoRALinear, initial_lora
from anima_fast.adapters.lycoris import (
    LoHaLinear,
    LoKrLinear,
    initial_loha,
    initial_lokr,
    initial_magnitudes,
)
from anima_fast.adapters.parts import Part
from anima_fast.adapters.rank_masks import rank_mask
from anima_fast.adapters.targets import Target, find_targets, first_match
from anima_fast.errors import UserError

LAYERS: dict[str, type[AdaptedLinear]] = {
    cls.kind: cls for cls in (LoRALinear, LoHaLinear, LoKrLinear)
}


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
        self._build("cpu")

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


def add_lora(
    dit: nn.Module,
    *,
    kind: str = "lora",
    rank: int = 4,
    alpha: float | None = 1.0,
    dropout: float | None = None,
    rank_dropout: float | None = None,
    module_dropout: float | None = None,
    dora: str | None = None,
    lokr: Mapping[str, Any] | None = None,
    llm_adapter: nn.Module | None = None,
    text_encoder: nn.Module | None = None,
    train_dit: bool = True,
    blocks: Collection[int] | None = None,
    exclude_patterns: Sequence[str] = (),
    include_patterns: Sequence[str] = (),
    reg_dims: Mapping[str, int] | None = None,
    reg_lrs: Mapping[str, float] | None = None,
    loraplus_ratio: float | None = None,
    loraplus_unet_ratio: float | None = None,
    loraplus_te_ratio: float | None = None,
    unet_lr: float = 1e-4,
    text_encoder_lr: float | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int | None = None,
    modules_from: Mapping[str, Part] | None = None,
) -> LoRANetwork:
    """Attach a network.

    Args:
        dit: from `load_dit`; `llm_adapter`, `text_encoder`: their modules get adapters when given.
        kind: lora, loha or lokr.
        rank, alpha: the scale is alpha / rank; alpha 0 or None means rank.
        dropout, rank_dropout, module_dropout: see `Dropouts`; active in train mode only.
        dora: give every adapter magnitudes, of the "outputs" or of the "inputs"; None is none.
        lokr: `factor`, `decompose_both` and `full_matrix` of `lycoris.initial_lokr`.
        train_dit: False leaves the DiT itself out.
        blocks: indices of the DiT's blocks that get adapters; None means all. Below the first of
            them nothing is computed in backward.
        exclude_patterns, include_patterns: regular expressions, see adapters/targets.py.
        reg_dims, reg_lrs: rank and learning rate of modules by pattern, first match wins; rate 0
            freezes.
        loraplus_ratio (and the two that beat it): rate of one side of an adapter (`plus`: up, w2_a
            of a LoHa, w1 of a LoKr) over that of the rest.
        unet_lr, text_encoder_lr: rates of the two parts; the second defaults to the first.
        dtype: of parameters and gradients.
        seed: of the initial values, which depend on the module's name and nothing else.
        modules_from: parts of a file: take exactly its modules, kinds, ranks, alphas and values.

    Returns:
        The network, in train mode, on the CPU (`network.to(device)` before making an optimizer).

    Raises:
        UserError: rank below 1, a bad pattern, a block that does not exist, nothing to train, or
            parts of a file that do not fit the layers.
    """
    if rank < 1:
        raise UserError(f"--network_dim {rank}: the rank must be at least 1")
    targets = find_targets(
        dit if train_dit else None,
        llm_adapter,
        text_encoder,
        exclude=exclude_patterns,
        include=[".*"] if modules_from is not None else include_patterns,
        blocks=blocks,
    )
    if modules_from is not None:
        owners = {names.TEXT_ENCODER: text_encoder, names.ADAPTER: llm_adapter}
        left_out = tuple(prefix for prefix, model in owners.items() if model is None)
        targets = _matching(targets, modules_from, left_out, train_dit)
    if not targets:
        raise UserError("no module is left to train: loosen exclude_patterns")
    dropouts = Dropouts(dropout, rank_dropout, module_dropout)
    adapters = {}
    for target in targets:
        if modules_from is not None:
            part = modules_from[target.name]
        else:
            own_rank = int(first_match(reg_dims or {}, target.name, rank, "network_reg_dims"))
            if own_rank < 1:
                raise UserError(
                    f"network_reg_dims: {target.name} gets rank {own_rank}, use 1 or more"
                )
            generator = _generator(seed, target.name)
            part = _initial(target, kind, own_rank, alpha, generator, dora, lokr or {})
        adapters[target.name] = LAYERS[part.kind](target, part, dropouts)
    groups = _groups(
        adapters,
        {t.name: t.part for t in targets},
        rates={
            "dit": unet_lr,
            "text_encoder": unet_lr if text_encoder_lr is None else text_encoder_lr,
        },
        ratios={
            "dit": loraplus_unet_ratio or loraplus_ratio or 1.0,
            "text_encoder": loraplus_te_ratio or loraplus_ratio or 1.0,
        },
        reg_lrs=reg_lrs or {},
    )
    network = LoRANetwork(adapters, groups, dtype).train()
    # Last, so that a model is as it was when something above is refused.
    for adapter in network.adapters:
        adapter.attach()
    return network


def _matching(
    targets: Sequence[Target], parts: Mapping[str, Part], left_out: tuple[str, ...], dit: bool
) -> list[Target]:
    """The layers that a file has parts for; raises `UserError` where the two do not fit.

    Parts of models that are not adapted here (prefixes `left_out`; the DiT without `dit`) may be in
    the file.
    """
    by_name = {target.name: target for target in targets}
    others = (names.TEXT_ENCODER, names.ADAPTER)
    for name, part in parts.items():
        if name.startswith(left_out) or not (dit or name.startswith(others)):
            continue
        target = by_name.get(name)
        layer = target and (target.linear.out_features, target.linear.in_features)
        if target is None or tuple(part.shape) != layer:
            raise UserError(f"{name} does not fit this model: it is made for another")
    return [target for target in targets if target.name in parts]


def _initial(
    target: Target,
    kind: str,
    rank: int,
    alpha: float | None,
    generator: torch.Generator,
    dora: str | None,
    lokr: Mapping[str, Any],
) -> Part:
    """The first values of an adapter: Δ = 0, and with magnitudes W' = W."""
    shape = (target.linear.out_features, target.linear.in_features)
    if kind == "lokr":
        part: Part = initial_lokr(shape, rank, alpha, generator, **lokr)
    else:
        part = {"lora": initial_lora, "loha": initial_loha}[kind](shape, rank, alpha, generator)
    if dora is not None:
        part = replace(part, dora_scale=initial_magnitudes(target.linear, dora == "inputs"))
    return part


def _generator(seed: int | None, name: str) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
        return generator
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _groups(
    adapters: Mapping[str, AdaptedLinear],
    parts: Mapping[str, str],
    *,
    rates: Mapping[str, float],
    ratios: Mapping[str, float],
    reg_lrs: Mapping[str, float],
) -> list[Group]:
    """Learning-rate groups; what has rate 0 is in none of them."""
    members: dict[tuple[str, float], list[nn.Parameter]] = {}
    names = {"dit": "unet", "text_encoder": "textencoder"}
    for name, adapter in adapters.items():
        part = parts[name]
        matched = first_match(reg_lrs, name, None, "network_reg_lrs")
        rate = rates[part] if matched is None else float(matched)
        title = names[part] if matched is None else f"{names[part]}_reg_{rate:g}"
        plus = ratios[part]
        slow, fast = adapter.groups()
        for matrices, lr, suffix in ((slow, rate, ""), (fast, rate * plus, "_plus")):
            key = (title + (suffix if plus != 1 else ""), lr)
            if lr and matrices:
                members.setdefault(key, []).extend(matrices)
    if not members:
        raise UserError("every learning rate is 0: nothing would be trained")
    return [Group(title, lr, tuple(params)) for (title, lr), params in members.items()]
