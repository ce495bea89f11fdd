"""Images that are the same, and images that look nearly the same.

Two images look alike when few bits of their difference hashes differ (the order of brightness
between neighbouring cells, which scaling, compression and small changes of tone do not change) and
their mean colours agree. Those of equal size are then compared exactly, pixel by pixel.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from anima_fast.data import images
from anima_fast.errors import UserError
from anima_fast.reports.dataset.pixels import Look

# Bits of 128 that may differ. Scaled, recompressed and slightly cropped copies of photographs
# differ in up to 15, different photographs in more than 30.
MOST_BITS = 16
# Mean difference of the colours of a 4x4 grid, of 255.
MOST_TINT = 18.0
# Rows of the distance matrix at a time, and pairs of similar images.
_ROWS, _PAIRS = 2048, 65536
_NO_PAIRS = np.zeros((0, 2), np.int32)


def find_duplicates(
    looks: Mapping[Path, Look], sizes: Mapping[Path, tuple[int, int]]
) -> tuple[list[list[Path]], list[list[Path]]]:
    """Groups of two or more images: with the same pixels, and that look nearly the same.

    looks: damaged images are left out. sizes: (width, height) of each file. Of images with the same
    pixels only the first appears in the second list.
    """
    known = {
        path: (look.signature, look.tint)
        for path, look in sorted(looks.items())
        if look.signature is not None and look.tint is not None
    }
    paths = list(known)
    pairs = _alike(*zip(*known.values(), strict=True)) if len(known) > 1 else _NO_PAIRS
    area = np.array([sizes[path] for path in paths]).reshape(-1, 2)
    alike = pairs[(area[pairs[:, 0]] == area[pairs[:, 1]]).all(1)]
    exact = _exact_groups([paths[i] for i in np.unique(alike)])
    # Of images with the same pixels the first represents all.
    place = {path: i for i, path in enumerate(paths)}
    first = np.arange(len(paths))
    for group in exact:
        first[[place[path] for path in group]] = place[group[0]]
    merged = np.unique(np.sort(first[pairs], 1), axis=0)
    near = merged[merged[:, 0] != merged[:, 1]].tolist()
    return exact, _groups([(paths[a], paths[b]) for a, b in near])


def _alike(signatures: Sequence[np.ndarray], tints: Sequence[np.ndarray]) -> np.ndarray:
    """Index pairs a < b of images that look alike: [N, 2]."""
    # With ±1 for bits, the number of equal minus different ones is a product.
    signs = np.stack(signatures).astype(np.float32) * 2 - 1
    colours = np.stack(tints)
    count, length = signs.shape
    found = [_NO_PAIRS]
    for start in range(0, count, _ROWS):
        distance = (length - signs[start : start + _ROWS] @ signs[start:].T) / 2
        near = np.argwhere(distance <= MOST_BITS).astype(np.int32)
        pairs = near[near[:, 0] < near[:, 1]] + np.int32(start)
        for some in (pairs[i : i + _PAIRS] for i in range(0, len(pairs), _PAIRS)):
            gaps = np.abs(colours[some[:, 0]] - colours[some[:, 1]]).mean((1, 2, 3))
            found.append(some[gaps <= MOST_TINT])
    return np.concatenate(found)


def _exact_groups(paths: Sequence[Path]) -> list[list[Path]]:
    """Files with the same pixels, of `paths` in order."""
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        contents = list(pool.map(_file_digest, paths))
        # Copies of a file need not be decoded to be known as the same.
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
    digest.update(np.ascontiguousarray(pixels).data)
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
