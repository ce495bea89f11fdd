"""A network for a DiT of another depth: `anima-fast remap`.

Only block numbers change; matrices, magnitudes and everything outside the DiT's blocks stay. Blocks
that the deeper model has in addition get nothing, since a copied block starts out as adding
nothing; with `duplicate` they get the Δ of the block that they were copied from, at that strength.
At strength 1 such a Δ acts twice, once in each of the two blocks.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import replace

import torch

from anima_fast.adapters.deltas import Delta
from anima_fast.errors import UserError
from anima_fast.models.dit_config import DitConfig
from anima_fast.tools.block_maps import DEPTHS, MOST_BLOCKS, BlockMap, given_map, known_map
from anima_fast.tools.checkpoints import ModelFile, model_of_module
from anima_fast.tools.networks import NetworkFile, check_output, with_comment

BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
REMAPPED = "anima_fast.remapped"


def remap_file(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    to: int | None = None,
    model: str | os.PathLike | None = None,
    source: int | None = None,
    mapping: str | None = None,
    duplicate: float = 0.0,
) -> list[str]:
    """Write a network for a DiT of another depth; returns what went where, in lines.

    Args:
        src, dst: files; `dst` is replaced atomically.
        to: number of blocks of the target.
        model: a checkpoint that has this number, and whose layers the modules must fit.
        source: number of blocks that the network is for; None infers it from the highest block.
        mapping: pairs or a file, see `given_map`; None is the published or an even map.
        duplicate: strength of Δ in blocks that were copied from another; 0 leaves them out.

    Raises `UserError` for nothing to change, blocks that do not exist, layers of another width,
    and a DoRA whose Δ would have to be scaled.
    """
    check_output(dst, [src] if model is None else [src, model])
    for option, blocks in (("--to", to), ("--from", source)):
        if blocks is not None and not 1 <= blocks <= MOST_BLOCKS:
            raise UserError(f"{option} {blocks}: use a number of blocks from 1 to {MOST_BLOCKS}")
    if not math.isfinite(duplicate):
        raise UserError(f"--duplicate {duplicate}: use a finite strength, such as 0.5")
    network = NetworkFile.read(src)
    target = None if model is None else ModelFile.open(model)
    to = _depth(target, to) if target is not None else to
    used_blocks = _blocks(network)
    depth = _source_depth(network, used_blocks, source)
    if mapping is not None:
        found = given_map(mapping, depth, to)
    elif to is None:
        raise UserError("give --to (a number of blocks), --model (a checkpoint) or --map")
    elif to == depth:
        raise UserError(f"{src} is for {depth} blocks already (--from says otherwise, if need be)")
    else:
        found = known_map(depth, to)
    if to is not None and found.target != to:
        raise UserError(f"--map leads to {found.target} blocks, not to {to}")
    deltas = _moved(network, found, duplicate)
    if target is not None:
        _check_fit(deltas, network, target)
    change = f"{found.source} to {found.target}"
    metadata = with_comment(network.metadata, f"remapped by anima_fast from {change} blocks")
    metadata[REMAPPED] = change
    network.write(dst, deltas, metadata)
    others = sum(BLOCK.fullmatch(name) is None for name in deltas)
    return [
        *_moves(found, used_blocks, duplicate),
        *([f"  unchanged: {others} modules outside the blocks of the DiT"] if others else []),
        f"wrote {dst}: {len(deltas)} modules",
    ]


def _depth(model: ModelFile, to: int | None) -> int:
    if "" not in model.prefixes:
        raise UserError(f"--model {model.checkpoint.name} holds no DiT: give a DiT file")
    blocks = DitConfig.from_shapes(model.named("").shapes).num_blocks
    if to is not None and to != blocks:
        raise UserError(f"--to {to}: {model.checkpoint.name} has {blocks} blocks")
    return blocks


def _blocks(network: NetworkFile) -> set[int]:
    found = {int(m[1]) for name in network.deltas if (m := BLOCK.fullmatch(name))}
    if not found:
        raise UserError(f"{network.path} has no module in a block of the DiT: nothing to remap")
    return found


def _source_depth(network: NetworkFile, blocks: set[int], given: int | None) -> int:
    """The depth that a network is for: as given, or the smallest published one that holds it."""
    needed = max(blocks) + 1
    if given is not None:
        if given < needed:
            raise UserError(f"--from {given}: {network.path} has a block {max(blocks)}")
        return given
    return next((depth for depth in DEPTHS if depth >= needed), needed)


def _moved(network: NetworkFile, found: BlockMap, duplicate: float) -> dict[str, Delta]:
    by_block: dict[int, dict[str, Delta]] = {}
    deltas = {}
    for name, delta in network.deltas.items():
        if match := BLOCK.fullmatch(name):
            by_block.setdefault(int(match[1]), {})[match[2]] = delta
        else:
            deltas[name] = delta
    for block, (origin, strength) in sorted(found.pairs(duplicate).items()):
        for layer, delta in by_block.get(origin, {}).items():
            if delta.dora_scale is not None and (strength != 1 or block in found.copies):
                raise UserError(
                    f"{network.path} is a DoRA, whose magnitudes belong to the weights of one "
                    f"block: block {block} can get no share of block {origin}"
                )
            scaled = delta if strength == 1 else delta.times(strength)
            deltas[f"blocks.{block}.{layer}"] = _copy(scaled)
    if not any(BLOCK.fullmatch(name) for name in deltas):
        raise UserError(
            f"none of the blocks of {network.path} is in the target: nothing would be left"
        )
    return deltas


def _copy(delta: Delta) -> Delta:
    """With its own tensors: a file holds no tensor twice, and one block may go to several."""
    alpha = None if delta.alpha is None else delta.alpha.clone()
    return replace(delta.map(torch.clone), alpha=alpha)


def _check_fit(deltas: dict[str, Delta], network: NetworkFile, target: ModelFile) -> None:
    for name, delta in deltas.items():
        if model_of_module(name) not in target.prefixes:
            continue
        key = target.key(name)
        shape = None if key is None else tuple(target.checkpoint.shapes[key])
        if shape != delta.shape:
            has = f"one of {list(shape)}" if shape else "none"
            raise UserError(
                f"{network.path} does not fit {target.checkpoint.name}: {name} is for a weight of "
                f"{list(delta.shape)}, the model has {has}"
            )


def _moves(found: BlockMap, blocks: set[int], duplicate: float) -> list[str]:
    """What became of the blocks of a network."""
    used = {t: s for t, s in sorted(found.same.items()) if s in blocks}
    copied = {t: s for t, s in sorted(found.copies.items()) if s in blocks and duplicate}
    lines = [
        f"{found.source} to {found.target} blocks ({found.origin}):",
        *(f"  {_become(run)}" for run in _runs(used.items())),
    ]
    if copied:
        told = ", ".join(f"{origin} to {block}" for block, origin in copied.items())
        lines.append(f"  copied at strength {duplicate:g}: blocks {told}")
    if empty := sorted(set(range(found.target)) - {*found.same, *copied}):
        lines.append(
            f"  nothing for blocks {_numbers(empty)}, which the network knows no block for"
        )
    if dropped := [block for block in found.dropped if block in blocks]:
        lines.append(f"  left out: blocks {_numbers(dropped)}, which the target does not have")
    return lines


def _runs(pairs: Iterable[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Pairs of numbers, those that rise together in one list."""
    runs: list[list[tuple[int, int]]] = []
    for one, other in pairs:
        if runs and runs[-1][-1] == (one - 1, other - 1):
            runs[-1].append((one, other))
        else:
            runs.append([(one, other)])
    return runs


def _become(run: list[tuple[int, int]]) -> str:
    """Blocks that move together: "blocks 2 to 4 become 3 to 5"."""
    (block, origin), (last, last_origin) = run[0], run[-1]
    if len(run) == 1:
        return f"block {origin} becomes {block}"
    return f"blocks {origin} to {last_origin} become {block} to {last}"


def _numbers(values: list[int]) -> str:
    """Rising numbers as text, runs of three and more as "4 to 9"."""
    words = []
    for run in _runs((value, value) for value in values):
        few = [str(value) for value, _ in run]
        words += few if len(few) < 3 else [f"{few[0]} to {few[-1]}"]
    return ", ".join(words)
