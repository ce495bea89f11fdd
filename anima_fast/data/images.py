"""Image files to pixels: headers, decoding, resizing, cropping, masks, colour augmentation.

Only Pillow decodes. An RGBA image loses its alpha without compositing and EXIF rotation is not
applied unless the subset asks for it: both as sd-scripts does, so that buckets and caches agree
with it. The first frame of an animation counts. All functions are safe to call from threads;
nothing is kept between calls.

`flip_aug` is not applied here: mirrored latents are encoded next to the plain ones, by flipping the
pixels along their last axis.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from anima_fast.data.items import ImageItem
from anima_fast.data.resampling import resize
from anima_fast.errors import UserError

MAX_PIXELS = 200_000_000
# Pillow warns above this number and refuses above twice that. The check in `opened` refuses from
# the number on, which makes the warning a duplicate.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.simplefilter("ignore", Image.DecompressionBombWarning)

_ORIENTATION = 0x0112
_FACE_BOX = re.compile(r"_(\d{1,6})_(\d{1,6})_(\d{1,6})_(\d{1,6})$", re.ASCII)
# Hue of ±8 steps where the circle has 180, on Pillow's circle of 256.
_HUE_STEPS = 8 * 256 / 180


class ImageError(UserError):
    """An image that cannot be used; `reason` says why without naming it."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Header:
    """What the header of an image says: (width, height), EXIF's number of the rotation, alpha."""

    size: tuple[int, int]
    orientation: int = 1
    has_alpha: bool = False

    @property
    def exif_rotated(self) -> bool:
        """Whether EXIF asks for a rotation or a reflection."""
        return 2 <= self.orientation <= 8

    @property
    def upright_size(self) -> tuple[int, int]:
        """(width, height) after that rotation."""
        return self.size[::-1] if 5 <= self.orientation <= 8 else self.size


def read_header(path: str | os.PathLike) -> Header:
    """Size and EXIF rotation, without decoding the pixels.

    Raises `UserError` for a file that is no image or damaged, empty or above 200 megapixels.
    """
    with opened(path) as image:
        return Header(image.size, _orientation(image), has_alpha(image))


def _orientation(image: Image.Image) -> int:
    # Looking further would decode a whole PNG; a damaged EXIF block rotates nothing.
    if "exif" in image.info:
        with contextlib.suppress(Exception):
            return int(image.getexif().get(_ORIENTATION, 1))
    return 1


def upright(image: Image.Image) -> Image.Image:
    """A decoded image turned as its EXIF data says."""
    return ImageOps.exif_transpose(image) if 2 <= _orientation(image) <= 8 else image


def read_image(
    path: str | os.PathLike, mode: str = "RGB", *, exif_rotation: bool = False
) -> np.ndarray:
    """Decode an image (8 or 16 bit, grey, palette, CMYK ...) to [h, w, 3] or [h, w, 4] uint8.

    `mode` is "RGB", or "RGBA" with alpha 255 where the file has none. Raises `UserError` as
    `read_header`, and for a file that is cut off or damaged.
    """
    if mode not in ("RGB", "RGBA"):
        raise ValueError(f"mode is {mode!r}, expected 'RGB' or 'RGBA'")
    with opened(path) as image:
        image.load()
        image = upright(image) if exif_rotation else image
        return np.asarray(to_8bit(image).convert(mode))


def to_8bit(image: Image.Image) -> Image.Image:
    """A decoded image in a mode from which Pillow converts to RGB and RGBA without a loss."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_8bit(np.asarray(image)))
    if image.mode in ("RGBa", "La") or (image.mode == "P" and "transparency" in image.info):
        return image.convert("RGBA")
    return image


def has_alpha(image: Image.Image) -> bool:
    """Whether an image stores transparency: as a channel, or for some colours of its palette."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def load_item(
    item: ImageItem, *, crop_rng: random.Random | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """The pixels of an item, resized and cropped to its bucket.

    Args:
        crop_rng: turns on what the subset asks for among random crop, face crop and colour
            augmentation. None crops the centre. A generator in the same state makes `load_mask`
            cut the same rectangle.
    Returns:
        pixels [3, h, w] float32 in [-1, 1], and alpha [h, w] float32 0..1 when the subset has
        `alpha_mask` (1 where the file has no alpha), else None. Errors as `read_image`.
    """
    has_alpha = item.subset.alpha_mask
    mode, turned = "RGBA" if has_alpha else "RGB", item.subset.exif_rotation
    pixels = read_image(item.path, mode, exif_rotation=turned)
    cut = _plan_cut(item, crop_rng)
    rgb = cut.apply(np.ascontiguousarray(pixels[..., :3]), item)
    if crop_rng is not None and item.subset.color_aug:
        rgb = augment_color(rgb, crop_rng)
    alpha = None
    if has_alpha:
        alpha = cut.apply(np.ascontiguousarray(pixels[..., 3]), item) / np.float32(255)
    return rgb.transpose(2, 0, 1).astype(np.float32) / np.float32(127.5) - 1, alpha


def load_mask(item: ImageItem, *, crop_rng: random.Random | None = None) -> np.ndarray | None:
    """The red channel of the item's mask file, cut as its pixels are: [h, w] float32 0..1."""
    if item.mask_path is None:
        return None
    turned = item.subset.exif_rotation
    red = np.ascontiguousarray(read_image(item.mask_path, exif_rotation=turned)[..., 0])
    # A mask may be stored smaller than its image; a face box counts in the image's pixels.
    red = resize(red, item.size, "bilinear")
    return _plan_cut(item, crop_rng).apply(red, item) / np.float32(255)


def augment_color(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """Of [h, w, 3] uint8: in a third of the cases another hue (±8 of 180) or gamma (0.95..1.05)."""
    if rng.random() >= 1 / 3:
        return pixels
    if rng.random() < 0.5:
        hue, *rest = Image.fromarray(pixels).convert("HSV").split()
        shift = np.uint8(round(rng.uniform(-_HUE_STEPS, _HUE_STEPS)) % 256)
        shifted = Image.fromarray(np.asarray(hue) + shift)
        return np.asarray(Image.merge("HSV", (shifted, *rest)).convert("RGB"))
    table = 255 * (np.arange(256) / 255) ** rng.uniform(0.95, 1.05)
    return np.rint(table).astype(np.uint8)[pixels]


def face_box(stem: str) -> tuple[int, int, int, int] | None:
    """Centre x, centre y, width, height of a face, from a stem that ends in `_cx_cy_w_h`."""
    match = _FACE_BOX.search(stem)
    if match is None:
        return None
    x, y, width, height = (int(group) for group in match.groups())
    return (x, y, width, height) if width > 0 and height > 0 else None


@dataclass(frozen=True)
class _Cut:
    """Crop the source (when there is a box), resize to `resized`, cut the bucket at left, top."""

    box: tuple[int, int, int, int] | None
    resized: tuple[int, int]
    left: int
    top: int

    def apply(self, pixels: np.ndarray, item: ImageItem) -> np.ndarray:
        if self.box is not None:
            left, top, right, bottom = self.box
            pixels = np.ascontiguousarray(pixels[top:bottom, left:right])
        pixels = resize(pixels, self.resized, item.subset.resize_interpolation)
        width, height = item.bucket
        return pixels[self.top : self.top + height, self.left : self.left + width]


def _plan_cut(item: ImageItem, rng: random.Random | None) -> _Cut:
    subset, scales = item.subset, item.subset.face_crop_aug_range
    face = face_box(item.path.stem)
    if rng is not None and scales and face is not None:
        box = _face_crop(item.size, item.bucket, face, rng.uniform(*scales))
        return _Cut(box, item.bucket, 0, 0)
    spare_x, spare_y = (item.resized[i] - item.bucket[i] for i in (0, 1))
    if rng is not None and subset.random_crop:
        return _Cut(None, item.resized, rng.randint(0, spare_x), rng.randint(0, spare_y))
    return _Cut(None, item.resized, spare_x // 2, spare_y // 2)


def _face_crop(
    size: tuple[int, int], bucket: tuple[int, int], face: tuple[int, int, int, int], factor: float
) -> tuple[int, int, int, int]:
    """The rectangle of the bucket's aspect whose shorter side is `factor` times the face.

    It stays inside the image and is not smaller than the bucket where the image allows that.
    """
    largest = min(size[0] / bucket[0], size[1] / bucket[1])
    wanted = factor * max(face[2:]) / min(bucket)
    scale = min(max(wanted, 1.0), largest)
    box = []
    for i in (0, 1):
        length = min(max(round(bucket[i] * scale), 1), size[i])
        start = min(max(round(face[i] - length / 2), 0), size[i] - length)
        box.append((start, start + length))
    return box[0][0], box[1][0], box[0][1], box[1][1]


def _to_8bit(values: np.ndarray) -> np.ndarray:
    """Grey values of more than 8 bit to uint8: 16-bit integers, or floats of 0..1 or 0..255."""
    if values.dtype.kind == "f":
        values = np.nan_to_num(values)
        values = values * 255 if values.max(initial=0) <= 1 else values
    elif values.dtype != np.uint8 and values.max(initial=0) > 255:
        values = values / 257
    return np.rint(values).clip(0, 255).astype(np.uint8)


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    """An open image of a sane size; whatever fails inside becomes an `ImageError` with the name."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width < 1 or height < 1:
                size = f"{width}x{height} pixels"
                raise ImageError(f"{path}: the image is {size}: remove the file", f"it is {size}")
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except UserError:
        raise
    except FileNotFoundError:
        reason = "the file does not exist"
        raise ImageError(f"image {path} does not exist: check the path", reason) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        reason = f"more than {MAX_PIXELS // 1_000_000} megapixels"
        raise ImageError(f"image {path} has {reason}: scale it down or remove it", reason) from None
    # Pillow's decoders raise errors of almost any type on damaged files.
    except Exception as error:
        reason = _reason(path, error)
        raise ImageError(
            f"cannot read image {path} ({reason}): replace or remove the file", reason
        ) from error


def _reason(path: str | os.PathLike, error: Exception) -> str:
    with contextlib.suppress(OSError, ValueError):
        if os.path.getsize(path) == 0:
            return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image, or its header is damaged"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
