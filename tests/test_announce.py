"""What `train` says about its data at the start, and what it refuses at once."""

import numpy as np
import pytest
from PIL import Image

from anima_fast.data.announce import announced_plan
from anima_fast.data.health import health
from anima_fast.errors import UserError
from anima_fast.options.run import TrainOptions
from anima_fast.training.setup import describe_plan


def put(path, image=None, caption="a, b", ending=".txt", **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = image or Image.new("RGB", (64, 64), "teal")
    image.save(path, **save)
    if caption is not None:
        path.with_suffix(ending).write_text(caption, encoding="utf-8")
    return path


def transparent(alpha):
    image = Image.new("RGBA", (64, 64))
    image.putalpha(Image.fromarray(np.full((64, 64), alpha, np.uint8)))
    return image


def subset(folder, more=""):
    return f"[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}'\n{more}\n"


def announce(tmp_path, *datasets, **options):
    """The plan of datasets, each the text of its subsets, and what was said."""
    path, said = tmp_path / "data.toml", []
    head = "[general]\nresolution = 64\nenable_bucket = true\nmin_bucket_reso = 32\n"
    head += "bucket_reso_steps = 16\n"
    body = "".join(f"[[datasets]]\n{text}" for text in datasets)
    path.write_text(head + body, encoding="utf-8")
    plan = announced_plan(TrainOptions(dataset_config=str(path), **options), said.append)
    return plan, said


def about(said, words):
    """The one line that begins with these words."""
    (line,) = [line for line in said if line.startswith(words)]
    return line


def test_one_line_for_each_kind_and_where_the_rest_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    root = tmp_path / "a"
    put(root / "a.png")
    put(root / "b.png", Image.new("RGB", (24, 24)))
    put(root / "c.png", Image.new("RGB", (20, 20)), "first\nsecond\nthird")
    put(root / "d.png", Image.new("RGB", (400, 60)), " ")
    put(root / "e.jpg", exif=exif)
    put(root / "f.png", transparent(0))
    put(root / "more" / "g.png")
    for name in ("h.heic", "i.gif"):
        (root / name).write_bytes(b"x")
    plan, said = announce(tmp_path, subset(root))
    assert said[-1] == f"`anima-fast dataset {tmp_path / 'data.toml'}` lists them"
    # The worst first.
    assert ": 2 (c.png: 20x20 to 64x64: enlarged 3.2x and 1 more)" in about(said, "images smaller")
    assert ": 1 (c.txt: 2 lines are left out)" in about(said, "captions of several lines")
    assert ": 1 (d.txt)" in about(said, "caption files that are empty")
    assert "d.png: 400x60" in about(said, "images that lose much")
    assert ": 1 (e.jpg): save them upright" in about(said, "images with an EXIF rotation")
    assert "f.png: 100% of it" in about(said, "images with transparent parts")
    assert ": 1 (more: 1 images): name them as subsets" in about(said, "subfolders")
    assert ": 2 (h.heic: .heic is not read and 1 more)" in about(said, "files that are no part")
    kept = {problem["kind"] for problem in health(plan)["problems"]}
    assert {"skipped", "subfolder", "transparent", "rotated", "crop"} <= kept


def test_nothing_is_said_of_clean_data(tmp_path):
    put(tmp_path / "a" / "a.png")
    plan, said = announce(tmp_path, subset(tmp_path / "a"), strict_data=True)
    assert said == [] and len(plan.items) == 1


def test_everything_that_stops_is_named_at_once(tmp_path):
    root = tmp_path / "a"
    put(root / "good.png")
    for i in range(5):
        put(root / f"c{i}.png").with_suffix(".txt").write_bytes(b"\xff\xfe\x00")
    put(root / "none.png", caption=None)
    put(root / "zero.png").write_bytes(b"")
    put(root / "cut.png", transparent(9))
    (root / "cut.png").write_bytes((root / "cut.png").read_bytes()[:-40])
    with pytest.raises(UserError) as raised:
        announce(tmp_path, subset(root))
    text = str(raised.value)
    assert "captions that cannot be read: 5 (c0.txt" in text and "and 2 more" in text
    assert "images without a caption: 1 (none.png)" in text and 'class_tokens = ""' in text
    assert "cannot be read: 2 (zero.png: the file is empty, cut.png" in text
    assert f"`anima-fast dataset {tmp_path / 'data.toml'}` lists them" in text
    assert "\n" not in text


def test_strict_data_refuses_every_finding(tmp_path):
    put(tmp_path / "a" / "a.png", caption="one\ntwo")
    _, said = announce(tmp_path, subset(tmp_path / "a"))
    assert len(said) == 2
    with pytest.raises(UserError, match=r"--strict_data: captions of several lines.*a\.txt"):
        announce(tmp_path, subset(tmp_path / "a"), strict_data=True)


def test_an_alpha_mask_that_leaves_nothing(tmp_path):
    put(tmp_path / "a" / "clear.png", transparent(0))
    put(tmp_path / "a" / "half.png", transparent(128))
    put(tmp_path / "a" / "rgb.png")
    _, said = announce(tmp_path, subset(tmp_path / "a", "alpha_mask = true"), masked_loss=True)
    assert ": 1 (clear.png: mask alpha)" in about(said, "masks that leave nothing")
    assert ": 1 (rgb.png)" in about(said, "images without transparency")


def test_images_with_masks_are_counted(tmp_path):
    for name in "abcd":
        put(tmp_path / "a" / f"{name}.png")
        put(tmp_path / "m" / f"{name}.png", caption=None)
    masked = subset(tmp_path / "a", f"conditioning_data_dir = '{(tmp_path / 'm').as_posix()}'")
    assert announce(tmp_path, masked, masked_loss=True)[1] == ["masks for 4 of 4 images"]
    put(tmp_path / "b" / "e.png")
    put(tmp_path / "b" / "f.png", transparent(9))
    both = masked + subset(tmp_path / "b", "alpha_mask = true")
    _, said = announce(tmp_path, both, masked_loss=True)
    assert said[0] == "masks for 5 of 6 images; the others are trained in full"


def test_no_more_than_so_many_images_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("anima_fast.data.transparency.MOST_DECODED", 1)
    for name in "ab":
        put(tmp_path / "a" / f"{name}.png", transparent(0))
    _, said = announce(tmp_path, subset(tmp_path / "a"))
    assert ": 1 (a.png: 100% of it)" in about(said, "images with transparent parts")
    assert about(said, "1 more images have an alpha channel")
    with pytest.raises(UserError, match=r"transparent parts.*: 2"):
        announce(tmp_path, subset(tmp_path / "a"), strict_data=True)


def test_surplus_regularisation_images(tmp_path):
    put(tmp_path / "a" / "a.png")
    for i in range(3):
        put(tmp_path / "r" / f"{i}.png")
    _, said = announce(tmp_path, subset(tmp_path / "a") + subset(tmp_path / "r", "is_reg = true"))
    assert ": 2 (1.png and 1 more)" in about(said, "regularisation images beyond")


def test_an_image_that_is_trained_and_held_out(tmp_path):
    for i in range(4):
        put(tmp_path / "a" / f"{i}.png")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    held = subset(tmp_path / "a", "validation_split = 0.5\nvalidation_seed = 1")
    same = subset(tmp_path / "link", "validation_split = 0.5\nvalidation_seed = 1")
    _, said = announce(tmp_path, held, same)
    assert said == []
    _, said = announce(tmp_path, held, subset(tmp_path / "link"))
    line = about(said, "images that are trained and also held out for validation: 2")
    assert "held out in datasets[0].subsets[0], trained in datasets[1].subsets[0]" in line


def test_folders_are_named_as_they_are_typed(tmp_path):
    put(tmp_path / "my data" / "1_x" / "a.png", caption="one\ntwo")
    said = []
    root = tmp_path / "my data"
    announced_plan(TrainOptions(train_data_dir=str(root), resolution=(64, 64)), said.append)
    assert f"dataset --train_data_dir '{root}' --resolution 64,64`" in said[-1]


@pytest.mark.parametrize(
    ("image", "caption", "extension"),
    [
        ("a.png", "a.TXT", None),
        ("a.png", "A.txt", None),
        ("a.png", "a.tags", None),
        ("a.png", "a.json", None),
        ("a.png", "a.png.txt", None),
        ("a.png", "a.txt", ".caption"),
        ("caf\u00e9.png", "cafe\u0301.txt", None),
        ("cafe\u0301.png", "caf\u00e9.txt", None),
    ],
)
def test_captions_in_files_that_are_not_taken(tmp_path, image, caption, extension):
    root = tmp_path / "a"
    put(root / image, caption=None)
    (root / caption).write_text("words", encoding="utf-8")
    if (root / image).with_suffix(".txt").exists() and extension is None:
        pytest.skip("this file system takes the two names for one")
    more = f"caption_extension = '{extension}'\n" if extension else ""
    plan, said = announce(tmp_path, subset(root, more + "class_tokens = 'x'"))
    assert plan.items[0].caption.text == "x"
    line = about(said, "images whose caption may be in a file that is not read")
    assert f": 1 ({image}: {caption} beside it is not read)" in line
    assert not any(line.startswith("captions without an image") for line in said)
    with pytest.raises(UserError, match="images without a caption: 1") as raised:
        announce(tmp_path, subset(root, more))
    assert f"{caption} beside it is not read" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"caption": "a cat, sitting"}', "a cat, sitting"),
        ('{"caption": "a cat", "tags": "red, blue"}', "a cat,red, blue"),
        ('{\n "tags": ["mika", " red hair "],\n "nl": "A girl smiles."\n}',
         "mika, red hair, A girl smiles."),
        ('{"tags": [], "nl": "Text", "size": [1, 2]}', "Text"),
        ('{"tags": ["a", "b"]}', "a, b"),
    ],
)  # fmt: skip
def test_json_captions(tmp_path, text, expected):
    put(tmp_path / "a" / "a.png", caption=text, ending=".json")
    plan, said = announce(tmp_path, subset(tmp_path / "a", "caption_extension = '.json'"))
    (item,) = plan.items
    assert item.caption.lines(item.subset) == [expected] and said == []


@pytest.mark.parametrize(
    "text", ["[1]", '"words"', '{"text": "x"}', '{"caption": 3}', '{"tags": [1]}', "{", "[" * 99999]
)
def test_other_json_is_refused(tmp_path, text):
    put(tmp_path / "a" / "a.png", caption=text, ending=".json")
    with pytest.raises(UserError, match=r"captions that cannot be read: 1 \(a\.json: .*JSON"):
        announce(tmp_path, subset(tmp_path / "a", "caption_extension = '.json'"))


def test_an_empty_json_caption_is_an_empty_caption(tmp_path):
    put(tmp_path / "a" / "a.png", caption='{"caption": " "}', ending=".json")
    plan, said = announce(tmp_path, subset(tmp_path / "a", "caption_extension = 'json'"))
    assert plan.items[0].caption.blank and about(said, "caption files that are empty: 1 (a.json)")


@pytest.mark.parametrize(
    ("caption", "kind"),
    [
        ("1girl, saber \\(fate\\), blue", "captions with \\( or (word:1.2)"),
        ("1girl, (smile:1.2)", "captions with \\( or (word:1.2)"),
        ("1girl, long_hair", "captions with underscores"),
        ("1girl, saber_(fate)", "captions with underscores"),
        ("1girl, saber (fate), at 10:30, ^_^, o_o, score_7, a: b", None),
    ],
)
def test_tags_that_prompts_never_have(tmp_path, caption, kind):
    put(tmp_path / "a" / "a.png", caption=caption)
    _, said = announce(tmp_path, subset(tmp_path / "a"))
    assert bool(said) == bool(kind), said
    if kind:
        assert f": 1 (a.txt: {caption.split(', ')[1]})" in about(said, kind)


@pytest.mark.parametrize("more", ["shuffle_caption = true", "caption_tag_dropout_rate = 0.1"])
def test_empty_tags_wander_only_where_tags_do(tmp_path, more):
    for name, caption in (("a", "x, y,"), ("b", "x,, y"), ("c", "x, y")):
        put(tmp_path / "a" / f"{name}.png", caption=caption)
    assert announce(tmp_path, subset(tmp_path / "a"))[1] == []
    line = about(announce(tmp_path, subset(tmp_path / "a", more))[1], "captions with empty tags")
    assert ": 2 (a.txt and 1 more): remove commas" in line


def test_an_image_of_several_datasets_is_one_image(tmp_path):
    for name in "abcd":
        put(tmp_path / "a" / f"{name}.png")
    one, said = subset(tmp_path / "a"), []
    plan, _ = announce(tmp_path, one, "resolution = 48\n" + one, "resolution = 32\n" + one)
    describe_plan(plan, TrainOptions(), said.append)
    assert said[-1].startswith("4 images (12 over 3 datasets), 12 batches per epoch")
    plan, _ = announce(tmp_path, one)
    describe_plan(plan, TrainOptions(), said.append)
    assert said[-1].startswith("4 images, 4 batches per epoch")
