"""Decoding, resizing and cropping; damaged files end in one readable error."""

import random
import struct
import zlib
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anima_fast.data import images
from anima_fast.data.captions import Caption
from anima_fast.data.items import ImageItem
from anima_fast.data.resampling import area_average, resize
from anima_fast.data.subset import Dataset, Subset
from anima_fast.errors import UserError


def pixels(height, width, channels=3):
    return np.random.default_rng(height * width).integers(
        0, 256, (height, width, channels), np.uint8
    )


def item(path, size, resized=None, bucket=None, mask=None, **settings):
    resized = resized or size
    return ImageItem(
        index=0,
        path=Path(path),
        caption=Caption("x"),
        subset=Subset(**settings),
        dataset=Dataset(resolution=(64, 64)),
        size=size,
        resized=resized,
        bucket=bucket or resized,
        repeats=1,
        loss_weight=1.0,
        mask_path=mask,
        exif_rotated=False,
    )


def test_rgb_and_rgba_keep_the_stored_colours(tmp_path):
    data = pixels(5, 7, 4)
    data[0, 0] = (10, 20, 30, 0)
    Image.fromarray(data).save(tmp_path / "a.png")
    assert np.array_equal(images.read_image(tmp_path / "a.png"), data[..., :3])
    assert np.array_equal(images.read_image(tmp_path / "a.png", "RGBA"), data)
    Image.fromarray(data[..., :3]).save(tmp_path / "b.png")
    assert (images.read_image(tmp_path / "b.png", "RGBA")[..., 3] == 255).all()
    assert images.read_header(tmp_path / "a.png").size == (7, 5)
    with pytest.raises(ValueError, match="mode"):
        images.read_image(tmp_path / "a.png", "L")


def test_grey_of_16_bit_is_scaled_not_clipped(tmp_path):
    ramp = np.array([[0, 257, 32896, 65535]], np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    assert images.read_image(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK"])
def test_other_modes(tmp_path, mode):
    source = Image.fromarray(pixels(4, 6)).convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    source.save(path, **({"quality": 100} if mode == "CMYK" else {}))
    expected = np.asarray(Image.open(path).convert("RGB"))
    assert np.array_equal(images.read_image(path), expected)
    assert images.read_image(path, "RGBA").shape == (4, 6, 4)


def test_transparent_palette(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 255, 0])
    picture.putdata([0, 1])
    picture.save(tmp_path / "p.png", transparency=0)
    found = images.read_image(tmp_path / "p.png", "RGBA")
    assert found[0].tolist() == [[255, 0, 0, 0], [0, 255, 0, 255]]
    assert images.read_image(tmp_path / "p.png")[0].tolist() == [[255, 0, 0], [0, 255, 0]]


def test_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert images.read_image(tmp_path / "a.webp")[0, 0].tolist() == [255, 0, 0]


def test_exif_rotation_is_seen_and_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels(4, 6)).save(tmp_path / "r.jpg", exif=exif)
    Image.fromarray(pixels(4, 6)).save(tmp_path / "p.jpg")
    assert images.read_header(tmp_path / "r.jpg") == images.Header((6, 4), 6)
    assert images.read_header(tmp_path / "p.jpg") == images.Header((6, 4), 1)
    assert images.read_image(tmp_path / "r.jpg").shape == (4, 6, 3)


def png_header(width, height):
    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.filterwarnings("ignore:.*decompression bomb")
@pytest.mark.parametrize(
    "data, expected",
    [
        (b"", "empty"),
        (b"not an image", "not an image"),
        (png_header(15000, 15000), "more than 200 megapixels"),
        (png_header(60000, 60000), "more than 200 megapixels"),
        (png_header(0, 8), "a.png"),
    ],
)
def test_files_that_are_no_sane_image(tmp_path, data, expected):
    (tmp_path / "a.png").write_bytes(data)
    for read in (images.read_header, images.read_image):
        with pytest.raises(UserError, match=expected) as caught:
            read(tmp_path / "a.png")
        assert "a.png" in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        images.read_header(tmp_path / "none.png")
    with pytest.raises(UserError, match="cannot read"):
        images.read_header(tmp_path)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp"])
def test_truncated_files(tmp_path, name):
    Image.fromarray(pixels(64, 64)).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="replace or remove"):
        images.read_image(tmp_path / name)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damaged_files_decode_or_end_in_a_user_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    name = data.draw(st.sampled_from(["a.png", "a.jpg", "a.webp", "a.bmp"]))
    Image.fromarray(pixels(8, 8)).save(folder / name)
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(content)
    try:
        assert images.read_image(folder / name).ndim == 3
    except UserError as error:
        assert name in str(error)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 10**6))
def test_area_average_is_exact(before, after, seed):
    before, after = max(before, after), min(before, after)
    row = np.random.default_rng(seed).integers(0, 256, (1, before), np.uint8)
    found = area_average(row, (after, 1))[0]
    for i in range(after):
        left, right = Fraction(i * before, after), Fraction((i + 1) * before, after)
        parts = [max(min(right, j + 1) - max(left, j), 0) * int(row[0, j]) for j in range(before)]
        assert abs(sum(parts) / (right - left) - int(found[i])) <= Fraction(51, 100)


def test_resize_rules():
    source = pixels(20, 30)
    assert resize(source, (30, 20)) is source
    assert np.array_equal(resize(source, (15, 10)), resize(source, (15, 10), "area"))
    lanczos = np.asarray(Image.fromarray(source).resize((60, 40), Image.Resampling.LANCZOS))
    assert np.array_equal(resize(source, (60, 40)), lanczos)
    # One side that grows is enough to leave area averaging.
    assert np.array_equal(resize(source, (15, 40)), resize(source, (15, 40), "lanczos"))
    for name in ("box", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"):
        assert resize(source, (60, 10), name).shape == (10, 60, 3)
    assert resize(source[..., 0], (7, 9)).shape == (9, 7)


def test_load_item_crops_the_centre(tmp_path):
    data = pixels(9, 12)
    Image.fromarray(data).save(tmp_path / "a.png")
    found, alpha = images.load_item(item(tmp_path / "a.png", (12, 9), bucket=(8, 8)))
    assert alpha is None and found.dtype == np.float32 and found.shape == (3, 8, 8)
    expected = data[0:8, 2:10].transpose(2, 0, 1) / 127.5 - 1
    assert np.allclose(found, expected, atol=1e-6)
    assert found.min() >= -1 and found.max() <= 1


def test_load_item_resizes_before_it_crops(tmp_path):
    data = pixels(20, 40)
    Image.fromarray(data).save(tmp_path / "a.png")
    found, _ = images.load_item(item(tmp_path / "a.png", (40, 20), (20, 10), (16, 8)))
    small = data.reshape(10, 2, 20, 2, 3).mean((1, 3))[1:9, 2:18].transpose(2, 0, 1)
    assert np.abs((found + 1) * 127.5 - small).max() <= 0.51


def test_alpha_and_mask(tmp_path):
    data = pixels(8, 8, 4)
    Image.fromarray(data).save(tmp_path / "a.png")
    Image.fromarray(pixels(8, 8)).save(tmp_path / "plain.png")
    mask = pixels(8, 8)
    Image.fromarray(mask).save(tmp_path / "m.png")
    entry = item(tmp_path / "a.png", (8, 8), mask=tmp_path / "m.png", alpha_mask=True)
    _, alpha = images.load_item(entry)
    assert np.allclose(alpha, data[..., 3] / 255) and alpha.dtype == np.float32
    assert np.allclose(images.load_mask(entry), mask[..., 0] / 255)
    _, alpha = images.load_item(item(tmp_path / "plain.png", (8, 8), alpha_mask=True))
    assert (alpha == 1).all()
    assert images.load_mask(item(tmp_path / "plain.png", (8, 8))) is None


def test_random_crop_cuts_image_and_mask_alike(tmp_path):
    data = pixels(16, 24)
    Image.fromarray(data).save(tmp_path / "a.png")
    entry = item(
        tmp_path / "a.png", (24, 16), bucket=(16, 16), mask=tmp_path / "a.png", random_crop=True
    )
    cuts = set()
    for seed in range(20):
        found, _ = images.load_item(entry, crop_rng=random.Random(seed))
        mask = images.load_mask(entry, crop_rng=random.Random(seed))
        assert np.allclose((found[0] + 1) / 2, mask, atol=1e-6)
        cuts.add(found.tobytes())
    assert len(cuts) > 4
    centre, _ = images.load_item(entry)
    assert np.allclose((centre[0] + 1) * 127.5, data[:, 4:20, 0], atol=1e-3)


def test_color_augmentation_acts_in_a_third_of_the_cases():
    source = pixels(8, 8)
    changed = 0
    for seed in range(300):
        found = images.augment_color(source, random.Random(seed))
        assert found.shape == source.shape and found.dtype == np.uint8
        changed += not np.array_equal(found, source)
    assert 60 < changed < 130


def test_face_box_and_crop(tmp_path):
    assert images.face_box("girl_30_20_8_10") == (30, 20, 8, 10)
    assert images.face_box("girl_30_20_8_0") is None and images.face_box("girl_2") is None
    data = np.zeros((60, 80, 3), np.uint8)
    data[15:25, 26:34] = 255
    path = tmp_path / "girl_30_20_8_10.png"
    Image.fromarray(data).save(path)
    entry = item(path, (80, 60), (16, 12), (16, 12), face_crop_aug_range=(1.5, 3.0))
    for seed in range(10):
        found, _ = images.load_item(entry, crop_rng=random.Random(seed))
        assert found.shape == (3, 12, 16)
        # The face is the centre of the crop and fills more of it than of the whole image.
        assert found[0, 5:7, 7:9].min() > 0.9 and found.mean() > 2 * data.mean() / 255 - 1
    plain = replace(entry, path=tmp_path / "plain.png")
    Image.fromarray(data).save(plain.path)
    same = [images.load_item(plain, crop_rng=random.Random(s))[0].tobytes() for s in (1, 2)]
    assert same[0] == same[1]


# How a camera stores an upright picture for each number of EXIF.
STORED = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2), 8: lambda a: np.rot90(a, -1),
}  # fmt: skip


@pytest.mark.parametrize("orientation", STORED)
def test_exif_rotation_as_an_option(tmp_path, orientation):
    """Size, pixels and mask are those of the picture saved upright."""
    upright, exif = pixels(48, 32), Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    for name in ("a.png", "mask.png"):
        stored.save(tmp_path / name, exif=exif)
    header = images.read_header(tmp_path / "a.png")
    assert header.upright_size == (32, 48) and header.size == stored.size
    assert header.exif_rotated == (orientation != 1)
    mask = tmp_path / "mask.png"
    turned = item(tmp_path / "a.png", (32, 48), mask=mask, exif_rotation=True)
    rgb, _ = images.load_item(turned)
    np.testing.assert_allclose((rgb + 1) * 127.5, upright.transpose(2, 0, 1), atol=1e-3)
    np.testing.assert_allclose(images.load_mask(turned) * 255, upright[..., 0], atol=1e-3)
