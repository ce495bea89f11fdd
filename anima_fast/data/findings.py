"""Problems that a plan shows without decoding a pixel."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

from anima_fast.data.problems import Problem

if TYPE_CHECKING:
    from anima_fast.data.caption_tokens import CaptionTokens
    from anima_fast.data.items import ImageItem

# Enlarged by more than this, an image is soft; a crop that removes more than this share is named.
MOST_SCALE, MOST_LOST = 1.25, 0.2


def scale(item: ImageItem) -> float:
    """The factor of an image's size when it is resized to its bucket."""
    return max(item.resized[i] / item.size[i] for i in (0, 1))


def lost(item: ImageItem) -> float:
    """The share of an image that the crop to its bucket removes."""
    return max(0.0, 1 - math.prod(item.bucket) / math.prod(item.resized))


def has_no_caption(item: ImageItem) -> bool:
    """Whether an image has neither a caption file nor an entry in a metadata file."""
    return item.caption.file is None and item.subset.metadata_file is None


def plan_problems(items: Iterable[ImageItem], tokens: CaptionTokens | None) -> list[Problem]:
    """What the images' headers and captions show, each file once per kind.

    Args:
        items: training and validation images.
        tokens: the captions' lengths, when they are known.
    """
    items = list(items)
    found: dict[tuple[str, str], Problem] = {}
    for problem in chain(
        *(_of_caption(item) for item in items),
        (
            Problem("rotated", str(item.path))
            for item in items
            if item.exif_rotated and not item.is_turned
        ),
        # The worst first.
        (_upscaled(item) for item in sorted(items, key=scale, reverse=True)),
        (_cropped(item) for item in sorted(items, key=lost, reverse=True)),
    ):
        if problem is not None:
            found.setdefault((problem.kind, problem.file), problem)
    if tokens is not None:
        for caption in tokens.long:
            cut = "" if tokens.whole else f", the last {caption.beyond} are lost"
            kind = "whole caption" if tokens.whole else "long caption"
            problem = Problem(kind, str(caption.file), f"{caption.tokens} tokens{cut}")
            found[problem.kind, problem.file] = problem
    return list(found.values())


def _of_caption(item: ImageItem) -> Iterator[Problem]:
    if item.caption.blank:
        yield Problem("empty caption", str(item.caption.file))
    elif has_no_caption(item) and item.subset.class_tokens is not None:
        yield Problem("class caption", str(item.path), f"trained as {item.subset.class_tokens!r}")
    if lines := item.caption.unused_lines(item.subset):
        what = "1 line is left out" if lines == 1 else f"{lines} lines are left out"
        yield Problem("further lines", str(item.caption.file or item.path), what)


def _upscaled(item: ImageItem) -> Problem | None:
    if (factor := scale(item)) <= MOST_SCALE:
        return None
    return Problem("upscaled", str(item.path), f"{_sizes(item)}: enlarged {factor:.1f}x")


def _cropped(item: ImageItem) -> Problem | None:
    if (share := lost(item)) <= MOST_LOST:
        return None
    return Problem("crop", str(item.path), f"{_sizes(item)}: {share:.0%} cut off")


def _sizes(item: ImageItem) -> str:
    (width, height), bucket = item.size, item.bucket
    return f"{width}x{height} to {bucket[0]}x{bucket[1]}"
