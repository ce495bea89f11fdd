"""What only the pixels of an image show: damage, transparency, colour mode, hashes, thumbnails.

JPEG files are decoded at a fraction of their size (libjpeg scales while decoding, still reading the
whole file), so thousands of photographs take seconds to minutes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from anima_fast.data import images

# Longest side of the image that hashes are computed from, and of a thumbnail.
_SMALL, THUMBNAIL = 256, 176
# dHash: this many comparisons along each axis, in both directions.
_SIDE = 8
# Alpha above this is opaque to the eye.
_OPAQUE = 250
_DEEP_MODES = ("I", "F")
_OTHER_COLOURS = {"CMYK": "CMYK", "LAB": "L*a*b*", "HSV": "HSV"}


@dataclass(frozen=True)
class Look:
    """One decoded image.

    damage: why it cannot be decoded, None when it can. colours: the name of a mode that is
    visibly changed by the conversion to 8-bit RGB, else None. transparent: the share of pixels that
    are not opaque. has_alpha: whether the file stores alpha at all. signature: bits of the
    difference hash [128] bool. tint: mean colours [4, 4, 3] float32. thumbnail: a JPEG file.
    """

    damage: str | None = None
    colours: str | None = None
    animated: bool = False
    has_alpha: bool = False
    transparent: float = 0.0
    signature: np.ndarray | None = None
    tint: np.ndarray | None = None
    thumbnail: bytes | None = None


def look_at(
    paths: Sequence[Path],
    *,
    thumbnails: bool = False,
    turned: Set[Path] = frozenset(),
    threads: int | None = None,
    on_done: Callable[[], None] = lambda: None,
) -> dict[Path, Look]:
    """Decode images in threads.

    Args:
        paths: each is read once.
        thumbnails: make them too.
        turned: images that training turns as their EXIF data says.
        threads: by default twice the processors, at most 16.
        on_done: called after each image, in the calling thread.
    """
    count = threads or min(16, 2 * (os.cpu_count() or 1))
    with ThreadPoolExecutor(count, "look") as pool:
        waiting = {
            pool.submit(look, path, thumbnail=thumbnails, turned=path in turned): path
            for path in paths
        }
        found = {}
        for future in as_completed(waiting):
            found[waiting[future]] = future.result()
            on_done()
    return found


def look(path: Path, *, thumbnail: bool = False, turned: bool = False) -> Look:
    """Decode one image; damage is returned, never raised."""
    try:
        with images.opened(path) as image:
            colours = _colours(image)
            # Phones store a second picture in a JPEG file; that is no animation.
            animated = bool(getattr(image, "is_animated", False)) and image.format != "MPO"
            image.draft(image.mode, (_SMALL, _SMALL))
            image.load()
            has_alpha, transparent = _alpha(image)
            small = _to_rgb(images.upright(image) if turned else image)
            small.thumbnail((_SMALL, _SMALL), Image.Resampling.BOX, reducing_gap=2.0)
    except images.ImageError as error:
        return Look(damage=error.reason)
    tint = np.asarray(small.resize((4, 4), Image.Resampling.BOX), np.float32)
    return Look(
        colours=colours,
        animated=animated,
        has_alpha=has_alpha,
        transparent=transparent,
        signature=difference_hash(small),
        tint=tint,
        thumbnail=_jpeg(small) if thumbnail else None,
    )


def difference_hash(image: Image.Image) -> np.ndarray:
    """[128] bool: whether brightness grows from cell to cell, along the rows and the columns."""
    grey = image.convert("L")
    across = np.asarray(grey.resize((_SIDE + 1, _SIDE), Image.Resampling.BOX), np.int16)
    down = np.asarray(grey.resize((_SIDE, _SIDE + 1), Image.Resampling.BOX), np.int16)
    parts = (across[:, 1:] > across[:, :-1], down[1:] > down[:-1])
    return np.concatenate([part.ravel() for part in parts])


def _colours(image: Image.Image) -> str | None:
    if image.mode.startswith(_DEEP_MODES):
        return "more than 8 bit" if image.mode != "F" else "floating point"
    return _OTHER_COLOURS.get(image.mode)


def _alpha(image: Image.Image) -> tuple[bool, float]:
    """Whether the file stores alpha, and the share of pixels that are not opaque."""
    if not images.has_alpha(image):
        return False, 0.0
    alpha = np.asarray(image.convert("RGBA").getchannel("A"))
    return True, float((alpha < _OPAQUE).mean())


def _to_rgb(image: Image.Image) -> Image.Image:
    """As training sees it: alpha dropped, not composited."""
    return images.to_8bit(image).convert("RGB")


def _jpeg(small: Image.Image) -> bytes:
    small = small.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=72, optimize=True)
    return file.getvalue()
