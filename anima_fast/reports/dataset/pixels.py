"""What only the pixels of an image show: damage, transparency, colour mode, hashes, thumbnails.

JPEG files are decoded at a fraction of their size (libjpeg scales while decoding, still reading the
whole file), so thousands of photographs take seconds to minutes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from anima_fast.data import images
from anima_fast.data.problems import Problem
from anima_fast.data.transparency import alpha_problem

# Longest side of the image that hashes are computed from, and of a thumbnail.
_SMALL, THUMBNAIL = 256, 176
# dHash: this many comparisons along each axis, in both directions.
_SIDE = 8
# Called with what is being done, the number done and the number of all.
OnProgress = Callable[[str, int, int], None]
_DEEP_MODES = ("I", "F")
_OTHER_COLOURS = {"CMYK": "CMYK", "LAB": "L*a*b*", "HSV": "HSV"}


@dataclass(frozen=True)
class Look:
    """One decoded image; a damaged one has problems only.

    signature: bits of the difference hash [128] bool. tint: mean colours [4, 4, 3] float32.
    thumbnail: a JPEG file.
    """

    problems: Sequence[Problem] = ()
    signature: np.ndarray | None = None
    tint: np.ndarray | None = None
    thumbnail: bytes | None = None


def look_at(
    paths: Collection[Path],
    *,
    thumbnails: bool,
    turned: Set[Path],
    masked: Set[Path],
    on_progress: OnProgress,
) -> dict[Path, Look]:
    """Decode images in threads, each once; `thumbnails` makes small pictures of them too.

    turned: images that training turns as their EXIF data says. masked: images whose transparency is
    a loss mask. on_progress: called after each image, in the calling thread.
    """
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1)), "look") as pool:
        waiting = {
            path: pool.submit(
                look, path, thumbnail=thumbnails, turned=path in turned, masked=path in masked
            )
            for path in paths
        }
        for done, _ in enumerate(as_completed(waiting.values()), 1):
            on_progress("reading images", done, len(waiting))
    return {path: future.result() for path, future in waiting.items()}


def look(
    path: Path, *, thumbnail: bool = False, turned: bool = False, masked: bool = False
) -> Look:
    """Decode one image; damage is returned, never raised."""
    try:
        with images.opened(path) as image:
            image.draft(image.mode, (_SMALL, _SMALL))
            image.load()
            problems = list(_problems(image, str(path), masked))
            # As training sees it: alpha dropped, not composited.
            small = images.to_8bit(images.upright(image) if turned else image).convert("RGB")
            small.thumbnail((_SMALL, _SMALL), Image.Resampling.BOX, reducing_gap=2.0)
    except images.ImageError as error:
        return Look([Problem("unreadable", str(path), error.reason)])
    tint = np.asarray(small.resize((4, 4), Image.Resampling.BOX), np.float32)
    return Look(problems, difference_hash(small), tint, _jpeg(small) if thumbnail else None)


def difference_hash(image: Image.Image) -> np.ndarray:
    """[128] bool: whether brightness grows from cell to cell, along the rows and the columns."""
    grey = image.convert("L")
    across = np.asarray(grey.resize((_SIDE + 1, _SIDE), Image.Resampling.BOX), np.int16)
    down = np.asarray(grey.resize((_SIDE, _SIDE + 1), Image.Resampling.BOX), np.int16)
    parts = (across[:, 1:] > across[:, :-1], down[1:] > down[:-1])
    return np.concatenate([part.ravel() for part in parts])


def _problems(image: Image.Image, file: str, masked: bool) -> Iterator[Problem]:
    if alpha := alpha_problem(image, file, masked):
        yield alpha
    if image.mode == "F":
        yield Problem("colours", file, "floating point")
    elif image.mode.startswith(_DEEP_MODES):
        yield Problem("colours", file, "more than 8 bit")
    elif image.mode in _OTHER_COLOURS:
        yield Problem("colours", file, _OTHER_COLOURS[image.mode])
    # Phones store a second picture in a JPEG file; that is no animation.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        yield Problem("animated", file)


def _jpeg(small: Image.Image) -> bytes:
    small = small.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=72, optimize=True)
    return file.getvalue()
