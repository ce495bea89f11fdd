"""Several networks as one LoRA file: `anima-fast merge` without a checkpoint.

The sum s₁Δ₁ + s₂Δ₂ of LoRA is a LoRA of the sum of their ranks: the matrices are concatenated,
each scaled by its strength and alpha / rank, and alpha is the new rank. With `rank` the sum is
replaced by its best approximation of that rank, which is also the only way for LoHa and LoKr. What
a DoRA adds depends on the weight it is for, so it can only be merged into a checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path

import torch

from anima_fast.adapters.deltas import Delta, LoRADelta
from anima_fast.errors import UserError
from anima_fast.models.adapter_kinds import DORA, LORA
from anima_fast.progress import ItemProgress
from anima_fast.tools.low_rank import weighted_sum
from anima_fast.tools.merge import MERGED, entries
from anima_fast.tools.networks import (
    NetworkFile,
    check_output,
    dtype_of,
    new_metadata,
    write_network,
)
from anima_fast.tools.ranks import ModuleLoss, RankRule, full_alpha, rounded


def combine_networks(
    networks: Sequence[tuple[str | os.PathLike, float]],
    output: str | os.PathLike,
    *,
    rule: RankRule | None = None,
    precision: str | None = None,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> list[ModuleLoss]:
    """Write the weighted sum of networks as one LoRA, in the dialect of the first.

    Args:
        networks: (file, strength).
        output: file, replaced atomically.
        rule: chooses each module's rank; None keeps all of it, which takes plain LoRA.
        precision: fp32, fp16 or bf16; None is the widest dtype of the inputs.
        device: where the decompositions run, in float64.
        say: gets lines of progress.

    Returns what each module lost. Raises `UserError` for files that do not fit each other, DoRA,
    and LoHa or LoKr without a rule.
    """
    check_output(output, [path for path, _ in networks])
    dtype = dtype_of(precision)
    read = [NetworkFile.read(path, strength) for path, strength in networks]
    _check_kinds(read, rule)
    terms: dict[str, list[tuple[float, Delta]]] = {}
    for network in read:
        for name, delta in network.deltas.items():
            terms.setdefault(name, []).append((network.strength, delta))
            if delta.shape != terms[name][0][1].shape:
                raise UserError(
                    f"{network.path} and {read[0].path} do not fit each other: {name} is made for "
                    f"{list(delta.shape)} in one and {list(terms[name][0][1].shape)} in the other"
                )
    deltas, losses = {}, []
    with ItemProgress("combined", len(terms), "modules", say) as progress:
        for name, own in terms.items():
            deltas[name], loss = _combined(name, own, rule, dtype, device)
            losses.append(loss)
            progress.advance(1)
    write_network(output, deltas, _metadata(read, Path(output).stem), read[0].writable)
    return losses


def _check_kinds(networks: Sequence[NetworkFile], rule: RankRule | None) -> None:
    for network in networks:
        if DORA in network.titles:
            raise UserError(
                f"{network.path} is a DoRA: what it adds depends on the weights; merge it into a "
                "checkpoint (anima-fast merge CHECKPOINT --lora ...)"
            )
        others = sorted(network.titles - {LORA.title})
        if others and rule is None:
            raise UserError(
                f"{network.path} is a {others[0]}, whose sum with others has no small form: give "
                "--rank (or --energy) for the closest LoRA"
            )


@torch.no_grad()
def _combined(
    name: str,
    terms: Sequence[tuple[float, Delta]],
    rule: RankRule | None,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> tuple[LoRADelta, ModuleLoss]:
    """The weighted sum of one module's Δ, with alpha = rank."""
    terms = [(strength * delta.scale, delta) for strength, delta in terms]
    dtypes = [tensor.dtype for _, delta in terms for tensor in delta.matrices().values()]
    dtype = dtype or reduce(torch.promote_types, dtypes)
    matrix = weighted_sum(terms, device)
    loras = [(factor, delta) for factor, delta in terms if isinstance(delta, LoRADelta)]
    exact = sum(delta.rank for _, delta in loras) if len(loras) == len(terms) else None
    if rule is None:
        up, down = _concatenated(loras)
    else:
        spectrum = matrix.spectrum()
        rank = rule.choose(spectrum.values)
        keeps_all = exact is not None and rank >= exact
        up, down = _concatenated(loras) if keeps_all else spectrum.cut(rank)
    combined = LoRADelta(down, up, alpha=full_alpha(len(down)))
    return rounded(name, matrix, combined, dtype, exact)


def _concatenated(terms: Sequence[tuple[float, LoRADelta]]) -> tuple[torch.Tensor, torch.Tensor]:
    """up [out, ΣR] and down [ΣR, in], float64; the factors go into up, which rounds once."""
    ups = [delta.up.double() * factor for factor, delta in terms]
    return torch.cat(ups, 1), torch.cat([delta.down.double() for _, delta in terms])


def _metadata(networks: Sequence[NetworkFile], name: str) -> dict[str, str]:
    told = ", ".join(f"{network.path.name} at {network.strength:g}" for network in networks)
    metadata = new_metadata(
        name,
        f"merged by anima_fast from {told}",
        merged_from=", ".join(network.path.stem for network in networks),
    )
    return {**metadata, MERGED: json.dumps(entries(networks), ensure_ascii=False)}
