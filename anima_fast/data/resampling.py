"""Resizing of 8-bit pixels.

The default follows sd-scripts: area averaging when both sides shrink or stay, Lanczos otherwise.
Area averaging is done here exactly: every output pixel is the mean of the input rectangle that it
covers, with fractional weights at the border (OpenCV's INTER_AREA; Pillow's BOX filter takes whole
pixels only and differs when the ratio is not an integer). All other filters are Pillow's; its
bilinear and bicubic filters widen with the scale when shrinking, so they do not alias as OpenCV's
do and differ from those in the last bits.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

_FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "linear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "cubic": Image.Resampling.BICUBIC,
}


def resize(
    pixels: np.ndarray, size: tuple[int, int], interpolation: str | None = None
) -> np.ndarray:
    """Resize [h, w] or [h, w, 3] uint8 to (width, height); `pixels` itself when that is its size.

    `interpolation` is a value of `resize_interpolation`, None for the default rule.
    """
    height, width = pixels.shape[:2]
    if (width, height) == tuple(size):
        return pixels
    is_shrinking = size[0] <= width and size[1] <= height
    name = interpolation or ("area" if is_shrinking else "lanczos")
    if name == "area":
        # Area averaging has no meaning where an output pixel is smaller than an input pixel.
        if is_shrinking:
            return area_average(pixels, size)
        name = "bilinear"
    return np.asarray(Image.fromarray(pixels).resize(size, _FILTERS[name]))


def area_average(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Shrink by exact area averaging; shapes as in `resize`, rounding half to even."""
    rows = _shrink_rows(pixels.astype(np.float32), size[1])
    columns = _shrink_rows(rows.swapaxes(0, 1), size[0])
    return np.rint(columns.swapaxes(0, 1)).clip(0, 255).astype(np.uint8)


def _shrink_rows(x: np.ndarray, count: int) -> np.ndarray:
    """Average the rows of x [n, ...] float32 down to [count, ...]."""
    n = x.shape[0]
    if n == count:
        return x
    start = np.arange(count) * (n / count)
    end = np.minimum(start + n / count, n)
    first = np.floor(start).astype(int)
    out = np.zeros((count, *x.shape[1:]), np.float32)
    for tap in range(math.ceil(n / count) + 1):
        row = first + tap
        weight = np.clip(np.minimum(end, row + 1) - np.maximum(start, row), 0, None) * (count / n)
        shaped = weight.astype(np.float32).reshape(-1, *[1] * (x.ndim - 1))
        out += shaped * x[np.minimum(row, n - 1)]
    return out
