"""`anima-fast dataset`: what it finds in a folder of broken files, its page, JSON and masks."""

import base64
import io
import json
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stack import make_world, train_options
from typer.testing import CliRunner

from anima_fast.cli import app
from anima_fast.data import health
from anima_fast.data.health import spelling_variants
from anima_fast.data.plan import build_plan
from anima_fast.reports.dataset.duplicates import find_duplicates
from anima_fast.reports.dataset.masks import loss_cells, overlay
from anima_fast.reports.dataset.page import crop_box, short_name, widest
from anima_fast.reports.dataset.pixels import difference_hash, look

STOPS = {"unreadable", "narrow", "wrong size", "missing image", "unreadable caption", "no caption",
         "missing mask", "unreadable mask"}  # fmt: skip


def smooth(seed, size=(96, 96)):
    """A picture that no other seed resembles."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def put(path, image, caption="a, b", **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **save)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def config(root, subset="", dataset="", images="images"):
    path = root / "data.toml"
    path.write_text(
        "[general]\nresolution = 64\nenable_bucket = true\nmin_bucket_reso = 32\n"
        "max_bucket_reso = 128\nbucket_reso_steps = 16\nbatch_size = 2\n"
        f"[[datasets]]\n{dataset}\n[[datasets.subsets]]\n"
        f"image_dir = '{(root / images).as_posix()}'\n{subset}\n",
        encoding="utf-8",
    )
    return path


def call(*words):
    return CliRunner().invoke(app, ["dataset", *map(str, words)])


def report(*words):
    result = call(*words, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == any(one["stops"] for one in found["problems"]), result.output
    return found


def kinds(found):
    """{kind: {name of the file: text}}."""
    named = {}
    for problem in found["problems"]:
        name = problem["file"].replace("\\", "/").rpartition("/")[2]
        named.setdefault(problem["kind"], {})[name] = problem["text"]
        assert problem["stops"] == (problem["kind"] in STOPS)
    return named


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A folder with one of everything that can be wrong."""
    root = tmp_path_factory.mktemp("broken")
    images = root / "images"
    for i in range(4):
        put(images / f"good{i}.png", smooth(i), f"good, number {i}")
    jpeg = put(images / "cut.jpg", smooth(10))
    jpeg.write_bytes(jpeg.read_bytes()[: jpeg.stat().st_size // 2])
    put(images / "zero.png", smooth(11)).write_bytes(b"")
    (images / "text.png").write_text("no image")
    (images / "text.txt").write_text("a caption")
    exif = Image.Exif()
    exif[0x0112] = 6
    put(images / "rotated.jpg", smooth(12), exif=exif)
    put(images / "tiny.png", smooth(13, (24, 24)))
    put(images / "wide.png", smooth(14, (400, 60)))
    put(images / "needle.png", Image.new("RGB", (200_000, 1)))
    shutil.copy(images / "good0.png", images / "same.png")
    (images / "same.txt").write_text("other words")
    put(images / "near.jpg", smooth(1).resize((80, 80)), quality=60)
    put(images / "nocaption.png", smooth(15), None)
    put(images / "empty.png", smooth(16), " \n")
    put(images / "bytes.png", smooth(17)).with_suffix(".txt").write_bytes(b"\xff\xfe\x00")
    clear = smooth(18).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((96, 96)))
    put(images / "clear.png", clear)
    put(images / "cmyk.jpg", smooth(19).convert("CMYK"))
    deep = np.asarray(smooth(20).convert("L")).astype(np.uint16) * 257
    put(images / "deep.png", Image.fromarray(deep))
    frames = [smooth(21), smooth(22)]
    put(images / "moving.webp", frames[0], save_all=True, append_images=frames[1:])
    (images / "orphan.txt").write_text("nobody")
    (images / "picture.gif").write_bytes(b"GIF89a")
    put(images / "more" / "x.png", smooth(23))
    for i, tag in enumerate(("Long Hair", "long_hair", "long hair", "long hair")):
        put(images / f"tag{i}.png", smooth(30 + i), f"{tag}, 1girl")
    config(root)
    return root


def test_every_kind_is_found_and_nothing_else(broken):
    found = kinds(report(broken / "data.toml"))
    names = {kind: set(files) for kind, files in found.items()}
    assert names == {
        "unreadable": {"cut.jpg", "zero.png", "text.png"},
        "narrow": {"needle.png"},
        "unreadable caption": {"bytes.txt"},
        "no caption": {"nocaption.png"},
        "empty caption": {"empty.txt"},
        # A caption of an image that cannot be read is no orphan.
        "orphan caption": {"orphan.txt"},
        "duplicate": {"same.png"},
        "near duplicate": {"near.jpg"},
        "upscaled": {"tiny.png"},
        "crop": {"wide.png"},
        "rotated": {"rotated.jpg"},
        "transparent": {"clear.png"},
        "colours": {"cmyk.jpg", "deep.png"},
        "animated": {"moving.webp"},
        "skipped": {"picture.gif"},
        "subfolder": {"more"},
        "tag spelling": {""},
        "underscore": {"tag1.txt"},
    }
    assert "empty" in found["unreadable"]["zero.png"]
    assert "truncated" in found["unreadable"]["cut.jpg"]
    assert found["duplicate"]["same.png"] == "like good0.png, with another caption"
    assert "24x24 to 64x64: enlarged 2.7x" in found["upscaled"]["tiny.png"]
    assert found["tag spelling"][""] == "long hair (2x), Long Hair (1x), long_hair (1x)"


def test_records_are_those_of_the_plan(broken):
    found = report(broken / "data.toml", "--max_train_epochs=3", "--gradient_accumulation_steps=2")
    # 24 files with an image's ending, of which 3 have no size or no place.
    assert found["plan"]["images"] == len(found["images"]) == 21
    batches = sum(-(-entry["repeats"] // 2) for entry in found["buckets"])
    assert found["plan"]["batches_per_epoch"] == batches
    assert found["plan"]["steps_per_epoch"] == -(-batches // 2)
    assert found["plan"]["steps"] == 3 * found["plan"]["steps_per_epoch"]
    wide = next(image for image in found["images"] if image["file"].endswith("wide.png"))
    width, height = wide["resized"]
    assert wide["cut_off"] == pytest.approx(
        1 - np.prod(wide["bucket"]) / (width * height), abs=1e-3
    )
    assert found["tags"][2:4] == [["good", 4], ["1girl", 4]]
    assert (
        found["tokens"]["counted"] is False and "--t5_tokenizer_path" in found["tokens"]["reason"]
    )


def test_headers_only_does_not_decode(broken):
    found = kinds(report(broken / "data.toml", "--headers_only"))
    assert set(found["unreadable"]) == {"zero.png", "text.png"}
    assert not {"duplicate", "near duplicate", "transparent", "animated"} & set(found)


def test_tables_name_files_and_remedies(broken):
    result = call(broken / "data.toml")
    assert result.exit_code == 1
    for text in ("Images that cannot be read: 3 (training refuses to start)", "cut.jpg: image file",
                 "add a caption file next to each", "64x64", "1girl", "not counted"):  # fmt: skip
        assert text in result.stdout


def test_a_narrow_terminal_breaks_names_only(broken, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    shown = call(broken / "data.toml").output
    assert re.search(r"folder +use +images +repeats +uses", shown)
    rows = [line.strip() for line in shown.splitlines() if "█" in line]
    assert rows and all(re.match(r"\d+x\d+ ", row) for row in rows)


def test_a_clean_dataset_is_clean(tmp_path):
    for i in range(3):
        put(tmp_path / "images" / f"{i}.png", smooth(i, (64, 64)), f"one, {i}")
    result = call(config(tmp_path), "--strict")
    assert result.exit_code == 0 and "No problems found." in result.stdout


def test_training_refuses_what_the_report_says_stops_it(broken):
    """The two say the same: without the named files the plan is built."""
    found = report(broken / "data.toml")
    root = broken.parent / "cleaned"
    shutil.copytree(broken, root)
    for problem in found["problems"]:
        if problem["stops"]:
            path = root / "images" / problem["file"].replace("\\", "/").rpartition("/")[2]
            for other in (path, path.with_suffix(".txt"), path.with_suffix(".png")):
                other.unlink(missing_ok=True)
    plan = build_plan(train_options({"dataset_config": str(config(root))}, root / "out"))
    # The cut-off file, and those whose captions are missing or no text, were among the 21.
    assert len(plan.items) == found["plan"]["images"] - 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent.toml"], "does not exist"),
        (["{root}"], "--train_data_dir"),
        (["{config}", "--html", "{config}/page.html"], "cannot write"),
        ([], "no training data"),
        (["{config}", "--html", "{root}"], "is a folder"),
        (["{config}", "--html", "{config}"], "ends in .html"),
        (["{config}", "--masks", "{config}"], "is a file"),
        (["{config}", "--masks", "{root}/masks"], "no subset has masks"),
        (["{config}", "--t5_tokenizer_path", "{root}/nowhere"], "--t5_tokenizer_path needs"),
        (["{config}", "--html_images", "many"], "whole number"),
        (["{config}", "other.toml"], "unexpected word"),
        (["{config}", "--htlm", "x"], "did you mean 'html'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, words, message):
    put(tmp_path / "images" / "a.png", smooth(1))
    names = {"config": config(tmp_path), "root": tmp_path}
    result = call(*(word.format(**names) for word in words))
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_a_broken_config_is_status_2(tmp_path):
    path = config(tmp_path)
    for text in ("[general]\nresolutoin = 64", "[[datasets]", "[general]\n"):
        path.write_text(text, encoding="utf-8")
        assert call(path).exit_code == 2
    assert call(config(tmp_path, images="absent")).exit_code == 2


def test_only_strict_minds_what_does_not_stop_training(tmp_path):
    put(tmp_path / "images" / "a.png", smooth(1), "one\ntwo")
    assert call(config(tmp_path)).exit_code == 0
    assert call(config(tmp_path), "--strict").exit_code == 1


def test_data_can_be_looked_at_before_the_model_files_are_there(tmp_path):
    put(tmp_path / "images" / "a.png", smooth(1))
    found = report(config(tmp_path), "--qwen3", tmp_path / "nowhere", "--vae", tmp_path / "none")
    assert found["plan"]["images"] == 1 and "does not exist" in found["tokens"]["reason"]


def test_a_relative_folder_is_named_with_what_it_is_relative_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = config(tmp_path)
    path.write_text(path.read_text().replace((tmp_path / "images").as_posix(), "lost"))
    assert f"'lost' does not exist in {Path.cwd()}" in call(path).stderr


def test_lines_that_are_never_trained_are_found(tmp_path):
    put(tmp_path / "images" / "a.png", smooth(1), "first\n\nsecond\nthird\n")
    put(tmp_path / "images" / "b.png", smooth(2), "one\n")
    found = kinds(report(config(tmp_path)))
    assert found == {"further lines": {"a.txt": "2 lines are left out"}}
    assert not kinds(report(config(tmp_path, "enable_wildcard = true")))


def test_nothing_to_train_is_no_clean_dataset(tmp_path):
    put(tmp_path / "images" / "a.png", smooth(1))
    result = call(config(tmp_path, "num_repeats = 0"))
    assert result.exit_code == 2 and "no training images" in result.stderr


def test_folder_layout_and_a_whole_training_command(tmp_path):
    for i in range(3):
        put(tmp_path / "train" / "4_thing" / f"{i}.png", smooth(i), None if i else "x")
        put(tmp_path / "reg" / "1_class" / f"{i}.png", smooth(9 + i), "y")
    (tmp_path / "run.toml").write_text("[a]\nlearning_rate = 1e-4\nnetwork_dim = 8\n")
    found = report(
        "--train_data_dir", tmp_path / "train", "--reg_data_dir", tmp_path / "reg",
        "--resolution=64", "--enable_bucket", "--min_bucket_reso=32", "--train_batch_size", 2,
        "--network_module=networks.lora_anima", "--network_args", "rank_dropout=0.1",
        "--sdpa", "--config_file", tmp_path / "run.toml",
    )  # fmt: skip
    uses = {entry["is_reg"]: entry["uses"] for entry in found["subsets"]}
    assert uses == {False: 12, True: 12}
    assert set(kinds(found)["class caption"]) == {"1.png", "2.png"}


def test_unused_regularisation_and_validation(tmp_path):
    for i in range(4):
        put(tmp_path / "images" / f"{i}.png", smooth(i))
        put(tmp_path / "reg" / f"{i}.png", smooth(20 + i))
        put(tmp_path / "reg" / f"more{i}.png", smooth(40 + i))
    path = config(tmp_path, "validation_split = 0.5")
    with path.open("a") as file:
        file.write(f"[[datasets.subsets]]\nis_reg = true\nimage_dir = '{tmp_path / 'reg'}'\n")
    found = report(path)
    assert found["plan"]["validation_images"] == 2
    assert found["plan"]["unused_regularisation_images"] == 6
    uses = Counter(image["use"] for image in found["images"])
    assert uses == {"training": 2, "regularisation": 2, "validation": 2, "unused": 6}
    assert "6 regularisation images unused" in " ".join(call(path).stdout.split())


def test_page_is_self_contained_and_bounded(broken, tmp_path):
    page = tmp_path / "page.html"
    assert call(broken / "data.toml", "--html", page).exit_code == 1
    text = page.read_text(encoding="utf-8")
    pictures = re.findall(r"url\((data:image/jpeg;base64,[^)]+)\)", text)
    # All but the one that is cut off.
    assert len(pictures) == 20
    assert not re.search(r"(src|href)=|https?://|<script", text)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    for word in ("Images that cannot be read: 3", "zero.png", "wide.png", "Largest crops",
                 'class="cut"', "Same pixels"):  # fmt: skip
        assert word in text
    assert call(broken / "data.toml", "--html", page, "--html_images=5").exit_code == 1
    text = page.read_text(encoding="utf-8")
    assert len(re.findall("data:image/jpeg", text)) == 5 and "5 of them are shown" in text


def test_names_cannot_break_the_page(tmp_path):
    name = "<b>&'x.png"
    put(tmp_path / "images" / name, smooth(1), "<script>alert(1)</script>, b")
    page = tmp_path / "page.html"
    assert call(config(tmp_path), "--html", page).exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and "<b>&" not in text and "&lt;script&gt;" in text


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_names_and_tags_cannot_write_to_the_terminal(tmp_path):
    put(tmp_path / "images" / "a\x1b[31m\nb.png", smooth(1, (9, 9)), "red\x1b[31mtag, b")
    (tmp_path / "images" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    shown = call(config(tmp_path, images="images")).output
    assert "\x1b" not in shown
    assert "a [31m b.png: 9x9" in shown and "red [31mtag" in shown
    assert "gone.png: a link to a file that does not exist" in shown


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux allows such names")
def test_names_that_are_not_unicode_are_shown_with_a_placeholder(tmp_path):
    folder, name = tmp_path / "images", os.fsdecode(b"bad\xff.png")
    for file in (name, "same.png"):
        put(folder / file, smooth(1), "a, b")
    page = tmp_path / "page.html"
    found = report(config(tmp_path), "--html", page)
    assert kinds(found)["duplicate"] == {"same.png": "like bad_.png"}
    assert {"bad_.png", "same.png"} == {Path(image["file"]).name for image in found["images"]}
    assert page.read_text(encoding="utf-8").count("background-image") == 2
    assert "like bad_.png" in call(config(tmp_path)).output


def test_a_tall_thumbnail_does_not_fill_the_screen():
    assert [widest(size) for size in ((64, 64), (10, 1000), (1, 20))] == [176, 8, 12]


def test_a_long_name_is_shortened_in_its_middle():
    assert short_name("folder/a&b.png") == "a&b.png"
    short = short_name("begin" + "x" * 200 + "end.png")
    assert short.startswith("begin") and short.endswith("end.png") and len(short) == 60


def test_an_exif_rotation_that_is_applied_is_no_finding(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    put(tmp_path / "images" / "a.jpg", smooth(1, (120, 60)), exif=exif)
    found = report(config(tmp_path))
    assert "rotated" in kinds(found) and found["images"][0]["size"] == [120, 60]
    found = report(config(tmp_path, "exif_rotation = true"))
    assert "rotated" not in kinds(found)
    assert found["images"][0]["size"] == [60, 120] and found["images"][0]["bucket"] == [48, 80]
    (tmp_path / "page.html").unlink(missing_ok=True)
    assert call(config(tmp_path, "exif_rotation = true"), "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    thumbnail = base64.b64decode(re.search(r"base64,([^)]+)\)", page)[1])
    assert Image.open(io.BytesIO(thumbnail)).size == (60, 120)


def test_shades_cover_what_is_cut_off(tmp_path):
    put(tmp_path / "images" / "wide.png", smooth(1, (400, 60)))
    image = report(config(tmp_path))["images"][0]
    left, top, right, bottom = crop_box(image)
    assert (top, bottom) == (0, 1) and left == pytest.approx(1 - right, abs=0.02)
    kept = (right - left) * (bottom - top)
    assert kept == pytest.approx(1 - image["cut_off"], abs=1e-4)


def test_likeness(tmp_path):
    one, other = smooth(1, (300, 200)), smooth(2, (300, 200))
    copies = {
        "a": one, "b": one.resize((150, 100)), "c": other,
        "d": one.crop((3, 2, 297, 198)), "e": Image.new("RGB", (50, 50), "white"),
        "f": Image.new("RGB", (50, 50), "black"),
    }  # fmt: skip
    paths = {name: put(tmp_path / f"{name}.png", image) for name, image in copies.items()}
    paths["g"] = put(tmp_path / "g.bmp", one)
    looks = {path: look(path) for path in paths.values()}
    sizes = {path: Image.open(path).size for path in paths.values()}
    exact, near = find_duplicates(looks, sizes)
    assert [[path.stem for path in group] for group in exact] == [["a", "g"]]
    # White and black have the same (empty) signature and other colours.
    assert [[path.stem for path in group] for group in near] == [["a", "b", "d"]]
    assert (difference_hash(one) != difference_hash(other)).sum() > 30


def test_spellings():
    counts = Counter({"blue eyes": 3, "blue_eyes": 1, "Blue  Eyes": 1, "blueeyes": 1, "red": 2})
    assert spelling_variants(counts) == [[("blue eyes", 3), ("blue_eyes", 1), ("Blue  Eyes", 1)]]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def test_tokens_are_counted_with_tokenizers(world, tmp_path):
    long = ", ".join(f"word{i}" for i in range(400))
    put(tmp_path / "images" / "long.png", smooth(1), long)
    put(tmp_path / "images" / "short.png", smooth(2), "a cat")
    words = [config(tmp_path), "--qwen3", world["qwen3"], "--t5_tokenizer_path",
             world["t5_tokenizer_path"]]  # fmt: skip
    found = report(*words)
    from anima_fast.models.tokenizers import load_tokenizers

    tokenizers = load_tokenizers(world["qwen3"], t5_tokenizer_path=world["t5_tokenizer_path"])
    by_file = {image["file"].rpartition("/")[2]: image for image in found["images"]}
    assert by_file["short.png"]["t5_tokens"] == tokenizers.t5_lengths(["a cat"])[0]
    entry = found["tokens"]["long"][0]
    count = max(*tokenizers.qwen_lengths([long]), *tokenizers.t5_lengths([long]))
    assert entry["tokens"] == count and entry["lost"] == count - 512
    # What is kept fits, and the lost text is the caption's end.
    kept = long.removesuffix(entry["lost_text"])
    assert kept != long and kept.strip()
    assert tokenizers.qwen_lengths([kept])[0] <= 512 and tokenizers.t5_lengths([kept])[0] <= 513
    assert set(kinds(found)["long caption"]) == {"long.txt"}
    assert "above 512" in call(*words).stdout
    whole = report(*words, "--long_captions=whole")
    assert "lost" not in kinds(whole)["whole caption"]["long.txt"]
    assert "long caption" not in kinds(whole)
    assert "use --long_captions" not in call(*words, "--long_captions=whole").stdout


@pytest.fixture
def masked(tmp_path):
    """Images with a good, a missing, an empty, a full and a squeezed mask."""
    for i, name in enumerate(("good", "missing", "empty", "full", "squeezed")):
        put(tmp_path / "images" / f"{name}.png", smooth(i, (64, 64)))
        mask = np.full((64, 64), {"empty": 0, "full": 255}.get(name, 0), np.uint8)
        if name in ("good", "squeezed"):
            mask[:, :20] = 255
        picture = Image.fromarray(mask)
        if name == "squeezed":
            picture = picture.resize((64, 32))
        if name != "missing":
            put(tmp_path / "masks" / f"{name}.png", picture, None)
    folder = (tmp_path / "masks").as_posix()
    return config(tmp_path, f"conditioning_data_dir = '{folder}'")


def test_masks_are_drawn_and_named(masked, tmp_path):
    out = tmp_path / "drawn"
    found = report(masked, "--masks", out)
    assert sorted(path.name for path in out.iterdir()) == [
        "empty.png.jpg", "full.png.jpg", "good.png.jpg", "squeezed.png.jpg",
    ]  # fmt: skip
    named = kinds(found)
    assert set(named["missing mask"]) == {"missing.png"}
    assert set(named["empty mask"]) == {"empty.png"} and set(named["full mask"]) == {"full.png"}
    assert set(named["mask aspect"]) == {"squeezed.png"}
    trained = {mask["mask"]: mask["trained"] for mask in found["masks"]}
    # 20 of 64 columns: two whole cells of eight and half of the third.
    assert trained["good.png"] == pytest.approx(20 / 64, abs=0.01)
    assert any("--masked_loss" in notice for notice in found["notices"])
    (notice,) = report(masked, "--masks", out, "--masked_loss")["notices"]
    assert notice == "masks for 4 of 5 images; the others are trained in full"
    red = np.asarray(Image.open(out / "good.png.jpg").convert("RGB")).astype(int)
    plain = np.asarray(Image.open(tmp_path / "images" / "good.png").convert("RGB")).astype(int)
    # Trained columns look as they are, the others are darkened towards red.
    assert np.abs(red[:, :14] - plain[:, :14]).mean() < 6
    assert np.abs(red[:, 30:] - plain[:, 30:]).mean() > 30


def test_alpha_masks_are_those_of_training(tmp_path):
    """The cells are the factors that the loss applies to the batch's mask."""
    import torch

    from anima_fast.data.batches import Batches
    from anima_fast.data.encode import EncodedDataset
    from anima_fast.models.flow import mask_cells

    image = smooth(1, (96, 64)).convert("RGBA")
    image.putalpha(Image.radial_gradient("L").resize((96, 64)))
    put(tmp_path / "images" / "a.png", image)
    path = config(tmp_path, "alpha_mask = true")
    options = train_options(
        {"dataset_config": str(path)}, tmp_path, cache_latents=False,
        cache_text_encoder_outputs=False,
    )  # fmt: skip
    plan = build_plan(options)
    encoded = EncodedDataset("live", "live", torch.device("cpu"), None)
    batch = Batches(plan, encoded, options, seed=0).load([0], epoch=1, step=0)
    height, width = batch.pixels.shape[-2:]
    wanted = mask_cells(batch.masks, (height // 8, width // 8))[0, 0].numpy()
    np.testing.assert_array_equal(loss_cells(batch.masks[0, 0].numpy()), wanted)
    assert 0 < wanted.min() < wanted.max() < 1
    found = report(path, "--masks", tmp_path / "drawn")
    assert found["masks"][0]["trained"] == pytest.approx(wanted.mean(), abs=1e-3)
    assert "transparent" not in kinds(found)


def test_overlay_draws_a_line_between_cells():
    pixels = np.full((16, 32, 3), 200, np.uint8)
    cells = np.float32([[1, 1, 0, 0], [1, 1, 0, 0]])
    shown = overlay(pixels, cells)
    assert (shown[:, :16] == 200).all()
    assert (shown[:, 16] == (255, 220, 0)).all()
    assert (shown[:, 17:, 1] < 120).all()


def test_health_is_capped_and_true(broken, tmp_path, monkeypatch):
    for i in range(5):
        put(tmp_path / "images" / f"{i}.png", smooth(i, (20, 20)), None if i < 3 else "  ")
    options = train_options(
        {"dataset_config": str(config(tmp_path, "class_tokens = 'x'"))}, tmp_path
    )
    monkeypatch.setattr(health, "MOST_FILES", 2)
    path = health.write_health(tmp_path / "out", build_plan(options))
    found = json.loads(path.read_text(encoding="utf-8"))
    assert path.name == "dataset.json" and found["images"] == 5
    captions = found["captions"]
    assert len(captions["missing"]) == 2 and captions["missing_total"] == 3
    assert len(captions["empty"]) == 2 and captions["empty_total"] == 2
    assert len(found["problems"]) == 2
    # Three class captions, two empty files, five enlarged images.
    assert found["problems_total"] == 3 + 2 + 5
    assert found["buckets"] == [
        {"width": 64, "height": 64, "images": 5, "repeats": 5, "dataset": 0}
    ]
    assert found["tags"] == [["x", 5]] and found["subsets"][0]["images"] == 5


def test_training_writes_health_with_token_counts(world, tmp_path):
    from anima_fast.training.loop import train

    train(train_options(world, tmp_path / "out", max_train_epochs=1))
    found = json.loads((tmp_path / "out" / "dataset.json").read_text(encoding="utf-8"))
    assert found["images"] == 5 and found["captions"]["count"] == 5
    assert found["captions"]["long"] == [] and found["batches_per_epoch"] >= 3


def test_the_help_page_has_every_option_of_masks():
    result = CliRunner().invoke(app, ["dataset", "--help"], env={"COLUMNS": "200"})
    for name in ("masked_loss", "alpha_mask", "masked_loss_normalize"):
        assert f"--{name}" in result.output.split(), name
