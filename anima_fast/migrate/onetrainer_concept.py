"""One concept of OneTrainer: a folder, its captions and how its images are changed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anima_fast.data.layouts import image_extensions
from anima_fast.errors import UserError
from anima_fast.migrate.ledger import Ledger
from anima_fast.migrate.paths import Paths
from anima_fast.migrate.values import is_off

_DROPOUT = "the rate of a dropout"
# Key of a concept -> what it became.
_TAKEN = {
    "path": "image_dir", "enabled": "a subset", "balancing_strategy": "num_repeats",
    "text.prompt_source": "caption files", "text.prompt_path": "class_tokens",
    "text.enable_tag_shuffling": "shuffle_caption", "text.keep_tags_count": "keep_tokens",
    "text.tag_delimiter": "caption_separator", "text.tag_dropout_enable": _DROPOUT,
    "text.tag_dropout_mode": _DROPOUT, "text.tag_dropout_probability": _DROPOUT,
    "text_variations": "caption_variants", "image.enable_random_flip": "flip_aug",
    "image.resolution_override": "resolution of a dataset",
    "image.enable_resolution_override": "resolution of a dataset",
}  # fmt: skip
# A key that says nothing unless another one is on.
_NEEDS = {
    "image.resolution_override": "image.enable_resolution_override",
    "text.tag_dropout_mode": "text.tag_dropout_enable",
    "text.tag_dropout_probability": "text.tag_dropout_enable",
    "text.tag_dropout_special_tags_mode": "text.tag_dropout_enable",
    "text.caps_randomize_mode": "text.caps_randomize_enable",
    "text.keep_tags_count": "text.enable_tag_shuffling",
    "text.tag_delimiter": "text.enable_tag_shuffling",
    "text_variations": "text.enable_tag_shuffling",
    "image.random_rotate_max_angle": "image.enable_random_rotate",
}  # fmt: skip
_NO_COUNTERPART = {
    "image.enable_crop_jitter": "crops are centred here, as latents are cached",
    "image_variations": "latents are cached once here, and mirrored with flip_aug",
}
_PRIOR = "it is trained towards the base model's own predictions, which does not exist here"


def read_resolutions(text: str) -> list[list[int]]:
    """`512`, `512,768` or `1024x768` as [width, height]."""
    found = []
    for part in filter(None, (p.strip() for p in text.lower().split(","))):
        sides = part.split("x")
        if not 1 <= len(sides) <= 2 or not all(s.strip().isdigit() and int(s) >= 16 for s in sides):
            raise UserError(f"resolution {text!r}: expected sides such as 512, 512,768 or 1024x768")
        width, height = int(sides[0]), int(sides[-1])
        found.append([width, height])
    if not found:
        raise UserError("resolution is empty: expected a side such as 1024")
    return found


class Concept:
    """One concept: settles its keys, and gives its subsets."""

    def __init__(
        self, concept: Mapping[str, Any], prefix: str, ledger: Ledger, paths: Paths
    ) -> None:
        self.concept, self.prefix, self.ledger = concept, prefix, ledger
        self.text = ledger.table(f"{prefix}text", {f"{prefix}text": concept.get("text")})
        self.image = ledger.table(f"{prefix}image", {f"{prefix}image": concept.get("image")})
        self.name = str(concept.get("name") or concept.get("path") or prefix)
        self.folder, self.why = paths.resolve(str(concept.get("path", "")))
        self._found: list[dict[str, Any]] | None = None

    def is_used(self) -> bool:
        """Whether it is trained on; the keys of one that is not are dropped here."""
        if self.concept.get("enabled", True) is False:
            why = "the concept is switched off"
        elif self.concept.get("validation_concept") or self.concept.get("type") == "VALIDATION":
            why = "it is for validation, which holds out a part of the training images here"
        elif self.concept.get("type") == "PRIOR_PREDICTION":
            why = _PRIOR
            self.ledger.todo.append(
                f"{self.name}: {_PRIOR}; a subset with is_reg = true is the nearest"
            )
        else:
            return True
        for key in self.ledger.open_keys(self.prefix):
            self.ledger.drop(key, why)
        return False

    def resolutions(self) -> list[list[int]]:
        """Its own sizes, if it has some."""
        if not self.image.get("enable_resolution_override"):
            return []
        return read_resolutions(str(self.image.get("resolution_override", "512")))

    def subsets(self) -> list[dict[str, Any]]:
        """One subset for each folder with images."""
        if self._found is None:
            folders = self._folders()
            shared = {"num_repeats": self._repeats(folders), **self._captions()}
            if self.image.get("enable_random_flip", True):
                shared["flip_aug"] = True
            self._found = [{"image_dir": folder, **shared} for folder in folders]
        return self._found

    def _key(self, name: str) -> str:
        return f"{self.prefix}{name}"

    def _folders(self) -> list[str]:
        if not self.folder:
            raise UserError(f"the concept {self.name!r} has no path")
        key = self._key("path")
        if self.why and self.ledger.has(key):
            self.ledger.change(key, None, None, f"image_dir {self.folder}: {self.why}")
        key = self._key("include_subdirectories")
        if not self.concept.get("include_subdirectories"):
            return [self.folder]
        folders = [str(f) for f in _folders_with_images(Path(self.folder))]
        if not folders:
            self.ledger.todo.append(
                f"{self.name}: add a subset for each folder below {self.folder}"
            )
        if self.ledger.has(key):
            self.ledger.change(key, None, None, "each folder with images is a subset here")
        return folders or [self.folder]

    def _repeats(self, folders: list[str]) -> int:
        """balancing: repeats, or a number of images an epoch."""
        key = "repeats" if "repeats" in self.concept else "balancing"
        value = self.ledger.number(self._key(key), 1.0)
        if self.concept.get("balancing_strategy") == "SAMPLES":
            count = sum(_images(Path(folder)) for folder in folders)
            repeats = max(1, round(value / count)) if count else 1
            why = f"num_repeats {repeats}: {value:g} images an epoch, of {count} there"
        else:
            repeats = max(1, round(value))
            why = f"num_repeats {repeats}: repeats are whole numbers here"
        key = self._key(key)
        if self.ledger.has(key) and repeats != value:
            self.ledger.change(key, None, None, why)
            self.ledger.todo.append(f"{self.name}: {why}")
        elif self.ledger.has(key):
            self.ledger.take_elsewhere(key, "num_repeats")
        return repeats

    def _captions(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        text = self.text
        if text.get("enable_tag_shuffling"):
            found |= {"shuffle_caption": True, "keep_tokens": int(text.get("keep_tags_count", 1))}
            delimiter = str(text.get("tag_delimiter", ",")).strip()
            if delimiter not in ("", ","):
                found["caption_separator"] = delimiter
            self._variants()
        rate = text.get("tag_dropout_probability") or 0.0
        if text.get("tag_dropout_enable") and rate:
            whole = str(text.get("tag_dropout_mode", "FULL")) == "FULL"
            found["caption_dropout_rate" if whole else "caption_tag_dropout_rate"] = float(rate)
            key = self._key("text.tag_dropout_mode")
            if "WEIGHTED" in str(text.get("tag_dropout_mode")) and self.ledger.has(key):
                self.ledger.change(key, None, None, "every tag has the same chance here")
        source = str(text.get("prompt_source", "sample"))
        if source == "concept":
            found |= self._single_prompt()
        elif source == "filename":
            self.ledger.todo.append(f"{self.name}: write captions, which were file names there")
        return found

    def _variants(self) -> None:
        """The renderings of a shuffled caption: one number for all concepts here."""
        number = int(self.ledger.number(self._key("text_variations"), 1))
        if number > int(self.ledger.options.get("caption_variants", 1)):
            self.ledger.put("caption_variants", number, "the most text_variations of a concept")

    def _single_prompt(self) -> dict[str, Any]:
        """One text file for all images: its line is the caption of images without one."""
        path = Path(str(self.text.get("prompt_path", "")))
        lines = []
        if path.is_file():
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if line]
        if len(lines) == 1:
            return {"class_tokens": lines[0]}
        self.ledger.todo.append(
            f"{self.name}: its captions are the lines of {path}, drawn at random: write one "
            "caption file each image, or class_tokens for all"
        )
        return {}

    def close(self) -> None:
        """Settle the keys that are left."""
        for key in self.ledger.open_keys(self.prefix):
            name = key.removeprefix(self.prefix)
            value = self.ledger.get(key)
            if name in _NEEDS and is_off(self.ledger.get(self._key(_NEEDS[name]))):
                self.ledger.drop(key, f"{_NEEDS[name].rpartition('.')[2]} is off")
            elif name == "text.prompt_source" and value == "filename":
                self.ledger.drop(key, "captions are files here")
            elif name in _TAKEN and not is_off(value):
                self.ledger.take_elsewhere(key, _TAKEN[name])
            elif name == "loss_weight" and value != 1:
                self.ledger.drop(key, "only regularisation images have a weight (is_reg)")
                self.ledger.todo.append(f"{self.name}: loss_weight {value} has no counterpart")
            elif name in ("name", "seed", "validation_concept", "type", "__version"):
                self.ledger.drop(key, "a label, which nothing here needs")
            else:
                off = is_off(value) or (value in (1, "1") and value is not True)
                why = _NO_COUNTERPART.get(name, "it has no counterpart here")
                self.ledger.drop(key, "it is off" if off else why)


def _folders_with_images(root: Path) -> list[Path]:
    return [Path(f) for f, _, names in sorted(os.walk(root)) if any(map(_is_image, names))]


def _images(folder: Path) -> int:
    return sum(_is_image(p.name) for p in folder.iterdir()) if folder.is_dir() else 0


def _is_image(name: str) -> bool:
    return name.lower().endswith(image_extensions()) and "-masklabel." not in name
