"""Buckets meet the published vectors of sd-scripts, and hold their invariants on any image."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anima_fast.data.buckets import adjust_limits, place, predefined_buckets
from anima_fast.data.subset import Dataset
from anima_fast.errors import UserError


def dataset(resolution, low, high, step, no_upscale=False):
    return Dataset(
        resolution=resolution,
        enable_bucket=True,
        min_bucket_reso=low,
        max_bucket_reso=high,
        bucket_reso_steps=step,
        bucket_no_upscale=no_upscale,
    )


WIDE = dataset((1024, 1024), 512, 2048, 64)
DEFAULT = dataset((1024, 1024), 256, 1024, 64)
NO_UPSCALE = dataset((1024, 1024), 256, 1024, 64, no_upscale=True)
OFF = Dataset(resolution=(96, 64))

# Image, then bucket and resized size for each of the three rules.
VECTORS = """
1024x1024  1024x1024 1024x1024  1024x1024 1024x1024  1024x1024 1024x1024
1920x1080  1344x768 1365x768    1024x576 1024x576    1344x768 1365x768
1080x1920  768x1344 768x1365    576x1024 576x1024    768x1344 768x1365
3000x2000  1216x832 1248x832    1024x704 1056x704    1216x832 1248x832
832x1216   832x1216 832x1216    704x1024 704x1029    832x1216 832x1216
800x800    1024x1024 1024x1024  1024x1024 1024x1024  768x768 800x800
1000x3000  576x1728 576x1728    320x1024 341x1024    576x1728 576x1728
512x512    1024x1024 1024x1024  1024x1024 1024x1024  512x512 512x512
1500x1501  1024x1024 1024x1025  1024x1024 1024x1025  1024x1024 1024x1025
640x480    1152x896 1195x896    1024x768 1024x768    640x448 640x480
4000x1000  2048x512 2048x512    1024x256 1024x256    2048x512 2048x512
"""
ROWS = [
    [tuple(map(int, cell.split("x"))) for cell in line.split()]
    for line in VECTORS.strip().splitlines()
]

COUNTS = [
    ((1024, 1024), 256, 1024, 64, 25, 1024, 4096),
    ((1024, 1024), 512, 2048, 64, 33, 3712, 4096),
    ((1024, 1024), 512, 1536, 64, 21, 3072, 4096),
    ((1024, 1024), 256, 2048, 64, 41, 2048, 4096),
    ((1024, 1024), 512, 2048, 32, 65, 3876, 4096),
    ((1280, 1280), 512, 2048, 64, 33, 4096, 6400),
    ((768, 768), 256, 1024, 64, 19, 1024, 2304),
    ((512, 512), 256, 1024, 64, 17, 832, 1024),
    ((832, 1216), 256, 1536, 64, 31, 1536, 3952),
]


@pytest.mark.parametrize("column, dataset", enumerate([WIDE, DEFAULT, NO_UPSCALE]))
@pytest.mark.parametrize("row", ROWS, ids=lambda row: "{}x{}".format(*row[0]))
def test_vectors(row, column, dataset):
    assert place(row[0], dataset) == (row[2 + 2 * column], row[1 + 2 * column])


@pytest.mark.parametrize("resolution, low, high, step, count, fewest, most", COUNTS)
def test_bucket_lists(resolution, low, high, step, count, fewest, most):
    buckets = predefined_buckets(resolution, low, high, step)
    tokens = [width * height // 256 for width, height in buckets]
    assert (len(buckets), min(tokens), max(tokens)) == (count, fewest, most)
    assert buckets == sorted(set(buckets))


sides = st.integers(16, 6000)
datasets = st.sampled_from([WIDE, DEFAULT, NO_UPSCALE, OFF, dataset((640, 960), 320, 1600, 32)])


@given(datasets, sides, sides)
def test_every_image_covers_its_bucket(dataset, width, height):
    try:
        (resized_w, resized_h), (w, h) = place((width, height), dataset)
    except UserError as error:
        # Only an image that is not enlarged can be too small.
        assert dataset.bucket_no_upscale and "too small" in str(error)
        return
    assert 0 < w <= resized_w and 0 < h <= resized_h
    step = dataset.bucket_reso_steps
    if dataset.bucket_no_upscale:
        assert w % step == 0 and h % step == 0
        assert w * h <= math.prod(dataset.resolution) * 1.13
        assert resized_w < w + step and resized_h < h + step
    else:
        limits = dataset.min_bucket_reso, dataset.max_bucket_reso, step
        listed = predefined_buckets(dataset.resolution, *limits)
        assert (w, h) in (listed if dataset.enable_bucket else [dataset.resolution])
        # Enlarging or shrinking keeps the aspect ratio, so at most one side has a surplus.
        assert resized_w == w or resized_h == h


def test_off_means_one_bucket():
    assert place((300, 100), OFF) == ((192, 64), (96, 64))


def limits(low, high):
    return {
        "resolution": (1024, 1024),
        "bucket_reso_steps": 64,
        "min_bucket_reso": low,
        "max_bucket_reso": high,
    }


def test_limits_are_rounded_outwards_with_a_notice():
    values = limits(300, 1500)
    notices = adjust_limits(values, "here")
    assert values == limits(256, 1536)
    assert len(notices) == 2 and "300" in notices[0] and "1536" in notices[1]
    assert adjust_limits(limits(256, 1024), "here") == []


@pytest.mark.parametrize("low, high, name", [(1088, 2048, "min_"), (256, 960, "max_")])
def test_limits_that_exclude_the_resolution(low, high, name):
    with pytest.raises(UserError, match=f"{name}bucket_reso"):
        adjust_limits(limits(low, high), "here")


def test_a_strip_without_a_bucket():
    with pytest.raises(UserError, match="bucket_no_upscale = false"):
        place((2000, 20), NO_UPSCALE)
