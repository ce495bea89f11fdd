"""Which block of one DiT is which block of a deeper or shallower one.

The 40-block model (Anima-2.9B) was made from the 28-block one by copying twelve blocks to the
places below, and the 52-block model (Anima-3.8B) from that one in the same way (as LLaMA-Pro does:
a copy starts with output projections of zero, so it adds nothing until it is trained). The numbers
are those of Anima-2.9B's `expand_manifest.json` and of the metadata of Anima-3.8B's checkpoint.

Other depths are matched evenly: block i of N goes to round(i · (M − 1) / (N − 1)) of M.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from anima_fast.errors import UserError

# Inserted block -> the block before the insertion that it was copied from.
EXPANSIONS: dict[tuple[int, int], dict[int, int]] = {
    (28, 40): {2: 1, 5: 3, 8: 5, 11: 7, 14: 9, 17: 11, 21: 14, 24: 16, 27: 18, 30: 20, 33: 22,
               36: 24},
    (40, 52): {3: 2, 7: 5, 11: 8, 15: 11, 19: 14, 23: 17, 27: 20, 31: 23, 35: 26, 39: 29, 43: 32,
               47: 35},
}  # fmt: skip
# The depths of published models.
DEPTHS = (28, 40, 52)
# More is a typing mistake.
MOST_BLOCKS = 1000
PAIR = re.compile(r"(\d+)=(\d+)(?:\*(-?[\d.]+))?")


@dataclass(frozen=True)
class BlockMap:
    """What each block of the target receives.

    Attributes:
        source, target: numbers of blocks.
        same: {block of the target: the block of the source that it is}.
        copies: {block of the target: the block of the source that it was copied from}.
        strengths: factors on the Δ of blocks of the target.
        origin: where the map comes from, for people.
    """

    source: int
    target: int
    same: Mapping[int, int]
    copies: Mapping[int, int]
    strengths: Mapping[int, float]
    origin: str

    @property
    def dropped(self) -> list[int]:
        """Blocks of the source that have no counterpart in the target."""
        return sorted(set(range(self.source)) - set(self.same.values()))

    def pairs(self, duplicate: float) -> dict[int, tuple[int, float]]:
        """{block of the target: (block of the source, strength)}, copies at `duplicate`."""
        copied = {t: (s, duplicate) for t, s in self.copies.items()} if duplicate else {}
        return copied | {t: (s, self.strengths.get(t, 1.0)) for t, s in self.same.items()}


def known_map(source: int, target: int) -> BlockMap:
    """The map between two depths: the published one if there is one, otherwise an even one."""
    if source > target:
        grown = known_map(target, source)
        same = {small: large for large, small in grown.same.items()}
        return BlockMap(source, target, same, {}, {}, grown.origin)
    if source in DEPTHS and target in DEPTHS:
        origins, same = _published(source, target)
        copies = {block: origin for block, origin in origins.items() if block not in same}
        return BlockMap(source, target, same, copies, {}, "published insertions")
    same = {round(i * (target - 1) / max(1, source - 1)): i for i in range(source)}
    copies, last = {}, 0
    for block in range(target):
        last = same.get(block, last)
        if block not in same:
            copies[block] = last
    return BlockMap(source, target, same, copies, {}, "even spacing, not a published one")


def _published(source: int, target: int) -> tuple[dict[int, int], dict[int, int]]:
    """{block: the source's block that it is or was copied from}, and only those that it is."""
    origins = same = {block: block for block in range(source)}
    for i in range(DEPTHS.index(source), DEPTHS.index(target)):
        inserted = EXPANSIONS[DEPTHS[i], DEPTHS[i + 1]]
        kept = [block for block in range(DEPTHS[i + 1]) if block not in inserted]
        # The position of each block of the shallower model in the deeper one.
        moved = dict(enumerate(kept))
        origins = {moved[b]: o for b, o in origins.items()} | {
            block: origins[copied] for block, copied in inserted.items()
        }
        same = {moved[b]: o for b, o in same.items()}
    return origins, same


def given_map(text: str, source: int, target: int | None) -> BlockMap:
    """The map of --map: pairs TARGET=SOURCE or TARGET=SOURCE*STRENGTH, or a file.

    A file holds such pairs, one per line or separated by commas, or an expansion manifest (JSON
    with old_block_count, new_block_count and inserted_to_source). Raises `UserError` for anything
    else and for blocks that do not exist.
    """
    path = Path(text)
    if not PAIR.match(text):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            raise UserError(
                f"--map {path}: expected pairs such as 0=0,1=1,3=2*0.5 (target=source*strength) "
                "or the path of a file with them"
            ) from None
        if text.lstrip().startswith("{"):
            return _manifest_map(path, text, source)
    same, strengths = {}, {}
    for word in re.split(r"[,\s]+", text.strip()):
        match = PAIR.fullmatch(word)
        if not match:
            raise UserError(
                f"--map: {word!r} is not a pair TARGET=SOURCE or TARGET=SOURCE*STRENGTH"
            )
        block, origin = int(match[1]), int(match[2])
        if block in same:
            raise UserError(f"--map: block {block} of the target is given twice")
        same[block] = origin
        if match[3]:
            strengths[block] = _strength(word, match[3])
    return _checked(BlockMap(source, target or max(same) + 1, same, {}, strengths, "--map"))


def _strength(word: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--map: {word!r}: {text!r} is not a number") from None


def _manifest_map(path: Path, text: str, source: int) -> BlockMap:
    try:
        found = json.loads(text)
        old, new = int(found["old_block_count"]), int(found["new_block_count"])
        copies = {int(block): int(origin) for block, origin in found["inserted_to_source"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"--map {path} is not an expansion manifest: expected old_block_count, new_block_count "
            f"and inserted_to_source ({error})"
        ) from None
    kept = [block for block in range(new) if block not in copies]
    if len(kept) != old or source not in (old, new):
        raise UserError(
            f"--map {path} leads from {old} to {new} blocks with {len(copies)} inserted; this "
            f"network has {source} blocks"
        )
    same = dict(zip(kept, range(old), strict=True))
    if source == old:
        return _checked(BlockMap(old, new, same, copies, {}, str(path)))
    return BlockMap(new, old, {small: large for large, small in same.items()}, {}, {}, str(path))


def _checked(found: BlockMap) -> BlockMap:
    if found.target > MOST_BLOCKS:
        raise UserError(f"--map: block {found.target - 1}: use numbers below {MOST_BLOCKS}")
    sources = {**found.copies, **found.same}
    bad = [t for t in sources if t >= found.target]
    if bad:
        raise UserError(f"--map: there is no block {bad[0]} in a target of {found.target} blocks")
    bad = [s for s in sources.values() if s >= found.source]
    if bad:
        raise UserError(f"--map: there is no block {bad[0]} in a network of {found.source} blocks")
    return found
