"""A network on a frozen model: attached to its layers to train, or built into its weights.

`add_lora` attaches adapters (layers.py, lycoris.py) to linear layers by replacing their `forward`;
state dict and module tree stay as they are. All parameters live in one flat buffer (flat.py).
Names, default targets, initial values and dropouts are those of sd-scripts, so that files and
settings carry over. `merge_lora` builds a file into the weights themselves.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from anima_fast.adapters import names
from anima_fast.adapters.deltas import Delta, adapted_weight
from anima_fast.adapters.flat import ParamGroup
from anima_fast.adapters.formats import read_lora
from anima_fast.adapters.layers import AdaptedLinear, Dropouts, LoRALinear
from anima_fast.adapters.lycoris import LoHaLinear, LoKrLinear, initial_magnitudes
from anima_fast.adapters.network import LoRANetwork
from anima_fast.adapters.targets import Target, find_targets, first_match
from anima_fast.errors import UserError
from anima_fast.kernels.op import wide
from anima_fast.models.adapter_kinds import ADAPTER_KINDS, LOKR, AdapterKind
from anima_fast.models.dit_layers import weight_scale

LAYERS: dict[AdapterKind, type[AdaptedLinear]] = {
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
    modules_from: Mapping[str, Delta] | None = None,
    device: str = "cpu",
) -> LoRANetwork:
    """Attach a network; it is in train mode (`network.to(device)` before making an optimizer).

    Args:
        dit: from `load_dit`; `llm_adapter`, `text_encoder`: their modules get adapters when given.
        kind: lora, loha or lokr.
        rank, alpha: the scale is alpha / rank; alpha 0 or None means rank.
        dropout, rank_dropout, module_dropout: see `Dropouts`; active in train mode only.
        dora: give every adapter magnitudes, of the "outputs" or the "inputs"; None disables DoRA.
        lokr: `factor`, `decompose_both` and `full_matrix` of `lycoris.initial_lokr`.
        train_dit: False leaves the DiT itself out.
        blocks: indices of the DiT's blocks that get adapters; None means all. Below the first of
            them nothing is computed in backward.
        exclude_patterns, include_patterns: regular expressions, see adapters/targets.py.
        reg_dims, reg_lrs: rank and learning rate of modules by pattern, first match wins; rate 0
            freezes.
        loraplus_ratio (and the two that override it): rate of one side of an adapter (`plus`: up,
            w2_a of a LoHa, w1 of a LoKr) over that of the rest.
        unet_lr, text_encoder_lr: rates of DiT and text encoder; the second defaults to the first.
        dtype: of parameters and gradients.
        seed: of the initial values, which depend on the module's name and nothing else.
        modules_from: of a file: take exactly its modules, kinds, ranks, alphas and values, whatever
            the arguments above say about them.
        device: of the initial values; "meta" makes none, to ask only whether a network fits.

    Raises `UserError` for a rank below 1, a bad pattern, a block that does not exist, nothing to
    train, or modules of a file that do not fit the layers.
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
    kinds = {kind.word: kind for kind in ADAPTER_KINDS}
    adapters = {}
    for target in targets:
        if modules_from is not None:
            delta = modules_from[target.name]
        else:
            own_rank = first_match(reg_dims or {}, target.name, rank, "network_reg_dims")
            if own_rank < 1:
                raise UserError(
                    f"network_reg_dims: {target.name} gets rank {own_rank}, use 1 or more"
                )
            settings = lokr or {} if kind == LOKR.word else {}
            layer = LAYERS[kinds[kind]]
            delta = _initial(target, layer, own_rank, alpha, seed, dora, settings, device)
        adapters[target.name] = LAYERS[delta.kind](target, delta, dropouts)
    text_lr = unet_lr if text_encoder_lr is None else text_encoder_lr
    branches = {
        "dit": ("unet", unet_lr, loraplus_unet_ratio or loraplus_ratio or 1.0),
        "text_encoder": ("textencoder", text_lr, loraplus_te_ratio or loraplus_ratio or 1.0),
    }
    branch_of = {target.name: branches[target.model] for target in targets}
    groups = _groups(adapters, branch_of, reg_lrs or {})
    network = LoRANetwork(adapters, groups, dtype).train()
    # Last, so that the model is untouched when something above is refused.
    for adapter in network.adapters:
        adapter.attach()
    return network


@torch.no_grad()
def merge_lora(
    dit: nn.Module,
    path: str | os.PathLike,
    multiplier: float = 1.0,
    *,
    llm_adapter: nn.Module | None = None,
    text_encoder: nn.Module | None = None,
) -> int:
    """W ← W with the file built in at a strength (deltas.py), in float32, back to W's dtype.

    Weights are replaced, not overwritten: those of a mapped file or of a caller's state dict stay
    as they are. Returns how many modules were skipped because they belong to a model that is not
    given. Raises `UserError` when the file does not fit a model; nothing is changed then.
    """
    deltas, _, _ = read_lora(path)
    owners = {names.TEXT_ENCODER: text_encoder and text_encoder.model, names.ADAPTER: llm_adapter}
    absent = tuple(prefix for prefix, owner in owners.items() if owner is None)
    models = {"": dit} | {prefix: owner for prefix, owner in owners.items() if prefix not in absent}
    modules = {p + n: module for p, model in models.items() for n, module in model.named_modules()}
    given = {name: delta for name, delta in deltas.items() if not name.startswith(absent)}
    for name, delta in given.items():
        module = modules.get(name)
        if module is None or module.weight.shape != delta.shape:
            raise UserError(f"{path}: {name} does not fit this DiT: it is made for another size")
    for name, delta in given.items():
        weight, scale = modules[name].weight, weight_scale(modules[name])
        moved = {key: tensor.to(weight.device) for key, tensor in delta.fields().items()}
        merged = adapted_weight(wide(weight) * scale, replace(delta, **moved), multiplier)
        weight.data = (merged / scale).to(weight)
    return len(deltas) - len(given)


def _matching(
    targets: Sequence[Target], deltas: Mapping[str, Delta], left_out: tuple[str, ...], dit: bool
) -> list[Target]:
    """The layers that a file has modules for; raises `UserError` where the two do not fit.

    Modules of models that are not adapted here (`left_out`, the DiT without `dit`) are passed over.
    """
    by_name = {target.name: target for target in targets}
    others = (names.TEXT_ENCODER, names.ADAPTER)
    for name, delta in deltas.items():
        if name.startswith(left_out) or not (dit or name.startswith(others)):
            continue
        target = by_name.get(name)
        layer = target and (target.linear.out_features, target.linear.in_features)
        if target is None or tuple(delta.shape) != layer:
            has = f"one of {list(layer)}" if layer else "none"
            raise UserError(
                f"{name} does not fit this model: it is for a weight of {list(delta.shape)}, the "
                f"model has {has} (`anima-fast remap` moves a network to another depth)"
            )
    return [target for target in targets if target.name in deltas]


def _initial(
    target: Target,
    layer: type[AdaptedLinear],
    rank: int,
    alpha: float | None,
    seed: int | None,
    dora: str | None,
    settings: Mapping[str, Any],
    device: str,
) -> Delta:
    """The initial values of an adapter: Δ = 0, and with magnitudes W' = W."""
    shape = (target.linear.out_features, target.linear.in_features)
    generator = _generator(seed, target.name)
    with torch.device(device):
        delta = layer.initial(shape, rank, generator, **settings)
    # Outside: a network without values has its alpha too.
    delta = replace(delta, alpha=torch.tensor(float(alpha or rank)))
    if dora is not None:
        delta = replace(delta, dora_scale=initial_magnitudes(target.linear, dora == "inputs"))
    return delta


def _generator(seed: int | None, name: str) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
        return generator
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _groups(
    adapters: Mapping[str, AdaptedLinear],
    branch_of: Mapping[str, tuple[str, float, float]],
    reg_lrs: Mapping[str, float],
) -> list[ParamGroup]:
    """Learning-rate groups, without rate 0, from each adapter's (title, rate, ratio of LoRA+)."""
    members: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name, adapter in adapters.items():
        title, rate, plus = branch_of[name]
        matched = first_match(reg_lrs, name, None, "network_reg_lrs")
        if matched is not None:
            rate = float(matched)
            title = f"{title}_reg_{rate:g}"
        named = dict(adapter.named_parameters())
        fast = [parameter for key, parameter in named.items() if key in adapter.plus]
        slow = [parameter for key, parameter in named.items() if key not in adapter.plus]
        for matrices, lr, suffix in ((slow, rate, ""), (fast, rate * plus, "_plus")):
            key = (title + (suffix if plus != 1 else ""), lr)
            if lr and matrices:
                members.setdefault(key, []).extend(matrices)
    if not members:
        raise UserError("every learning rate is 0: nothing would be trained")
    return [ParamGroup(title, lr, tuple(params)) for (title, lr), params in members.items()]
