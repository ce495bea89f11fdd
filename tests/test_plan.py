"""The plan: listing, captions, repeats, batches, regularisation, validation, folder layouts."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from anima_fast.data.plan import build_plan
from anima_fast.data.summary import summarise
from anima_fast.errors import UserError
from anima_fast.options.run import TrainOptions


def picture(path, size=(64, 64), caption=None, **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), 100, np.uint8)).save(path, **save)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def folder(root, count, size=(64, 64), caption="a, b"):
    for i in range(count):
        picture(root / f"{i:02}.png", size, caption)
    return root.as_posix()


def plan(tmp_path, text, **options):
    path = tmp_path / "data.toml"
    path.write_text(text, encoding="utf-8")
    return build_plan(TrainOptions(dataset_config=str(path), **options))


def one(tmp_path, image_dir, more="", dataset="", **options):
    text = f"""
    [[datasets]]
    resolution = 64
    {dataset}
    [[datasets.subsets]]
    image_dir = '{image_dir}'
    {more}
    """
    return plan(tmp_path, text, **options)


def test_items_in_order_with_captions_and_placement(tmp_path):
    images = folder(tmp_path / "a", 3)
    (tmp_path / "a" / "01.txt").write_text("\ufeffsecond\nline\n", encoding="utf-8")
    (tmp_path / "a" / "notes.md").write_text("x")
    (tmp_path / "a" / "._00.png").write_text("x")
    found = one(tmp_path, images, "num_repeats = 2")
    assert [item.path.name for item in found.items] == ["00.png", "01.png", "02.png"]
    assert [item.index for item in found.items] == [0, 1, 2]
    assert found.items[1].caption.lines(found.items[1].subset) == ["second"]
    assert {item.bucket for item in found.items} == {(64, 64)}
    assert found.batches_per_epoch == 6 and found.notices == []


def test_epoch_batches(tmp_path):
    folder(tmp_path / "a", 5)
    for i in range(3):
        picture(tmp_path / "a" / f"w{i}.jpg", (128, 32), "wide")
    dataset = "enable_bucket = true\nbucket_reso_steps = 16\nmin_bucket_reso = 32\nbatch_size = 4\n"
    text = f"""
    [[datasets]]
    resolution = 64
    {dataset}
    subsets = [{{image_dir = '{(tmp_path / "a").as_posix()}', num_repeats = 3}}]
    [[datasets]]
    resolution = 128
    batch_size = 2
    enable_bucket = true
    subsets = [{{image_dir = '{(tmp_path / "a").as_posix()}'}}]
    """
    found = plan(tmp_path, text)
    # 15 square and 9 wide uses in fours; at 128 the limits leave one bucket, 8 uses in twos.
    assert found.batches_per_epoch == 4 + 3 + 4
    batches = found.epoch_batches(1, 7)
    assert len(batches) == found.batches_per_epoch
    uses = Counter(index for batch in batches for index in batch)
    assert uses == {item.index: item.repeats for item in found.items}
    assert {item.repeats for item in found.items} == {1, 3}
    for batch in batches:
        assert len({(found.items[i].dataset.index, found.items[i].bucket) for i in batch}) == 1
        assert 1 <= len(batch) <= found.items[batch[0]].dataset.batch_size
    assert batches == found.epoch_batches(1, 7)
    assert batches != found.epoch_batches(2, 7) and batches != found.epoch_batches(1, 8)
    with pytest.raises(ValueError, match="epoch"):
        found.epoch_batches(0, 7)


def test_batches_are_the_same_in_another_process(tmp_path):
    images = folder(tmp_path / "a", 9)
    found = one(tmp_path, images)
    code = (
        "from anima_fast.data.plan import build_plan\n"
        "from anima_fast.options.run import TrainOptions\n"
        f"plan = build_plan(TrainOptions(dataset_config={str(tmp_path / 'data.toml')!r}))\n"
        "print(plan.epoch_batches(3, 5))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str(found.epoch_batches(3, 5))


def test_regularisation_is_repeated_in_turn(tmp_path):
    train, reg = folder(tmp_path / "a", 4), folder(tmp_path / "r", 3)
    text = f"""
    [[datasets]]
    resolution = 64
    subsets = [{{image_dir = '{train}', num_repeats = 2}}, {{image_dir = '{reg}', is_reg = true}}]
    """
    found = plan(tmp_path, text, prior_loss_weight=0.5)
    reg_items = [item for item in found.items if item.is_reg]
    assert [item.repeats for item in reg_items] == [3, 3, 2]
    assert {item.loss_weight for item in reg_items} == {0.5}
    assert {item.loss_weight for item in found.items if not item.is_reg} == {1.0}
    assert found.batches_per_epoch == 16
    surplus = plan(tmp_path, text.replace("num_repeats = 2", "num_repeats = 1") + "\n")
    assert [item.repeats for item in surplus.items if item.is_reg] == [2, 1, 1]
    few = text.replace("num_repeats = 2", "").replace(",", "", 1)
    few = few.replace(train, folder(tmp_path / "b", 2))
    assert len([item for item in plan(tmp_path, few).items if item.is_reg]) == 2


@pytest.mark.parametrize(
    "split, train, held", [(0.2, 8, 2), (0.25, 8, 2), (0.7, 3, 7), (0.01, 10, 0)]
)
def test_validation_split_is_disjoint_and_complete(tmp_path, split, train, held):
    images = folder(tmp_path / "a", 10)
    found = one(tmp_path, images, f"validation_split = {split}\nflip_aug = true\nnum_repeats = 3")
    names = [item.path.name for item in found.items]
    held_out = [item.path.name for item in found.validation_items]
    assert (len(names), len(held_out)) == (train, held)
    assert sorted(names + held_out) == [f"{i:02}.png" for i in range(10)]
    assert all(item.repeats == 1 and not item.subset.flip_aug for item in found.validation_items)
    assert all(item.repeats == 3 and item.subset.flip_aug for item in found.items)
    flat = [i for batch in found.validation_batches() for i in batch]
    assert flat == list(range(held))
    assert bool(held) != any("holds out no image" in notice for notice in found.notices)


def test_validation_seed_chooses_the_images(tmp_path):
    images = folder(tmp_path / "a", 10)

    def held(**options):
        found = one(tmp_path, images, dataset="validation_split = 0.3", **options)
        return [item.path.name for item in found.validation_items]

    assert held() == held(seed=5) == held(validation_seed=0)
    assert held(validation_seed=1) != held()


def test_validation_of_whole_subsets_and_reg(tmp_path):
    train, other, reg = (folder(tmp_path / name, 3) for name in "abr")
    text = f"""
    [[datasets]]
    resolution = 64
    subsets = [{{image_dir = '{train}'}}, {{image_dir = '{other}', validation_split = 1.0}},
               {{image_dir = '{reg}', is_reg = true, validation_split = 0.5}}]
    """
    found = plan(tmp_path, text)
    assert len(found.validation_items) == 3 and len(found.items) == 6
    with pytest.raises(UserError, match="no training images"):
        one(tmp_path, train, "validation_split = 1.0")


def test_captions_missing_empty_and_by_class(tmp_path):
    picture(tmp_path / "a" / "x.png")
    picture(tmp_path / "a" / "y.png", caption="  \n")
    picture(tmp_path / "a" / "z.png", caption="yes")
    images = (tmp_path / "a").as_posix()
    with pytest.raises(UserError, match=r"1 images .*x\.png.*class_tokens"):
        one(tmp_path, images)
    found = one(tmp_path, images, "class_tokens = 'cat'")
    assert [item.caption.text for item in found.items] == ["cat", "cat", "yes"]
    assert found.items[1].caption.blank
    found = one(tmp_path, images, "class_tokens = ''")
    assert [item.caption.text for item in found.items] == ["", "", "yes"]


def test_caption_extension_and_fallback(tmp_path):
    picture(tmp_path / "a" / "x.png", caption="txt")
    picture(tmp_path / "a" / "y_30_20_8_8.png")
    (tmp_path / "a" / "x.caption").write_text("caption")
    (tmp_path / "a" / "y.caption").write_text("face")
    images = (tmp_path / "a").as_posix()
    assert [i.caption.text for i in one(tmp_path, images).items] == ["txt", "face"]
    for extension in (".caption", "caption"):
        found = one(tmp_path, images, f"caption_extension = '{extension}'")
        assert [i.caption.text for i in found.items] == ["caption", "face"]
    with pytest.raises(UserError, match="no caption"):
        one(tmp_path, images, caption_extension=".txt")


def test_caption_that_is_not_utf8(tmp_path):
    picture(tmp_path / "a" / "x.png")
    (tmp_path / "a" / "x.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"x\.txt is not UTF-8"):
        one(tmp_path, (tmp_path / "a").as_posix())


def test_folders_without_images(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("x")
    with pytest.raises(UserError, match="no images"):
        one(tmp_path, (tmp_path / "empty").as_posix())
    with pytest.raises(UserError, match="does not exist"):
        one(tmp_path, "nowhere")


def test_unreadable_image_is_named(tmp_path):
    folder(tmp_path / "a", 2)
    (tmp_path / "a" / "01.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"01\.png.*empty"):
        one(tmp_path, (tmp_path / "a").as_posix())


def test_exact_size_without_buckets(tmp_path):
    images = folder(tmp_path / "a", 2, (80, 64))
    with pytest.raises(UserError, match=r"00\.png \(80x64\).*enable_bucket"):
        one(tmp_path, images)
    assert one(tmp_path, images, cache_latents=True).items[0].resized == (80, 64)
    assert one(tmp_path, images, "random_crop = true").items[0].bucket == (64, 64)


def test_class_folders(tmp_path):
    for name, count in (("10_sks girl", 2), ("1_other_thing", 1), ("0_off", 1), ("words", 1)):
        folder(tmp_path / "t" / name, count, caption=None)
    folder(tmp_path / "r" / "2_girl", 1, caption=None)
    options = TrainOptions(
        train_data_dir=str(tmp_path / "t"), reg_data_dir=str(tmp_path / "r"), resolution="64,64"
    )
    found = build_plan(options)
    train = [(i.caption.text, i.repeats) for i in found.items if not i.is_reg]
    assert train == [("sks girl", 10), ("sks girl", 10), ("other_thing", 1)]
    assert [(i.caption.text, i.repeats) for i in found.items if i.is_reg] == [("girl", 21)]
    assert sum("is ignored" in notice for notice in found.notices) == 2
    with pytest.raises(UserError, match="10_name"):
        build_plan(TrainOptions(train_data_dir=str(tmp_path / "t" / "words"), resolution="64,64"))
    with pytest.raises(UserError, match="--dataset_config"):
        build_plan(TrainOptions())


def test_metadata_files(tmp_path):
    images = folder(tmp_path / "a", 4, caption=None)
    entries = {
        "00": {"caption": "by stem", "tags": "t1, t2", "image_size": [64, 64]},
        "01.png": {"caption": "by name"},
        str(tmp_path / "a" / "02.png"): {"tags": "by path"},
    }
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps(entries), encoding="utf-8")
    lines = tmp_path / "meta.jsonl"
    rows = [{"image_path": key, **value} for key, value in entries.items()]
    lines.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for file in (meta, lines):
        options = dict(in_json=str(file), train_data_dir=images, resolution="64")
        found = build_plan(TrainOptions(**options))
        texts = [item.caption.lines(item.subset)[0] for item in found.items]
        assert texts == ["by stem,t1, t2", "by name", "by path"]
    split = build_plan(TrainOptions(**options, validation_split=0.34))
    assert (len(split.items), len(split.validation_items)) == (2, 1)


@pytest.mark.parametrize(
    "content, expected",
    [
        ("{", "not valid JSON"),
        ("[]", "expected"),
        ("{}", "names no images"),
        ('{"00": 1}', "expected"),
        ('{"00": {}}', "neither caption nor tags"),
        ('{"00": {"caption": 3}}', "must be texts"),
        ('{"00": {"caption": "x", "image_size": [1]}}', "image_size"),
        ('{"zz": {"caption": "x"}, "yy": {"caption": "x"}}', "2 images are missing.*zz"),
    ],
)
def test_bad_metadata_files(tmp_path, content, expected):
    images = folder(tmp_path / "a", 1)
    (tmp_path / "m.json").write_text(content)
    options = dict(in_json=str(tmp_path / "m.json"), train_data_dir=images, resolution="64")
    with pytest.raises(UserError, match=expected):
        build_plan(TrainOptions(**options))


def test_masks(tmp_path):
    images, masks = folder(tmp_path / "a", 2), folder(tmp_path / "m", 1)
    line = f"conditioning_data_dir = '{masks}'"
    with pytest.raises(UserError, match=r"01\.png.*conditioning_data_dir"):
        one(tmp_path, images, line, masked_loss=True)
    unused = one(tmp_path, images, line)
    assert unused.items[0].mask_path is None and "without masked_loss" in unused.notices[0]
    picture(tmp_path / "m" / "01.webp")
    found = one(tmp_path, images, line, masked_loss=True)
    assert [item.mask_path.name for item in found.items] == ["00.png", "01.webp"]
    assert "no effect" in one(tmp_path, images, masked_loss=True).notices[0]


def test_advice(tmp_path):
    picture(tmp_path / "a" / "x.jpg", (1920, 1080), "x")
    picture(tmp_path / "a" / "y.jpg", (1024, 1024), "y")
    text = f"""
    [[datasets]]
    resolution = 1024
    enable_bucket = true
    subsets = [{{image_dir = '{(tmp_path / "a").as_posix()}', face_crop_aug_range = [1.0, 2.0]}}]
    """
    limits, faces, cache = plan(tmp_path, text, cache_info=True).notices
    assert "cache_info" in cache
    assert "1 of 2 images" in limits and "max_bucket_reso = 2048" in limits
    assert "2 images" in faces
    wide = text.replace("enable_bucket = true", "enable_bucket = true\nmax_bucket_reso = 2048")
    assert not any("max_bucket_reso" in notice for notice in plan(tmp_path, wide).notices)


def test_strip_that_would_explode(tmp_path):
    picture(tmp_path / "a" / "x.png", (20000, 1), "x")
    text = f"""
    [[datasets]]
    resolution = 1024
    enable_bucket = true
    subsets = [{{image_dir = '{(tmp_path / "a").as_posix()}'}}]
    """
    with pytest.raises(UserError, match=r"x\.png.*too narrow"):
        plan(tmp_path, text)


def test_summary(tmp_path):
    images = folder(tmp_path / "girl", 2, caption="Red, blue, red")
    reg = folder(tmp_path / "reg", 1)
    text = f"""
    [[datasets]]
    resolution = 64
    min_bucket_reso = 64
    enable_bucket = true
    subsets = [
        {{image_dir = '{images}', num_repeats = 3, custom_attributes = {{day = 2026-01-01}}}},
        {{image_dir = '{reg}', is_reg = true}},
    ]
    [[datasets]]
    resolution = 128
    enable_bucket = true
    min_bucket_reso = 64
    subsets = [{{image_dir = '{images}'}}]
    """
    planned = plan(tmp_path, text)
    assert any("custom_attributes have no effect" in notice for notice in planned.notices)
    found = summarise(planned)
    assert json.loads(json.dumps(found)) == found
    assert found["tag_frequency"] == {"girl": {"red": 4, "blue": 2}, "reg": {"a": 1, "b": 1}}
    assert found["dataset_dirs"] == {"girl": {"n_repeats": 3, "img_count": 2}}
    assert found["reg_dataset_dirs"] == {"reg": {"n_repeats": 1, "img_count": 1}}
    assert (found["num_train_images"], found["num_reg_images"]) == (8, 6)
    assert found["num_validation_images"] == 0
    assert found["bucket_info"]["buckets"] == {
        "0": {"resolution": [64, 64], "count": 12},
        "1": {"resolution": [128, 128], "count": 2},
    }
    first = found["datasets"][0]
    assert first["resolution"] == [64, 64] and first["subsets"][0]["image_dir"] == "girl"
    assert str(tmp_path) not in json.dumps(found)


def test_images_of_at_most_an_area_are_left_out(tmp_path):
    for name, size in (("a", (64, 64)), ("b", (32, 128)), ("c", (65, 64)), ("d", (20, 20))):
        picture(tmp_path / "a" / f"{name}.png", size, "x")
    images = (tmp_path / "a").as_posix()
    buckets = "enable_bucket = true\nmin_bucket_reso = 16\nbucket_reso_steps = 16\n"
    for skip in ("64", "[128, 32]"):
        found = one(tmp_path, images, dataset=f"{buckets}skip_image_resolution = {skip}")
        assert [item.path.name for item in found.items] == ["c.png"]
        (notice,) = found.notices
        assert "skip_image_resolution: 3 left out (a.png, b.png, d.png)" in notice
        assert summarise(found)["datasets"][0]["skip_image_resolution"] in ((64, 64), (128, 32))
    as_option = one(tmp_path, images, dataset=buckets, skip_image_resolution="20,20")
    assert [item.path.name for item in as_option.items] == ["a.png", "b.png", "c.png"]
    with pytest.raises(UserError, match="left out by skip_image_resolution"):
        one(tmp_path, images, dataset="skip_image_resolution = 1000")
