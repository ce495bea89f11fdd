"""A network of lower rank: `anima-fast resize`.

Each module's Δ is replaced by its best approximation of the new rank. A LoRA keeps its scale
alpha / rank, so alpha changes with the rank; a module whose rank does not fall is written as it is.
LoHa and LoKr become plain LoRA with alpha = rank. A DoRA keeps its magnitudes.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from anima_fast.adapters.deltas import Delta, LoRADelta
from anima_fast.errors import UserError
from anima_fast.models.adapter_kinds import LORA
from anima_fast.progress import ItemProgress
from anima_fast.tools.low_rank import weighted_sum
from anima_fast.tools.networks import NetworkFile, check_output, dtype_of, module_key, with_comment
from anima_fast.tools.ranks import ModuleLoss, RankRule, rounded


def resize_file(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    rule: RankRule,
    *,
    precision: str | None = None,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> list[ModuleLoss]:
    """Write a network of lower rank in the dialect of the old one; returns what each module lost.

    Args:
        src, dst: files; `dst` is replaced atomically.
        rule: chooses each module's rank.
        precision: fp32, fp16 or bf16; None keeps the dtype of the file.
        device: where the decompositions run, in float64.
        say: gets lines of progress.

    Raises `UserError` for no network of this model, and for a rank that is not below its own.
    """
    check_output(dst, [src])
    dtype_of(precision)
    network = NetworkFile.read(src)
    _check_rank(network, rule)
    deltas, losses = {}, []
    with ItemProgress("resized", len(network.deltas), "modules", say) as progress:
        for name, delta in network.deltas.items():
            deltas[name], loss = resize_delta(name, delta, rule, precision, device)
            losses.append(loss)
            progress.advance(1)
    metadata = with_comment(network.metadata, f"resized by anima_fast to {rule}")
    if any(delta.kind is not LORA for delta in network.deltas.values()):
        metadata |= module_key(deltas) | {"ss_network_args": "{}"}
    network.write(dst, deltas, metadata, precision)
    return losses


def resize_delta(
    name: str,
    delta: Delta,
    rule: RankRule,
    precision: str | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Delta, ModuleLoss]:
    """One module at the rank that a rule chooses, and what it lost."""
    matrix = weighted_sum([(delta.scale, delta)], device)
    spectrum = matrix.spectrum()
    rank = rule.choose(spectrum.values)
    if isinstance(delta, LoRADelta) and rank >= delta.rank:
        return delta, ModuleLoss(name, matrix.norm(), 0.0, delta.rank, delta.rank)
    up, down = spectrum.cut(rank)
    alpha, scale = delta.alpha, 1.0
    if alpha is not None:
        alpha = torch.full_like(alpha, rank * (delta.scale if delta.kind is LORA else 1.0))
        # Read back: an alpha of few bits cannot hold every product of rank and scale.
        scale = alpha.item() / rank or 1.0
    root = abs(scale) ** 0.5
    dtype = dtype_of(precision) or next(iter(delta.matrices().values())).dtype
    resized = LoRADelta(down / root, up * root / scale, alpha=alpha, dora_scale=delta.dora_scale)
    return rounded(name, matrix, resized, dtype, delta.rank)


def _check_rank(network: NetworkFile, rule: RankRule) -> None:
    """Refuse a fixed rank that no module would be reduced to."""
    ranks = [delta.rank for delta in network.deltas.values() if isinstance(delta, LoRADelta)]
    if rule.rank is None or rule.method is not None or len(ranks) < len(network.deltas):
        return
    if rule.rank >= max(ranks):
        raise UserError(
            f"{network.path} has rank {max(ranks)} already: give a --rank below it (a higher one "
            "would add nothing but size)"
        )
