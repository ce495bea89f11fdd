"""LoRA: y = W x + multiplier · (alpha / rank) · up(down(x)), with W frozen.

`add_lora` attaches adapters to the linear layers of a DiT (and, when asked, of the LLM adapter and
the text encoder) by replacing their `forward`; state dict and module tree stay as they are. All
parameters live in one flat buffer (adapters/flat.py). Names, default targets, initial values and
dropouts are those of sd-scripts, so that files and settings carry over.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anima_fast.adapters.flat import FlatBuffer, Group
from anima_fast.adapters.formats import named_tensors, read_lora, unfold, write_lora
from anima_fast.adapters.parts import LoRAPart
from anima_fast.adapters.targets import Target, find_targets, first_match
from anima_fast.errors import UserError


class LoRALinear(nn.Module):
    """The adapter of one linear layer.

    Args:
        target: the layer, its dotted name and its part.
        rank, alpha: the scale is alpha / rank; alpha 0 means rank.
        dropout: probability of zeroing an element of down(x).
        rank_dropout: probability of zeroing a rank component for a sample; survivors are scaled up.
        module_dropout: probability of leaving the adapter out of a call.
        generator: source of the initial values.
    """

    def __init__(
        self,
        target: Target,
        *,
        rank: int,
        alpha: float | None,
        dropout: float | None,
        rank_dropout: float | None,
        module_dropout: float | None,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        linear = target.linear
        self.name, self.rank, self.alpha = target.name, rank, float(alpha or rank)
        self.dropout, self.rank_dropout = dropout, rank_dropout
        self.module_dropout = module_dropout
        self.multiplier = 1.0
        bound = 1 / math.sqrt(linear.in_features)
        down = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))
        # In a list, so that the layer does not become a submodule of its own adapter.
        self._linear = [linear]
        self._plain_forward: Callable[[Tensor], Tensor] = linear.forward
        self._removed = False

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def attach(self) -> None:
        """Let the layer compute with this adapter, on top of those that it has."""
        linear = self._linear[0]
        self._plain_forward, linear.forward = linear.forward, self.forward
        # Read by the fused block, which computes layer and adapter together.
        linear.adapters = [*getattr(linear, "adapters", ()), self]

    def remove(self) -> None:
        """Let the layer compute without this adapter; others on the layer stay."""
        linear = self._linear[0]
        # One that others stand on stays in the chain and passes through.
        self._removed = True
        linear.adapters = [a for a in getattr(linear, "adapters", ()) if a is not self]
        if linear.__dict__.get("forward") == self.forward:
            del linear.forward
            if linear.forward != self._plain_forward:
                linear.forward = self._plain_forward

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out] in x's dtype."""
        y = self._plain_forward(x)
        if self._removed or self._left_out():
            return y
        return y + self.delta(x)

    def _left_out(self) -> bool:
        """Module dropout, drawn on the CPU generator, which never waits for the device."""
        drops = self.training and self.module_dropout
        return bool(drops) and torch.rand(()).item() < self.module_dropout

    @property
    def drops(self) -> bool:
        """Whether calls are random."""
        return self.training and bool(self.dropout or self.rank_dropout or self.module_dropout)

    def draw(self, batch: int, length: int, like: Tensor) -> tuple[float, Tensor | None]:
        """The scale of one call (0: left out) and the factors of down(x), drawn as `forward` does.

        Args:
            batch, length: B and L of x [B, L, in].
            like: gives dtype and device of x.

        Returns:
            The scale and [B, L, R], None without dropout.
        """
        if self._removed or self._left_out():
            return 0.0, None
        scale, factor = self.multiplier * self.scale, None
        if self.training and self.dropout:
            factor = F.dropout(like.new_ones(batch, length, self.rank), self.dropout)
        if self.training and self.rank_dropout:
            keep = 1 - self.rank_dropout
            mask = torch.bernoulli(like.new_full((batch, 1, self.rank), keep))
            factor = mask.expand(batch, length, -1) if factor is None else factor * mask
            scale = scale / keep
        return scale, factor

    def delta(self, x: Tensor) -> Tensor:
        """What the adapter adds: [..., in] → [..., out] in x's dtype."""
        h = F.linear(x, self.down.to(x.dtype))  # [..., R]
        scale = self.multiplier * self.scale
        if self.training and self.dropout:
            h = F.dropout(h, self.dropout)
        if self.training and self.rank_dropout:
            keep = 1 - self.rank_dropout
            # One mask per sample, whatever number of token dimensions lies between.
            shape = (h.shape[0], *[1] * (h.ndim - 2), self.rank)
            h = h * torch.bernoulli(h.new_full(shape, keep))
            scale = scale / keep
        return scale * F.linear(h, self.up.to(x.dtype))


class LoRANetwork(nn.Module):
    """All adapters of a run; made by `add_lora`.

    Attributes:
        modules_by_name: `LoRALinear` by dotted name.
        flat: all parameters [P], `flat_grad`: the gradients of the trained ones.
    """

    def __init__(
        self, adapters: Mapping[str, LoRALinear], groups: list[Group], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.modules_by_name = dict(adapters)
        self.adapters = nn.ModuleList(adapters.values())
        self._groups = groups
        self._dtype = dtype
        self._multiplier = 1.0
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

    def parts(self, dtype: torch.dtype | None = None) -> dict[str, LoRAPart]:
        """The network as file parts by dotted name, on the CPU."""

        def copy(x: Tensor) -> Tensor:
            return x.detach().to("cpu", dtype or x.dtype, copy=True)

        return {
            name: LoRAPart(copy(a.down), copy(a.up), torch.tensor(a.alpha))
            for name, a in self.modules_by_name.items()
        }

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
        write_lora(path, self.parts(dtype), dialect, metadata=metadata, fold_alpha=fold_alpha)

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
        for name in known:
            own, part = self.modules_by_name[name], parts[name]
            if own.down.shape != part.down.shape or own.up.shape != part.up.shape:
                raise UserError(
                    f"{path}: {name} has rank {part.rank} for {part.down.shape[1]} inputs, this "
                    f"network {own.rank} for {own.down.shape[1]}: use --dim_from_weights, or the "
                    "--network_dim of that file"
                )
        for name in known:
            own, part = self.modules_by_name[name], parts[name]
            own.down.copy_(part.down)
            # The file's scale may differ from this network's: the product stays that of the file.
            factor = part.scale / own.scale
            own.up.copy_(part.up if factor == 1 else part.up.float() * factor)
        return sorted({*ignored, *(parts.keys() - known)})

    @torch.no_grad()
    def scale_weight_norms(self, max_norm: float) -> tuple[int, float, float]:
        """Shrink each pair whose product (with alpha / rank) has a larger Frobenius norm.

        Returns:
            (pairs shrunk, mean norm, largest norm), norms after shrinking.
        """
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


def _product_norm(adapter: LoRALinear) -> Tensor:
    """‖up·down‖ · alpha / rank without building the product: ‖UD‖² = Σ (UᵀU) ∘ (DDᵀ)."""
    up, down = adapter.up.float(), adapter.down.float()
    square = ((up.T @ up) * (down @ down.T)).sum()
    return square.clamp_min(0).sqrt() * adapter.scale


def add_lora(
    dit: nn.Module,
    *,
    rank: int = 4,
    alpha: float | None = 1.0,
    dropout: float | None = None,
    rank_dropout: float | None = None,
    module_dropout: float | None = None,
    llm_adapter: nn.Module | None = None,
    text_encoder: nn.Module | None = None,
    train_dit: bool = True,
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
    modules_from: Mapping[str, LoRAPart] | None = None,
) -> LoRANetwork:
    """Attach a LoRA network.

    Args:
        dit: from `load_dit`; `llm_adapter`, `text_encoder`: their modules get adapters when given.
        rank, alpha: the scale is alpha / rank; alpha 0 or None means rank.
        dropout, rank_dropout, module_dropout: see `LoRALinear`; active in train mode only.
        train_dit: False leaves the DiT itself out.
        exclude_patterns, include_patterns: regular expressions, see adapters/targets.py.
        reg_dims, reg_lrs: rank and learning rate of modules by pattern, first match wins; rate 0
            freezes.
        loraplus_ratio (and the two that beat it): rate of `up` over that of `down`.
        unet_lr, text_encoder_lr: rates of the two parts; the second defaults to the first.
        dtype: of parameters and gradients.
        seed: of the initial values, which depend on the module's name and nothing else.
        modules_from: parts of a LoRA file: take exactly its modules, ranks and alphas.

    Returns:
        The network, in train mode, on the CPU (`network.to(device)` before making an optimizer).

    Raises:
        UserError: rank below 1, a bad pattern, or nothing to train.
    """
    if rank < 1:
        raise UserError(f"--network_dim {rank}: the rank must be at least 1")
    targets = find_targets(
        dit if train_dit else None,
        llm_adapter,
        text_encoder,
        exclude=exclude_patterns,
        include=[".*"] if modules_from is not None else include_patterns,
    )
    if modules_from is not None:
        targets = [t for t in targets if t.name in modules_from]
    if not targets:
        raise UserError("no module is left to train: loosen exclude_patterns")
    adapters = {}
    for target in targets:
        own_rank = int(first_match(reg_dims or {}, target.name, rank, "network_reg_dims"))
        own_alpha = alpha
        if modules_from is not None:
            part = modules_from[target.name]
            own_rank, own_alpha = part.rank, part.scale * part.rank
        if own_rank < 1:
            raise UserError(f"network_reg_dims: {target.name} gets rank {own_rank}, use 1 or more")
        adapters[target.name] = LoRALinear(
            target,
            rank=own_rank,
            alpha=own_alpha,
            dropout=dropout,
            rank_dropout=rank_dropout,
            module_dropout=module_dropout,
            generator=_generator(seed, target.name),
        )
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


def _generator(seed: int | None, name: str) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
        return generator
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _groups(
    adapters: Mapping[str, LoRALinear],
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
        for matrix, lr, suffix in ((adapter.down, rate, ""), (adapter.up, rate * plus, "_plus")):
            key = (title + (suffix if plus != 1 else ""), lr)
            if lr:
                members.setdefault(key, []).append(matrix)
    if not members:
        raise UserError("every learning rate is 0: nothing would be trained")
    return [Group(title, lr, tuple(params)) for (title, lr), params in members.items()]
