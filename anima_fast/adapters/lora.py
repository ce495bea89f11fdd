"""Making the network of a run: LoRA, LoHa or LoKr adapters on the layers of a frozen model.

`add_lora` attaches adapters (layers.py, lycoris.py) to the linear layers of a DiT (and, when asked,
of the LLM adapter and the text encoder) by replacing their `forward`; state dict and module tree
stay as they are. All parameters live in one flat buffer (flat.py). Names, default targets, initial
values and dropouts are those of sd-scripts, so that files and settings carry over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from anima_fast.adapters import names
from anima_fast.adapters.flat import Group
from anima_fast.adapters.layers import AdaptedLinear, Dropouts, LoRALinear, initial_lora
from anima_fast.adapters.lycoris import (
    LoHaLinear,
    LoKrLinear,
    initial_loha,
    initial_lokr,
    initial_magnitudes,
)
from anima_fast.adapters.network import LoRANetwork
from anima_fast.adapters.parts import Part
from anima_fast.adapters.targets import Target, find_targets, first_match
from anima_fast.errors import UserError

LAYERS: dict[str, type[AdaptedLinear]] = {
    cls.kind: cls for cls in (LoRALinear, LoHaLinear, LoKrLinear)
}


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
    device: str = "cpu",
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
        modules_from: parts of a file: take exactly its modules, kinds, ranks, alphas and values,
            whatever is said above about them.
        device: of the first values; "meta" makes none, for asking whether a network fits.

    Returns:
        The network, in train mode (`network.to(device)` before making an optimizer).

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
        blocks=blocks if modules_from is None else None,
    )
    if modules_from is not None:
        owners = {names.TEXT_ENCODER: text_encoder, names.ADAPTER: llm_adapter}
        left_out = tuple(prefix for prefix, model in owners.items() if model is None)
        targets = _matching(targets, modules_from, left_out, train_dit)
    if not targets:
        raise UserError(
            "no module is left to train: loosen exclude_patterns or train_block_indices in "
            "--network_args"
        )
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
            part = _initial(target, kind, own_rank, alpha, generator, dora, lokr or {}, device)
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
            has = f"one of {list(layer)}" if layer else "none"
            raise UserError(
                f"{name} does not fit this model: it is for a weight of {list(part.shape)}, the "
                f"model has {has} (`anima-fast remap` moves a network to another depth)"
            )
    return [target for target in targets if target.name in parts]


def _initial(
    target: Target,
    kind: str,
    rank: int,
    alpha: float | None,
    generator: torch.Generator,
    dora: str | None,
    lokr: Mapping[str, Any],
    device: str,
) -> Part:
    """The first values of an adapter: Δ = 0, and with magnitudes W' = W."""
    shape = (target.linear.out_features, target.linear.in_features)
    with torch.device(device):
        if kind == "lokr":
            part: Part = initial_lokr(shape, rank, alpha, generator, **lokr)
        else:
            maker = {"lora": initial_lora, "loha": initial_loha}[kind]
            part = maker(shape, rank, alpha, generator)
    # The one value that a network without values has too.
    part = replace(part, alpha=torch.tensor(float(alpha or rank)))
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
