"""A network of lower rank: `anima-fast resize`.

Each module's Δ is replaced by its best approximation of the new rank. The scale alpha / rank of a
LoRA stays what it was, so alpha changes with the rank; a module whose rank does not fall is written
as it is. LoHa and LoKr become plain LoRA with alpha = rank. Magnitudes of a DoRA stay.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from anima_fast.adapters.parts import LoRAPart, Part
from anima_fast.errors import UserError
from anima_fast.progress import ItemProgress
from anima_fast.tools.convert import check_output
from anima_fast.tools.low_rank import weighted_sum
from anima_fast.tools.networks import Network, dtype_of, module_key, with_comment
from anima_fast.tools.ranks import RankRule
from anima_fast.tools.report import Loss


def resize_file(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    rule: RankRule,
    *,
    precision: str | None = None,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> list[Loss]:
    """Write a network of lower rank in the dialect of the old one.

    Args:
        src, dst: files; `dst` is replaced atomically.
        rule: chooses each module's rank.
        precision: fp32, fp16 or bf16; None keeps the dtype of the file.
        device: where the decompositions run, in float64.
        say: gets lines of progress.

    Returns:
        What each module lost, the rounding of the new matrices included.

    Raises:
        UserError: no network of this model, a rank that is not below its own, or a bad path.
    """
    check_output(dst, [src])
    dtype_of(precision)
    network = Network.read(src)
    _check_rank(network, rule)
    parts, losses = {}, []
    with ItemProgress("resized", len(network.parts), "modules", say) as progress:
        for name, part in network.parts.items():
            parts[name], loss = resize_part(name, part, rule, precision, device)
            losses.append(loss)
            progress.advance(1)
    metadata = with_comment(network.metadata, f"resized by anima_fast to {rule}")
    if any(part.kind != "lora" for part in network.parts.values()):
        metadata |= module_key(parts) | {"ss_network_args": "{}"}
    network.write(dst, parts, metadata, precision)
    return losses


def resize_part(
    name: str,
    part: Part,
    rule: RankRule,
    precision: str | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Part, Loss]:
    """One module at the rank that a rule chooses, and what it lost."""
    matrix = weighted_sum([(part.scale, part)], device)
    norm, spectrum = matrix.norm(), matrix.spectrum()
    rank = rule.choose(spectrum.values)
    if part.kind == "lora" and rank >= part.rank:
        return part, Loss(name, norm, 0.0, part.rank, part.rank)
    up, down = spectrum.cut(rank)
    alpha, scale = part.alpha, 1.0
    if alpha is not None:
        alpha = torch.full_like(alpha, rank * (part.scale if part.kind == "lora" else 1.0))
        # Read back: an alpha of few bits cannot hold every product of rank and scale.
        scale = alpha.item() / rank or 1.0
    root = abs(scale) ** 0.5
    dtype = dtype_of(precision) or next(iter(part.matrices().values())).dtype
    up, down = (t.to("cpu", dtype).contiguous() for t in (up * root / scale, down / root))
    lost = matrix.distance(scale * up.to(device).double(), down.to(device))
    return LoRAPart(down, up, alpha, part.dora_scale), Loss(name, norm, lost, rank, part.rank)


def _check_rank(network: Network, rule: RankRule) -> None:
    """Refuse a fixed rank that no module would be reduced to."""
    parts = network.parts.values()
    if rule.method is not None or any(part.kind != "lora" for part in parts):
        return
    highest = max(part.rank for part in parts)
    if rule.rank >= highest:
        raise UserError(
            f"{network.path} has rank {highest} already: give a --rank below it (a higher one "
            "would add nothing but size)"
        )
