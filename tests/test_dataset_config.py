"""Dataset files: inheritance, strictness, and no exception but `UserError` on any input."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anima_fast.data.dataset_config import load_dataset_config, resolve_datasets
from anima_fast.data.plan import build_plan
from anima_fast.errors import UserError
from anima_fast.options.dataset_keys import KEYS, check_config
from anima_fast.options.run import TrainOptions

DOC_EXAMPLE = """
[general]
resolution = 1024
batch_size = 1
enable_bucket = true
bucket_no_upscale = false
caption_extension = ".txt"

[[datasets]]
[[datasets.subsets]]
image_dir = "data/a"
num_repeats = 2
"""


def resolve(tmp_path, text, name="data.toml", **options):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return resolve_datasets(TrainOptions(dataset_config=str(path), **options))


def refuse(tmp_path, text, *expected, **options):
    with pytest.raises(UserError) as caught:
        resolve(tmp_path, text, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message, message


def test_documented_example(tmp_path):
    [dataset], notices = resolve(tmp_path, DOC_EXAMPLE)
    assert dataset.resolution == (1024, 1024)
    assert dataset.batch_size == 1 and dataset.enable_bucket and not dataset.bucket_no_upscale
    assert (dataset.min_bucket_reso, dataset.max_bucket_reso) == (256, 1024)
    [subset] = dataset.subsets
    assert (subset.image_dir, subset.num_repeats) == ("data/a", 2)
    assert subset.caption_extension == ".txt" and subset.caption_separator == ","
    assert notices == []


def test_inheritance_from_subset_to_built_in_default(tmp_path):
    text = """
    general = {keep_tokens = 3, flip_aug = true}
    [[datasets]]
    resolution = 512
    keep_tokens = 2
    subsets = [{image_dir = "a", keep_tokens = 1}, {image_dir = "b"}]
    [[datasets]]
    subsets = [{image_dir = "c"}]
    """
    options = dict(resolution="640,512", train_batch_size=4, dataset_repeats=5, keep_tokens=9)
    (one, two), _ = resolve(tmp_path, text, **options)
    assert [s.keep_tokens for s in one.subsets] == [1, 2]
    assert two.subsets[0].keep_tokens == 3
    assert one.resolution == (512, 512) and two.resolution == (640, 512)
    assert one.batch_size == two.batch_size == 4
    assert one.subsets[0].num_repeats == 5 and one.subsets[0].flip_aug
    assert one.subsets[0].token_warmup_min == 1
    assert [s.index for s in one.subsets] == [0, 1] and two.subsets[0].dataset_index == 1


def test_json_is_read_like_toml(tmp_path):
    config = {"general": {"resolution": [64, 96]}, "datasets": [{"subsets": [{"image_dir": "a"}]}]}
    [dataset], _ = resolve(tmp_path, json.dumps(config), "data.json")
    assert dataset.resolution == (64, 96)


def test_whole_numbers_stand_for_fractions_and_subsets_may_split(tmp_path):
    text = """
    [[datasets]]
    resolution = 64
    network_multiplier = 2
    subsets = [{image_dir = "a", validation_split = 1, face_crop_aug_range = [2, 4]}]
    """
    [dataset], _ = resolve(tmp_path, text)
    assert dataset.network_multiplier == 2.0
    assert dataset.subsets[0].validation_split == 1.0
    assert dataset.subsets[0].face_crop_aug_range == (2.0, 4.0)


@pytest.mark.parametrize(
    "line, expected",
    [
        ("num_repeat = 2", ["datasets[0].subsets[0]", "'num_repeat'", "'num_repeats'"]),
        ("dataset_repeats = 2", ["'num_repeats'"]),
        ("zzz = 2", ["'zzz'", "remove it", "image_dir"]),
        ("resolution = 512", ["does not belong", "[general] or [[datasets]]"]),
        ("num_repeats = 1.5", ["num_repeats: expected a whole number", "1.5"]),
        ("num_repeats = true", ["a whole number, got True, a boolean"]),
        ("num_repeats = {a = 1}", ["got {'a': 1}, a table"]),
        ("num_repeats = '2'", ["got '2', a text"]),
        ("num_repeats = -1", ["out of range"]),
        ("caption_dropout_rate = -1", [": -1 is out of range"]),
        ("flip_aug = 1", ["true or false"]),
        ("caption_prefix = 3", ["a text"]),
        ("caption_dropout_rate = 1.5", ["out of range", "0 to 1"]),
        ("caption_dropout_rate = nan", ["a number", "nan"]),
        ("caption_separator = ''", ["empty"]),
        ("resize_interpolation = 'lancsoz'", ["'lanczos'"]),
        ("face_crop_aug_range = [4.0, 2.0]", ["smaller first"]),
        ("face_crop_aug_range = [2.0]", ["two numbers"]),
        ("custom_attributes = 1", ["a table"]),
        ("caption_extension = '/x'", ["caption_extension"]),
    ],
)
def test_refused_subset_keys(tmp_path, line, expected):
    text = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'a'\n{line}\n"
    refuse(tmp_path, text, "data.toml" if "extension" not in line else "datasets[0]", *expected)


def test_small_bucket_limits_of_a_file_are_rounded_up(tmp_path):
    text = """
    general = {enable_bucket = true, min_bucket_reso = 8, resolution = 64, bucket_reso_steps = 16}
    [[datasets]]
    subsets = [{image_dir = "a"}]
    """
    [dataset], _ = resolve(tmp_path, text)
    assert dataset.min_bucket_reso == 16


def test_a_list_of_one_number_is_no_size(tmp_path):
    text = "[general]\nresolution = [64]\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n"
    refuse(tmp_path, text, "general.resolution", "a whole number or two")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", ["[[datasets]]"]),
        ("general = 1", ["general", "a table"]),
        ("generals = 1", ["'general'"]),
        ("[datasets]\nx = 1", ["double brackets"]),
        ("[[datasets]]\nresolution = 64", ["datasets[0].subsets", "missing"]),
        ("[[datasets]]\nresolution = 64\nsubsets = [1]", ["subsets[0]"]),
        ("[[datasets]]\nresolution = 64\nsubsets = [{num_repeats = 1}]", ["image_dir is missing"]),
        ("[[datasets]]\nsubsets = [{image_dir = 'a'}]", ["resolution is missing"]),
        (
            "[[datasets]]\nresolution = 64\nbucket_reso_steps = 24\nsubsets = [{image_dir = 'a'}]",
            ["bucket_reso_steps", "multiple of 16"],
        ),
        ("[[datasets]]\nresolution = 70\nsubsets = [{image_dir = 'a'}]", ["multiple of 16"]),
        (
            "[[datasets]]\nresolution = 2048\nenable_bucket = true\nmax_bucket_reso = 1024\n"
            "subsets = [{image_dir = 'a'}]",
            ["max_bucket_reso", "at least 2048"],
        ),
        (
            "[[datasets]]\nresolution = 64\n"
            "subsets = [{image_dir = 'a'}, {image_dir = 'b', metadata_file = 'm.json'}]",
            ["mixed", "two [[datasets]]"],
        ),
        ("a = 'x\ny'", ["not valid TOML"]),
        ('[[datasets]]\nx = "C:\\Users\\me"', ["not valid TOML", "'single quotes'"]),
    ],
)
def test_refused_files(tmp_path, text, expected):
    refuse(tmp_path, text, *expected)


def test_bucket_limits_that_nobody_set_follow_the_resolution(tmp_path):
    text = "[[datasets]]\nenable_bucket = true\nsubsets = [{image_dir = 'a'}]"
    for resolution, low, high, step in (("48", 48, 1056, 48), ("1280", 256, 1280, 64)):
        [dataset], notices = resolve(tmp_path, text, resolution=resolution, min_bucket_reso=256)
        assert (dataset.min_bucket_reso, dataset.max_bucket_reso) == (low, high)
        assert dataset.bucket_reso_steps == step and notices
    refuse(tmp_path, text, "min_bucket_reso", resolution="64", min_bucket_reso=128)


@pytest.mark.parametrize("key", ["color_aug", "random_crop"])
@pytest.mark.parametrize("cache", ["cache_latents", "cache_latents_to_disk"])
def test_pixels_that_change_cannot_be_cached(tmp_path, key, cache):
    text = f"[[datasets]]\nresolution = 64\nsubsets = [{{image_dir = 'a', {key} = true}}]"
    refuse(tmp_path, text, key, "cache_latents", **{cache: True})
    resolve(tmp_path, text)


def test_warmup_needs_live_captions(tmp_path):
    text = "[[datasets]]\nresolution = 64\nsubsets = [{image_dir = 'a', token_warmup_step = 9}]"
    refuse(tmp_path, text, "token_warmup_step", cache_text_encoder_outputs=True)


def test_options_are_checked_like_keys(tmp_path):
    text = "[[datasets]]\nsubsets = [{image_dir = 'a'}]"
    refuse(tmp_path, text, "--resolution", resolution="wide")
    refuse(tmp_path, text, "--train_batch_size", resolution="64", train_batch_size=0)
    [dataset], _ = resolve(tmp_path, text, resolution="64", face_crop_aug_range="2.0,4.0")
    assert dataset.subsets[0].face_crop_aug_range == (2.0, 4.0)


def test_duplicates_and_zero_repeats_are_ignored_with_a_notice(tmp_path):
    text = """
    [[datasets]]
    resolution = 64
    subsets = [{image_dir = "a"}, {image_dir = "./a/"}, {image_dir = "b", num_repeats = 0}]
    """
    [dataset], notices = resolve(tmp_path, text)
    assert [s.image_dir for s in dataset.subsets] == ["a"]
    for part in ("named twice", "num_repeats is 0"):
        assert any(part in notice for notice in notices)
    assert (
        "train_data_dir ignored" in TrainOptions(dataset_config="x", train_data_dir="t").notices[0]
    )


@pytest.mark.parametrize("name", ["data.yaml", "missing.toml", "folder.toml"])
def test_files_that_are_none(tmp_path, name):
    (tmp_path / "data.yaml").write_text("x")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(UserError, match=name):
        load_dataset_config(tmp_path / name)


names = st.sampled_from([*KEYS, "general", "datasets", "subsets"]) | st.text(max_size=8)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([16, 64, 512, 1024, 10**400])
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from([".txt", "lanczos", "a", "\0", "x" * 5000, "\ud800", "64,64"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=8,
)
tables = st.dictionaries(names, values, max_size=4)
paths = st.sampled_from(["a", "\0", "x" * 5000, "\ud800", ".", "", "/"])
subsets = tables | st.builds(lambda table, path: {**table, "image_dir": path}, tables, paths)
datasets = st.builds(
    lambda table, found: {"resolution": 64, **table, "subsets": found},
    tables,
    st.lists(subsets, max_size=2),
)
configs = values | st.builds(
    lambda general, found: {"general": general, "datasets": found},
    tables | st.just({}),
    st.lists(datasets, max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(configs)
def test_any_structure_is_a_plan_or_a_user_error(config):
    try:
        check_config(config, "x.json")
    except UserError as error:
        assert "\n" not in str(error)
    try:
        text = json.dumps(config)
    except ValueError:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.json")
        path.write_text(text, encoding="utf-8")
        try:
            found, _ = resolve_datasets(TrainOptions(dataset_config=str(path)))
        except UserError as error:
            assert str(error)
        else:
            assert found and all(dataset.resolution for dataset in found)
        # No generated folder has images, so the plan itself always ends in an error.
        with pytest.raises(UserError):
            build_plan(TrainOptions(dataset_config=str(path)))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "replace")))
def test_any_bytes_are_a_config_or_a_user_error(data):
    with tempfile.TemporaryDirectory() as folder:
        for name in ("x.toml", "x.json"):
            path = Path(folder, name)
            path.write_bytes(data)
            with pytest.raises(UserError):
                load_dataset_config(path)


valid = st.fixed_dictionaries(
    {},
    optional={
        "num_repeats": st.integers(0, 5),
        "keep_tokens": st.integers(0, 5),
        "shuffle_caption": st.booleans(),
        "caption_dropout_rate": st.floats(0, 1) | st.integers(0, 1),
        "caption_prefix": st.text(max_size=5),
        "custom_attributes": st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
        "resize_interpolation": st.sampled_from(["lanczos", "area"]),
    },
)


@given(valid, valid, valid)
def test_valid_keys_are_found_at_the_nearest_level(general, dataset, subset):
    levels = {"general": {"resolution": 64, **general}}
    entry = {**dataset, "subsets": [{"image_dir": "a", **subset}]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.json")
        path.write_text(json.dumps({**levels, "datasets": [entry]}), encoding="utf-8")
        [found], _ = resolve_datasets(TrainOptions(dataset_config=str(path)))
    merged = {**general, **dataset, **subset}
    if merged.get("num_repeats", 1) == 0:
        assert found.subsets == ()
        return
    for name, value in merged.items():
        assert getattr(found.subsets[0], name) == value
