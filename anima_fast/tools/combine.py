"""Several networks as one LoRA file: `anima-fast merge` without a checkpoint.

The sum s₁Δ₁ + s₂Δ₂ of LoRA is a LoRA of the sum of their ranks: the matrices stand side by side,
each scaled by its strength and alpha / rank, and alpha is the new rank. With `rank` the sum is
replaced by its best approximation of that rank, which is also the only way for LoHa and LoKr. What
DoRA adds depends on the weight it is for, so it can only be merged into a checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path

import torch

from anima_fast.adapters.names import DIALECTS
from anima_fast.adapters.parts import LoRAPart, Part
from anima_fast.errors import UserError
from anima_fast.progress import ItemProgress
from anima_fast.tools.convert import check_output
from anima_fast.tools.low_rank import weighted_sum
from anima_fast.tools.merge import MERGED, entries
from anima_fast.tools.networks import (
    Network,
    dtype_of,
    new_metadata,
    write_network,
)
from anima_fast.tools.ranks import RankRule
from anima_fast.tools.report import Loss


def combine_networks(
    networks: Sequence[tuple[str | os.PathLike, float]],
    output: str | os.PathLike,
    *,
    rule: RankRule | None = None,
    precision: str | None = None,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> list[Loss]:
    """Write the weighted sum of networks as one LoRA, in the dialect of the first.

    Args:
        networks: (file, strength).
        output: file, replaced atomically.
        rule: chooses each module's rank; None keeps all of it, which takes plain LoRA.
        precision: fp32, fp16 or bf16; None is the widest dtype of the inputs.
        device: where the decompositions run, in float64.
        say: gets lines of progress.

    Returns:
        What each module lost, the rounding of the new matrices included.

    Raises:
        UserError: files that are none or fit none of the others, DoRA, LoHa or LoKr without a
            rule, or a path that cannot be written.
    """
    check_output(output, [path for path, _ in networks])
    dtype = dtype_of(precision)
    read = [Network.read(path, strength) for path, strength in networks]
    _check_kinds(read, rule)
    terms: dict[str, list[tuple[float, Part]]] = {}
    for network in read:
        for name, part in network.parts.items():
            terms.setdefault(name, []).append((network.strength, part))
            if part.shape != terms[name][0][1].shape:
                raise UserError(
                    f"{network.path} and {read[0].path} do not fit each other: {name} is made for "
                    f"{list(part.shape)} in one and {list(terms[name][0][1].shape)} in the other"
                )
    parts, losses = {}, []
    with ItemProgress("combined", len(terms), "modules", say) as progress:
        for name, own in terms.items():
            parts[name], loss = _combined(name, own, rule, dtype, device)
            losses.append(loss)
            progress.advance(1)
    dialect = read[0].dialect if read[0].dialect in DIALECTS else "kohya"
    write_network(output, parts, _metadata(read, Path(output).stem), dialect)
    return losses


def _check_kinds(networks: Sequence[Network], rule: RankRule | None) -> None:
    for network in networks:
        if "DoRA" in network.kinds:
            raise UserError(
                f"{network.path} is a DoRA: what it adds depends on the weights; merge it into a "
                "checkpoint (anima-fast merge CHECKPOINT --lora ...)"
            )
        others = sorted(network.kinds - {"LoRA"})
        if others and rule is None:
            raise UserError(
                f"{network.path} is a {others[0]}, whose sum with others has no small form: give "
                "--rank (or --energy) for the closest LoRA"
            )


@torch.no_grad()
def _combined(
    name: str,
    terms: Sequence[tuple[float, Part]],
    rule: RankRule | None,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> tuple[Part, Loss]:
    """The sum of one module's parts, with alpha = rank."""
    terms = [(strength * part.scale, part) for strength, part in terms]
    dtypes = [tensor.dtype for _, part in terms for tensor in part.matrices().values()]
    dtype = dtype or reduce(torch.promote_types, dtypes)
    matrix = weighted_sum(terms, device)
    ranks = [part.rank for _, part in terms if part.kind == "lora"]
    whole = sum(ranks) if len(ranks) == len(terms) else None
    rank = whole
    if rule is not None:
        spectrum = matrix.spectrum()
        rank = rule.choose(spectrum.values)
    if rule is None or (whole is not None and rank >= whole):
        up, down = _side_by_side(terms)
    else:
        up, down = spectrum.cut(rank)
    up, down = (t.to("cpu", dtype).contiguous() for t in (up, down))
    lost = matrix.distance(up.to(device), down.to(device))
    part = LoRAPart(down, up, torch.tensor(float(len(down))))
    return part, Loss(name, matrix.norm(), lost, len(down), whole)


def _side_by_side(terms: Sequence[tuple[float, Part]]) -> tuple[torch.Tensor, torch.Tensor]:
    """up [out, ΣR] and down [ΣR, in], float64; the factors go into up, which rounds once."""
    ups = [part.up.double() * factor for factor, part in terms]
    return torch.cat(ups, 1), torch.cat([part.down.double() for _, part in terms])


def _metadata(networks: Sequence[Network], name: str) -> dict[str, str]:
    told = ", ".join(f"{network.path.name} at {network.strength:g}" for network in networks)
    metadata = new_metadata(
        name,
        f"merged by anima_fast from {told}",
        merged_from=", ".join(network.path.stem for network in networks),
    )
    return {**metadata, MERGED: json.dumps(entries(networks), ensure_ascii=False)}
