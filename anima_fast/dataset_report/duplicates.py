"""Images that are the same, and images that look nearly the same.

Two images look alike when few bits of their difference hashes differ (the order of brightness
between neighbouring cells, which scaling, compression and small changes of tone leave alone) and
their mean colours agree. Of those with equal size the decoded pixels are then compared exactly.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from anima_fast.data import images
from anima_fast.dataset_report.pixels import Look
from anima_fast.errors import UserError

# Bits of 128 that may differ. Scaled, recompressed and slightly cropped copies of photographs
# differ in up to 15, different photographs in more than 30.
MOST_BITS = 16
# Mean difference of the colours of a 4x4 grid, of 255.
MOST_TINT = 18.0
# Rows of the distance matrix at a time.
_ROWS = 2048


def find_duplicates(
    looks: Mapping[Path, Look], sizes: Mapping[Path, tuple[int, int]]
) -> tuple[list[list[Path]], list[list[Path]]]:
    """Groups of two or more: with the same pixels, and that look nearly the same.

    Args:
        looks: decoded images; damaged ones are left out.
        sizes: (width, height) of each file.
    Returns:
        (exact, near). Of images with the same pixels only the first appears in `near`.
    """
    paths = sorted(path for path, look in looks.items() if look.signature is not None)
    pairs = list(_alike([looks[path] for path in paths]))
    named = [(paths[a], paths[b]) for a, b in pairs]
    exact = _exact_groups([pair for pair in named if sizes[pair[0]] == sizes[pair[1]]])
    first = {path: group[0] for group in exact for path in group}
    merged = {tuple(sorted({first.get(p, p) for p in pair})) for pair in named}
    return exact, _groups([pair for pair in merged if len(pair) == 2])


def _alike(looks: Sequence[Look]) -> Iterator[tuple[int, int]]:
    """Index pairs a < b of images that look alike."""
    if len(looks) < 2:
        return
    bits = np.stack([look.signature for look in looks])
    # With ±1 for bits, the number of equal minus different ones is a product.
    signs = bits.astype(np.float32) * 2 - 1
    tints = np.stack([look.tint for look in looks])
    length = bits.shape[1]
    for start in range(0, len(looks), _ROWS):
        distance = (length - signs[start : start + _ROWS] @ signs[start:].T) / 2
        near = np.argwhere(distance <= MOST_BITS)
        for a, b in near[near[:, 0] < near[:, 1]] + start:
            if np.abs(tints[a] - tints[b]).mean() <= MOST_TINT:
                yield int(a), int(b)


def _exact_groups(pairs: Sequence[tuple[Path, Path]]) -> list[list[Path]]:
    paths = sorted({path for pair in pairs for path in pair})
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        contents = list(pool.map(_file_digest, paths))
        # Copies of a file need not be decoded to be told the same.
        distinct = dict(zip(contents, paths, strict=True))
        pixels = dict(zip(distinct, pool.map(_pixel_digest, distinct.values()), strict=True))
    groups: dict[bytes, list[Path]] = defaultdict(list)
    for path, content in zip(paths, contents, strict=True):
        groups[pixels[content]].append(path)
    return [group for group in groups.values() if len(group) > 1]


def _file_digest(path: Path) -> bytes:
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    except OSError:
        return str(path).encode("utf-8", "surrogateescape")


def _pixel_digest(path: Path) -> bytes:
    """Equal for files that decode to the same pixels."""
    try:
        pixels = images.read_image(path, "RGBA")
    except UserError:
        return str(path).encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(str(pixels.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels))
    return digest.digest()


def _groups(pairs: Sequence[tuple[Path, Path]]) -> list[list[Path]]:
    """Connected groups of pairs, each sorted."""
    parent: dict[Path, Path] = {}

    def root(path: Path) -> Path:
        while parent.setdefault(path, path) != path:
            path = parent[path]
        return path

    for a, b in pairs:
        parent[root(b)] = root(a)
    groups: dict[Path, list[Path]] = defaultdict(list)
    for path in sorted(parent):
        groups[root(path)].append(path)
    return sorted(groups.values())
