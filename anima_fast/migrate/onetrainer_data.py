"""OneTrainer's concepts as a dataset file of ours, and its samples as prompts of previews.

A concept is a folder. Several resolutions mean there that each image gets one of them at random;
here each resolution is a dataset with all images, so epochs are fewer by as much.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from anima_fast.data.layouts import image_extensions
from anima_fast.errors import UserError
from anima_fast.migrate.datasets import dataset_entry, joined
from anima_fast.migrate.ledger import DEFAULT, OFF, Ledger, is_rows
from anima_fast.migrate.paths import find_base, resolve
from anima_fast.migrate.source import Source, find_file, parse_file

# OneTrainer's widest bucket.
RATIO = 4.0
RESOLUTION, EPOCHS = "512", 100
CONCEPTS_FILE, SAMPLES_FILE = "training_concepts/concepts.json", "training_samples/samples.json"
FILE = "the dataset file"
# Key of a sample -> the mark of a preview's prompt.
MARKS = {
    "negative_prompt": "n", "width": "w", "height": "h", "seed": "d", "diffusion_steps": "s",
    "cfg_scale": "l",
}  # fmt: skip
_PRIOR = "it is trained towards the base model's own predictions, which does not exist here"
# Keys of a concept without a counterpart.
_DROPPED = {
    "image.enable_crop_jitter": "crops are centred here, as latents are cached",
    "image_variations": "latents are cached once here, and mirrored with flip_aug",
}
# The data's keys outside the concepts.
_OPTIONS = {
    "resolution": "resolution",
    "batch_size": "train_batch_size",
    "aspect_ratio_bucketing": "enable_bucket",
}
Sizes = list[tuple[int, int]]


def convert_concepts(source: Source, ledger: Ledger) -> None:
    """Settle the concepts, in the configuration or in a file of their own, and the data's keys."""
    rows, prefix = _rows(source, ledger, "concepts", "concept_file_name", CONCEPTS_FILE)
    sizes = _sizes(str(ledger.get("resolution", RESOLUTION)))
    ledger.add("the only one there", caption_extension=".txt")
    if rows is None:
        _as_options(ledger, sizes)
        return
    if len(sizes) > 1:
        why = "a dataset each, with all images; there each image gets one of them at random"
        ledger.place(FILE, "resolution", why=why)
    ledger.place(FILE, *_OPTIONS)
    if not ledger.get("resolution"):
        ledger.add(DEFAULT, resolution=RESOLUTION)
    base = find_base([str(row.get("path", "")) for row in rows], source.folders)
    concepts = [_Concept(row, f"{prefix}[{i}].", ledger, base) for i, row in enumerate(rows)]
    used = [concept for concept in concepts if concept.is_used()]
    parts, counts = [], set()
    for concept in used:
        own, subsets = concept.sizes() or sizes, concept.subsets()
        counts.add(len(own))
        parts += [(_entry(ledger, size), subset) for size in own for subset in subsets]
        concept.close()
    if not used:
        raise UserError("no concept is switched on and for training: there is nothing to train on")
    ledger.dataset = {"general": {"caption_extension": ".txt"}, "datasets": joined(parts)}
    _epochs(ledger, counts, len(sizes))
    if ledger.on("masked_training"):
        ledger.drop("its masks lie beside the images as NAME-masklabel.png", "masked_training")
        ledger.todo.append(
            "masked training: move every NAME-masklabel.png to a folder of its own as NAME.png, "
            "name that folder in conditioning_data_dir of the subsets, and set masked_loss = true"
        )


def _rows(
    source: Source, ledger: Ledger, name: str, file_key: str, default_file: str
) -> tuple[list[Mapping[str, Any]] | None, str]:
    """Concepts or samples, and what their keys begin with in the ledger; None when not found."""
    packed = source.config.get(name)
    if is_rows(packed):
        ledger.drop(f"the {name} stand in this file", file_key)
        return packed, name
    ledger.drop(OFF, name)
    found = find_file(ledger.text(file_key, default_file), source.folders)
    if found is None:
        ledger.drop("it was not found", file_key)
        return None, ""
    rows = parse_file(found)
    if not is_rows(rows) and rows != []:
        raise UserError(f"{found.name} is no list of {name}")
    ledger.place(f"the {name} in it", file_key)
    ledger.extend({name: rows}, f"{found.name}: ")
    return rows, f"{found.name}: {name}"


def _sizes(text: str) -> Sizes:
    """`512`, `512,768` or `1024x768` as width and height."""
    found = []
    for part in filter(None, (p.strip() for p in text.lower().split(","))):
        sides = part.split("x")
        if not 1 <= len(sides) <= 2 or not all(s.strip().isdigit() and int(s) >= 16 for s in sides):
            raise UserError(f"resolution {text!r}: expected sides such as 512, 512,768 or 1024x768")
        found.append((int(sides[0]), int(sides[-1])))
    if not found:
        raise UserError("resolution is empty: expected a side such as 1024")
    return found


def _entry(ledger: Ledger, size: tuple[int, int]) -> dict[str, Any]:
    """The keys of a dataset at one resolution; fixed sizes have no buckets there either."""
    bucketed = ledger.get("aspect_ratio_bucketing", True) and size[0] == size[1]
    batch = max(1, ledger.whole("batch_size", 1))
    return dataset_entry(size, batch, [RATIO] if bucketed else [])


def _as_options(ledger: Ledger, sizes: Sizes) -> None:
    """Without concepts: the data's keys as the options that are a dataset file's defaults."""
    named = ledger.text("concept_file_name", CONCEPTS_FILE)
    ledger.todo.append(
        f"the concepts in {named} were not found: give --cwd FOLDER, OneTrainer's folder, or "
        "write dataset_config by hand"
    )
    if len(sizes) > 1:
        ledger.todo.append(f"only the first resolution is set, of {ledger.get('resolution')}")
    entry = _entry(ledger, sizes[0])
    ledger.options["resolution"] = str(entry.pop("resolution")).strip("[]").replace(" ", "")
    ledger.options["train_batch_size"] = entry.pop("batch_size")
    ledger.options |= entry
    for key, option in _OPTIONS.items():
        ledger.place(option, key)


def _epochs(ledger: Ledger, counts: set[int], usual: int) -> None:
    """An epoch has every image at all of its resolutions here, so there are fewer epochs."""
    shared = usual if usual in counts else max(counts)
    if shared > 1:
        fewer = max(1, math.ceil(ledger.whole("epochs", EPOCHS) / shared))
        why = f"an epoch has every image at {shared} resolutions here, so it is as much longer"
        ledger.take("epochs", "max_train_epochs", fewer, why, default=why)
    if len(counts) > 1:
        ledger.todo.append(
            f"the number of epochs is that of concepts with {shared} resolutions: adapt "
            "num_repeats of the others, as an epoch has an image at all of its resolutions here"
        )


class _Concept:
    """One concept: settles its keys, which begin with `prefix`, and gives its subsets."""

    def __init__(
        self, row: Mapping[str, Any], prefix: str, ledger: Ledger, base: Path | None
    ) -> None:
        self.prefix, self.ledger = prefix, ledger
        self.name = str(row.get("name") or row.get("path") or prefix)
        self.folder, self.moved = resolve(str(row.get("path", "")), base)

    def use(self, key: str, default: Any = None) -> Any:
        """The value of a key, which the dataset file takes over unless it is off."""
        if self.ledger.on(f"{self.prefix}{key}"):
            self.ledger.place(FILE, f"{self.prefix}{key}")
        return self.ledger.get(f"{self.prefix}{key}", default)

    def todo(self, text: str) -> None:
        self.ledger.todo.append(f"{self.name}: {text}")

    def is_used(self) -> bool:
        """Whether it is trained on; the keys of one that is not are dropped here."""
        kind = self.ledger.get(f"{self.prefix}type")
        if self.use("enabled", True) is False:
            why = "the concept is switched off"
        elif self.ledger.get(f"{self.prefix}validation_concept") or kind == "VALIDATION":
            why = "it is for validation, which holds out a part of the training images here"
        elif kind == "PRIOR_PREDICTION":
            why = _PRIOR
            self.todo(f"{_PRIOR}; a subset with is_reg = true is the nearest")
        else:
            return True
        self.ledger.drop(why, *self.ledger.open_keys(self.prefix))
        return False

    def sizes(self) -> Sizes:
        """Its own sizes, if it has some."""
        own = self.use("image.enable_resolution_override")
        return _sizes(str(self.use("image.resolution_override", "512"))) if own else []

    def subsets(self) -> list[dict[str, Any]]:
        """One subset for each folder with images."""
        folders = self._folders()
        shared = {"num_repeats": self._repeats(folders), **self._captions()}
        if self.use("image.enable_random_flip", True):
            shared["flip_aug"] = True
        return [{"image_dir": folder, **shared} for folder in folders]

    def _folders(self) -> list[str]:
        if not self.folder:
            raise UserError(f"the concept {self.name!r} has no path")
        new = self.folder if self.moved else None
        self.ledger.place("image_dir", f"{self.prefix}path", why=self.moved, new=new)
        key = f"{self.prefix}include_subdirectories"
        if not self.ledger.get(key):
            return [self.folder]
        self.ledger.place(FILE, key, why="each folder with images is a subset here")
        walk = sorted(os.walk(self.folder))
        folders = [str(Path(f)) for f, _, names in walk if any(map(_is_image, names))]
        if not folders:
            self.todo(f"add a subset for each folder below {self.folder}")
        return folders or [self.folder]

    def _repeats(self, folders: list[str]) -> int:
        """balancing: repeats, or a number of images an epoch."""
        key = f"{self.prefix}repeats"
        key = key if self.ledger.has(key) else f"{self.prefix}balancing"
        value = self.ledger.number(key, 1.0)
        repeats, why = max(1, round(value)), "repeats are whole numbers here"
        if self.use("balancing_strategy") == "SAMPLES":
            files = [p.name for f in folders if os.path.isdir(f) for p in Path(f).iterdir()]
            count = sum(map(_is_image, files))
            repeats = max(1, round(value / count)) if count else 1
            why = f"{value:g} images an epoch, of {count} there"
        if self.ledger.has(key) and repeats != value:
            self.ledger.place("num_repeats", key, why=why, new=repeats)
            self.todo(f"num_repeats {repeats}: {why}")
        self.ledger.place("num_repeats", key)
        return repeats

    def _captions(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.use("text.enable_tag_shuffling"):
            keep = int(self.use("text.keep_tags_count", 1))
            found |= {"shuffle_caption": True, "keep_tokens": keep}
            delimiter = str(self.use("text.tag_delimiter", ",")).strip()
            if delimiter not in ("", ","):
                found["caption_separator"] = delimiter
            # One number for all concepts here.
            number = int(self.use("text_variations", 1))
            if number > int(self.ledger.options.get("caption_variants", 1)):
                why = "the most text_variations of a concept"
                self.ledger.put(why, caption_variants=number)
        if self.use("text.tag_dropout_enable"):
            rate = float(self.use("text.tag_dropout_probability") or 0)
            key = f"{self.prefix}text.tag_dropout_mode"
            mode = str(self.ledger.get(key, "FULL"))
            option = "caption_dropout_rate" if mode == "FULL" else "caption_tag_dropout_rate"
            if rate:
                found[option] = rate
            if rate and "WEIGHTED" in mode:
                self.ledger.place(option, key, why="every tag has the same chance here")
            self.ledger.place(option, key)
        key = f"{self.prefix}text.prompt_source"
        prompts, source = self.use("text.prompt_path"), self.ledger.get(key)
        if source == "filename":
            self.ledger.drop("captions are files here", key)
            self.todo("write captions, which were file names there")
        elif self.use("text.prompt_source") == "concept":
            found |= self._single_prompt(Path(str(prompts or "")))
        return found

    def _single_prompt(self, path: Path) -> dict[str, Any]:
        """One text file for all images: its line is the caption of images without one."""
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if len(lines) == 1:
            return {"class_tokens": lines[0]}
        self.todo(
            f"its captions are the lines of {path}, drawn at random: write one caption file each "
            "image, or class_tokens for all"
        )
        return {}

    def close(self) -> None:
        """Drop the keys that are left: a weight of 1 and one variation change nothing."""
        for key in self.ledger.open_keys(self.prefix):
            value = self.ledger.get(key)
            if value in (1, "1") and value is not True:
                self.ledger.drop(OFF, key)
            elif key == f"{self.prefix}loss_weight":
                self.ledger.drop("only regularisation images have a weight (is_reg)", key)
                self.todo(f"loss_weight {value} has no counterpart")
        self.ledger.close(_DROPPED, self.prefix)


def _is_image(name: str) -> bool:
    return name.lower().endswith(image_extensions()) and "-masklabel." not in name


def convert_samples(source: Source, ledger: Ledger) -> None:
    """Settle the samples, in the configuration or a file of their own, and when they are made."""
    file_key = "sample_definition_file_name"
    rows, prefix = _rows(source, ledger, "samples", file_key, SAMPLES_FILE)
    prompts = []
    for i, row in enumerate(rows or []):
        if row.get("enabled", True) and row.get("prompt"):
            prompts.append(" ".join(_line(row)))
            if _is_random(row):
                ledger.drop("a random seed is drawn, there and here", f"{prefix}[{i}].seed")
            names = (f"{prefix}[{i}].{name}" for name in (*MARKS, "prompt", "random_seed"))
            ledger.place("sample_prompt", *names)
        why = "it is switched off, or has no counterpart here"
        ledger.drop(why, *ledger.open_keys(f"{prefix}[{i}]."))
    unit = ledger.text("sample_after_unit", "MINUTE")
    if not prompts or unit == "NEVER":
        return
    ledger.put("the samples", sample_prompt=prompts)
    option, number, why = "sample_every_n_epochs", max(1, ledger.whole("sample_after", 10)), ""
    if unit == "STEP":
        option = "sample_every_n_steps"
    elif unit != "EPOCH":
        number, why = 1, "previews come by epochs here"
    ledger.take("sample_after", option, number, why, why or DEFAULT)


def _is_random(row: Mapping[str, Any]) -> bool:
    return bool(row.get("random_seed")) or int(row.get("seed") or 0) < 0


def _line(row: Mapping[str, Any]) -> Iterator[str]:
    """A prompt and its settings behind it, without a random seed."""
    yield " ".join(str(row["prompt"]).split())
    for key, mark in MARKS.items():
        value = row.get(key)
        if value not in (None, "") and not (key == "seed" and _is_random(row)):
            yield f"--{mark} {' '.join(str(value).split())}"
