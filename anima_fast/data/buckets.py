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
from functools import cache

from anima_fast.data.subset import Dataset
from anima_fast.errors import UserError

Size = tuple[int, int]

# One token of the transformer is 16×16 pixels: 8 by the autoencoder, 2 by the patch.
TOKEN_PIXELS = 16


def place(size: Size, dataset: Dataset) -> tuple[Size, Size]:
    """The size that an image of `size` is resized to, and the bucket that is cut out of it.

    Raises `UserError` (without the file's name) when no bucket fits.
    """
    if not dataset.enable_bucket:
        return cover(size, dataset.resolution), dataset.resolution
    if dataset.bucket_no_upscale:
        return _place_no_upscale(size, dataset.resolution, dataset.bucket_reso_steps)
    limits = dataset.min_bucket_reso, dataset.max_bucket_reso, dataset.bucket_reso_steps
    buckets = predefined_buckets(dataset.resolution, *limits)
    if size in buckets:
        return size, size
    ratio = size[0] / size[1]
    # The nearest aspect ratio, the first of equals.
    bucket = min(buckets, key=lambda b: abs(b[0] / b[1] - ratio))
    return cover(size, bucket), bucket


def fit_defaults(values: dict, given: set[str], where: str) -> list[str]:
    """Let limits that nobody set follow a resolution that they would exclude, in place.

    `given` are the keys of `values` that the user set. Returns a notice for each change.
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


def adjust_limits(values: dict, where: str) -> list[str]:
    """Round a dataset's limits outwards to multiples of the step, in place.

    Returns a notice for each limit that was changed. Raises `UserError` for a lower limit above the
    smaller side of `resolution`, or an upper one below the larger side.
    """
    step, (width, height) = values["bucket_reso_steps"], values["resolution"]
    given_low, given_high = values["min_bucket_reso"], values["max_bucket_reso"]
    low, high = max(given_low // step, 1) * step, -(-given_high // step) * step
    small, large = min(width, height), max(width, height)
    if low > small:
        raise UserError(
            f"{where}: min_bucket_reso {low} is above the smaller side of resolution "
            f"{width}x{height}: set min_bucket_reso to at most {small}"
            + (f" and bucket_reso_steps to at most {small}" if step > given_low else "")
        )
    if high < large:
        raise UserError(
            f"{where}: max_bucket_reso {high} is below the larger side of resolution "
            f"{width}x{height}: set max_bucket_reso to at least {large}"
        )
    values |= {"min_bucket_reso": low, "max_bucket_reso": high}
    return [
        f"{where}: {name}_bucket_reso {old} is not a multiple of bucket_reso_steps {step}: "
        f"{new} is used"
        for name, old, new in (("min", given_low, low), ("max", given_high, high))
        if old != new
    ]


@cache
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


def cover(size: Size, bucket: Size) -> Size:
    """`size` scaled, keeping its aspect ratio, so that it just covers `bucket`."""
    width, height = size
    is_wider = width / height > bucket[0] / bucket[1]
    scale = bucket[1] / height if is_wider else bucket[0] / width
    return math.floor(width * scale + 0.5), math.floor(height * scale + 0.5)


def _place_no_upscale(size: Size, resolution: Size, step: int) -> tuple[Size, Size]:
    """Shrink to the area of `resolution` when larger, then crop to multiples of `step`."""
    area = resolution[0] * resolution[1]
    resized = size if size[0] * size[1] <= area else _shrink(size, area, step)
    bucket = (resized[0] // step * step, resized[1] // step * step)
    if 0 in bucket:
        raise UserError(
            f"the image is {size[0]}x{size[1]}, too small or too narrow for a bucket in steps of "
            f"{step}: remove it, lower bucket_reso_steps (at least {TOKEN_PIXELS}) or set "
            "bucket_no_upscale = false"
        )
    return resized, bucket


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
