"""A LoRA from the difference of two checkpoints: `anima-fast extract`.

Each target layer's difference is replaced by its best approximation of the chosen rank, shared
evenly by the two matrices, with alpha = rank. What differs outside the targets (norms, biases,
layers that no pattern includes) cannot be in the LoRA and is reported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from anima_fast.adapters import names
from anima_fast.adapters.deltas import LoRADelta
from anima_fast.adapters.metadata import legacy_file_hash
from anima_fast.adapters.targets import find_targets
from anima_fast.errors import UserError
from anima_fast.files import cached_sha256
from anima_fast.models.checkpoint import Checkpoint, shape_problems
from anima_fast.models.dit import AnimaDiT
from anima_fast.models.dit_config import DitConfig
from anima_fast.models.llm_adapter import AdapterConfig, LLMAdapter
from anima_fast.progress import ItemProgress
from anima_fast.tools.checkpoints import MODELS, ModelFile, check_floats
from anima_fast.tools.low_rank import Dense
from anima_fast.tools.networks import check_output, dtype_of, new_metadata, write_network
from anima_fast.tools.ranks import ModuleLoss, RankRule, full_alpha, rounded


@dataclass
class Extracted:
    """What an extraction found.

    Attributes:
        losses: of the modules in the LoRA, the rounding of their matrices included.
        same: target modules that do not differ and are left out of the LoRA.
        outside: relative change, by dotted name, of tensors that differ and are in no target.
    """

    losses: list[ModuleLoss] = field(default_factory=list)
    same: int = 0
    outside: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def extract_lora(
    base: str | os.PathLike,
    tuned: str | os.PathLike,
    output: str | os.PathLike,
    rule: RankRule,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    llm_adapter: bool = False,
    dialect: str = "kohya",
    precision: str = "fp32",
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> Extracted:
    """Write the LoRA that turns one DiT into another, as nearly as its ranks allow.

    Args:
        base, tuned: DiT files, each with any prefix and dtype.
        output: file, replaced atomically.
        rule: chooses each module's rank.
        include, exclude: patterns over dotted names, as in training.
        llm_adapter: take the layers of the bundled LLM adapter too.
        dialect, precision: of the LoRA; fp32, fp16 or bf16.
        device: where the decompositions run, in float64.
        say: gets lines of progress.

    Raises `UserError` for files without a DiT, of different shapes or identical.
    """
    check_output(output, [base, tuned])
    dtype = dtype_of(precision)
    old, new = _open(base), _open(tuned)
    _check_same_shape(old, new)
    targets = _targets(old, new, include, exclude, llm_adapter)
    found, deltas = Extracted(), {}
    with ItemProgress("extracted", len(targets), "modules", say) as progress:
        for name in targets:
            difference = _difference(old, new, f"{name}.weight").to(device)
            if difference.any():
                deltas[name], loss = _closest(name, difference, rule, dtype)
                found.losses.append(loss)
            else:
                found.same += 1
            progress.advance(1)
    if not deltas:
        raise UserError(
            f"{tuned} and {base} do not differ in any target layer: there is nothing to extract"
        )
    found.outside = _outside(old, new, {f"{name}.weight" for name in targets})
    metadata = _metadata(Path(base), Path(tuned), Path(output).stem, rule)
    write_network(output, deltas, metadata, dialect)
    return found


def _open(path: str | os.PathLike) -> Checkpoint:
    """The DiT of a file, and its LLM adapter if there is one, under dotted names."""
    model = ModelFile.open(path)
    if "" not in model.prefixes:
        held = " and ".join(MODELS[name] for name in model.prefixes)
        raise UserError(f"{path} holds {held} but no DiT: give two DiT files")
    return model.named("", names.ADAPTER)


def _shapes(checkpoint: Checkpoint, adapter: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of the adapter's tensors, without prefix, or of all others."""
    mark = names.ADAPTER
    named = checkpoint.shapes.items()
    return {n.removeprefix(mark): tuple(s) for n, s in named if n.startswith(mark) == adapter}


def _check_same_shape(old: Checkpoint, new: Checkpoint) -> None:
    shapes = _shapes(old, False), _shapes(new, False)
    blocks = [DitConfig.from_shapes(found).num_blocks for found in shapes]
    problem = shape_problems(*shapes)
    if blocks[0] != blocks[1]:
        problem = f"{blocks[1]} blocks instead of {blocks[0]}"
    if problem:
        raise UserError(
            f"{new.name} is of another shape than {old.name}: {problem}; only checkpoints of one "
            "architecture can be compared"
        )


def _targets(
    old: Checkpoint,
    new: Checkpoint,
    include: Sequence[str],
    exclude: Sequence[str],
    llm_adapter: bool,
) -> list[str]:
    """Dotted names of the layers to take: those that training would adapt."""
    adapter = None
    with torch.device("meta"):
        dit = AnimaDiT(DitConfig.from_shapes(_shapes(old, False)))
        if llm_adapter:
            adapter = LLMAdapter(_adapter_config(old, new))
    targets = find_targets(dit, adapter, None, exclude=exclude, include=include)
    if not targets:
        raise UserError("no layer is left to extract: loosen --exclude")
    return [target.name for target in targets]


def _adapter_config(old: Checkpoint, new: Checkpoint) -> AdapterConfig:
    shapes = _shapes(old, True), _shapes(new, True)
    for checkpoint, found in zip((old, new), shapes, strict=True):
        if not found:
            raise UserError(
                f"{checkpoint.name} has no LLM adapter: leave --llm_adapter out, or give two "
                "files that have one"
            )
    if problems := shape_problems(*shapes):
        raise UserError(f"the LLM adapters of the two files differ in shape: {problems}")
    return AdapterConfig.from_shapes(shapes[0])


def _difference(old: Checkpoint, new: Checkpoint, name: str) -> Tensor:
    """new − old in float64."""
    for checkpoint in (old, new):
        check_floats(checkpoint, name)
    difference = new.get(name).double() - old.get(name).double()
    if not torch.isfinite(difference).all():
        raise UserError(
            f"{name} holds numbers that are not finite: {old.name} or {new.name} is damaged"
        )
    return difference


def _closest(
    name: str, difference: Tensor, rule: RankRule, dtype: torch.dtype | None
) -> tuple[LoRADelta, ModuleLoss]:
    """The LoRA that is closest to a difference at the rank that a rule chooses."""
    matrix = Dense(difference)
    spectrum = matrix.spectrum()
    rank = rule.choose(spectrum.values)
    up, down = spectrum.cut(rank)
    return rounded(name, matrix, LoRADelta(down, up, alpha=full_alpha(rank)), dtype)


def _outside(old: Checkpoint, new: Checkpoint, targets: Collection[str]) -> dict[str, float]:
    """Relative change of every other tensor that differs, the largest first."""
    changes = {}
    for name in old.shapes.keys() & new.shapes.keys() - targets:
        before, after = old.get(name), new.get(name)
        if before.shape == after.shape and not torch.equal(before.double(), after.double()):
            change = (after.double() - before.double()).norm()
            changes[name] = (change / before.double().norm().clamp_min(1e-30)).item()
    return dict(sorted(changes.items(), key=lambda item: -item[1]))


def _metadata(base: Path, tuned: Path, name: str, rule: RankRule) -> dict[str, str]:
    comment = f"extracted by anima_fast: {tuned.name} minus {base.name}, {rule}"
    return {
        **new_metadata(name, comment),
        "ss_sd_model_name": base.name,
        "ss_sd_model_hash": legacy_file_hash(base),
        "ss_new_sd_model_hash": cached_sha256(base),
    }
