"""Aspect-ratio buckets: which size an image is resized and cropped to.

Images of a batch must share one size. A bucket is such a size (width, height), a multiple of `step`
on both sides, with about the area of `resolution`; an image goes to the bucket of the nearest
aspect ratio, is scaled to cover it, and the surplus is cropped. With `no_upscale` an image keeps
its own aspect ratio, is only ever shrunk, and is cropped to multiples of `step`.

The list of buckets and every rounding equal those of sd-scripts, so that the same folder gives the
same batches and step counts there and here. All sizes are (width, height) in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from anima_fast.errors import UserError

Size = tuple[int, int]

# One token of the transformer is 16×16 pixels: 8 by the autoencoder, 2 by the patch.
TOKEN_PIXELS = 16


@dataclass(frozen=True)
class Placement:
    """Where an image goes: the size after resizing and the bucket cut out of it."""

    resized: Size
    bucket: Size


@dataclass(frozen=True)
class BucketRule:
    """The bucket settings of one dataset. `low` and `high` limit the sides of the bucket list."""

    resolution: Size
    enabled: bool = False
    low: int = 256
    high: int = 1024
    step: int = 64
    no_upscale: bool = False

    @cached_property
    def buckets(self) -> list[Size]:
        """The predefined list (one entry when buckets are off; empty with `no_upscale`)."""
        if not self.enabled:
            return [self.resolution]
        if self.no_upscale:
            return []
        return predefined_buckets(self.resolution, self.low, self.high, self.step)

    def place(self, size: Size) -> Placement:
        """The placement of an image of `size`.

        Raises `UserError` (without the file's name) when the image has no bucket.
        """
        if self.enabled and self.no_upscale:
            return place_no_upscale(size, self.resolution, self.step)
        if not self.enabled:
            return Placement(cover(size, self.resolution), self.resolution)
        return place(size, self.buckets)


def fit_defaults(values: dict, given: set[str], where: str) -> list[str]:
    """Let bucket limits that nobody set follow a resolution that they would exclude.

    Args:
        values: settings of a dataset by key; changed in place.
        given: the keys that the user set.
    Returns:
        A notice for each change.
    """
    small, large = min(values["resolution"]), max(values["resolution"])
    before = dict(values)
    if "bucket_reso_steps" not in given and values["bucket_reso_steps"] > small:
        values["bucket_reso_steps"] = small // TOKEN_PIXELS * TOKEN_PIXELS
    step = values["bucket_reso_steps"]
    if "min_bucket_reso" not in given and values["min_bucket_reso"] > small >= step:
        values["min_bucket_reso"] = small // step * step
    if "max_bucket_reso" not in given and values["max_bucket_reso"] < large:
        values["max_bucket_reso"] = -(-large // step) * step
    return [
        f"{where}: {name} {value} is used, as the default {before[name]} does not suit resolution "
        f"{values['resolution'][0]}x{values['resolution'][1]}"
        for name, value in values.items()
        if value != before[name]
    ]


def adjust_limits(
    resolution: Size, low: int, high: int, step: int, where: str
) -> tuple[int, int, list[str]]:
    """Round the limits outwards to multiples of `step` and check them against `resolution`.

    Returns:
        (low, high, notices), a notice for each limit that was changed.
    Raises:
        UserError: low above the smaller side of `resolution`, or high below the larger one.
    """
    notices = []
    rounded_low, rounded_high = max(low // step, 1) * step, -(-high // step) * step
    for name, old, new in (("min", low, rounded_low), ("max", high, rounded_high)):
        if old != new:
            notices.append(
                f"{where}: {name}_bucket_reso {old} is not a multiple of bucket_reso_steps {step}: "
                f"{new} is used"
            )
    if rounded_low > min(resolution):
        raise UserError(
            f"{where}: min_bucket_reso {rounded_low} is above the smaller side of resolution "
            f"{resolution[0]}x{resolution[1]}: set min_bucket_reso to at most {min(resolution)}"
            + (f" and bucket_reso_steps to at most {min(resolution)}" if step > low else "")
        )
    if rounded_high < max(resolution):
        raise UserError(
            f"{where}: max_bucket_reso {rounded_high} is below the larger side of resolution "
            f"{resolution[0]}x{resolution[1]}: set max_bucket_reso to at least {max(resolution)}"
        )
    return rounded_low, rounded_high, notices


def predefined_buckets(resolution: Size, low: int, high: int, step: int) -> list[Size]:
    """All buckets of about the area of `resolution`, sorted by (width, height)."""
    area = resolution[0] * resolution[1]
    side = math.isqrt(area) // step * step
    buckets = {(side, side)}
    for width in range(low, high + 1, step):
        height = min(high, area // width // step * step)
        if height >= low:
            buckets |= {(width, height), (height, width)}
    return sorted(buckets)


def place(size: Size, buckets: list[Size]) -> Placement:
    """The bucket of the nearest aspect ratio (the first of equals), and the size that covers it."""
    if size in buckets:
        return Placement(size, size)
    ratio = size[0] / size[1]
    bucket = min(buckets, key=lambda b: abs(b[0] / b[1] - ratio))
    return Placement(cover(size, bucket), bucket)


def cover(size: Size, bucket: Size) -> Size:
    """`size` scaled, keeping its aspect ratio, so that it just covers `bucket`."""
    width, height = size
    is_wider = width / height > bucket[0] / bucket[1]
    scale = bucket[1] / height if is_wider else bucket[0] / width
    return math.floor(width * scale + 0.5), math.floor(height * scale + 0.5)


def place_no_upscale(size: Size, resolution: Size, step: int) -> Placement:
    """Shrink to the area of `resolution` when larger, then crop to multiples of `step`.

    Raises `UserError` when a side of the result is shorter than `step`.
    """
    area = resolution[0] * resolution[1]
    resized = size if size[0] * size[1] <= area else _shrink(size, area, step)
    bucket = (resized[0] // step * step, resized[1] // step * step)
    if 0 in bucket:
        raise UserError(
            f"the image is {size[0]}x{size[1]}, too small or too narrow for a bucket in steps of "
            f"{step}: remove it, lower bucket_reso_steps (at least {TOKEN_PIXELS}) or set "
            "bucket_no_upscale = false"
        )
    return Placement(resized, bucket)


def _shrink(size: Size, area: int, step: int) -> Size:
    """The size near `area` whose rounding to `step` keeps the aspect ratio better.

    One candidate rounds the width first, the other the height; the height wins when both are equal.
    """

    def rounded(x: float) -> int:
        return math.floor(x + 0.5) // step * step

    ratio = size[0] / size[1]
    width = math.sqrt(area * ratio)
    by_width = rounded(width)
    by_height = rounded(area / width)
    error_by_width = _ratio_error(by_width, rounded(by_width / ratio), ratio)
    error_by_height = _ratio_error(rounded(by_height * ratio), by_height, ratio)
    if error_by_width < error_by_height:
        return by_width, math.floor(by_width / ratio + 0.5)
    return math.floor(by_height * ratio + 0.5), by_height


def _ratio_error(width: int, height: int, ratio: float) -> float:
    # A side that rounds to nothing is never the better candidate.
    return abs(width / height - ratio) if width and height else math.inf
