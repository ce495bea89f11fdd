"""One concept of OneTrainer: a folder, its captions and how its images are changed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anima_fast.data.layouts import image_extensions
from anima_fast.errors import UserError
from anima_fast.migrate.ledger import Ledger, is_off
from anima_fast.migrate.paths import Paths
from anima_fast.migrate.rows import reasons

# Keys of a concept that are in its subsets, where they are on.
_TAKEN = frozenset({
    "path", "enabled", "balancing_strategy", "text.prompt_source", "text.prompt_path",
    "text_variations", "text.enable_tag_shuffling", "text.keep_tags_count", "text.tag_delimiter",
    "text.tag_dropout_enable", "text.tag_dropout_mode", "text.tag_dropout_probability",
    "image.enable_random_flip", "image.resolution_override", "image.enable_resolution_override",
})  # fmt: skip
# A key that says nothing unless another one is on.
_NEEDS = reasons({
    "image.enable_resolution_override": "image.resolution_override",
    "image.enable_random_rotate": "image.random_rotate_max_angle",
    "text.tag_dropout_enable": "text.tag_dropout_mode text.tag_dropout_probability "
        "text.tag_dropout_special_tags_mode",
    "text.caps_randomize_enable": "text.caps_randomize_mode",
    "text.enable_tag_shuffling": "text.keep_tags_count text.tag_delimiter text_variations",
})  # fmt: skip
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
        found.append([int(sides[0]), int(sides[-1])])
    if not found:
        raise UserError("resolution is empty: expected a side such as 1024")
    return found


class Concept:
    """One concept: settles its keys, which begin with `prefix`, and gives its subsets."""

    def __init__(
        self, concept: Mapping[str, Any], prefix: str, ledger: Ledger, paths: Paths
    ) -> None:
        self.concept, self.prefix, self.ledger = concept, prefix, ledger
        self.text: Mapping[str, Any] = concept.get("text") or {}
        self.image: Mapping[str, Any] = concept.get("image") or {}
        self.name = str(concept.get("name") or concept.get("path") or prefix)
        self.folder, self.moved = paths.resolve(str(concept.get("path", "")))

    def is_used(self) -> bool:
        """Whether it is trained on; the keys of one that is not are dropped here."""
        kind = self.concept.get("type")
        if self.concept.get("enabled", True) is False:
            why = "the concept is switched off"
        elif self.concept.get("validation_concept") or kind == "VALIDATION":
            why = "it is for validation, which holds out a part of the training images here"
        elif kind == "PRIOR_PREDICTION":
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
        folders = self._folders()
        shared = {"num_repeats": self._repeats(folders), **self._captions()}
        if self.image.get("enable_random_flip", True):
            shared["flip_aug"] = True
        return [{"image_dir": folder, **shared} for folder in folders]

    def _folders(self) -> list[str]:
        if not self.folder:
            raise UserError(f"the concept {self.name!r} has no path")
        if self.moved:
            self.ledger.explain(f"{self.prefix}path", f"image_dir {self.folder}: {self.moved}")
        if not self.concept.get("include_subdirectories"):
            return [self.folder]
        key = f"{self.prefix}include_subdirectories"
        self.ledger.explain(key, "each folder with images is a subset here")
        walk = sorted(os.walk(self.folder))
        folders = [str(Path(f)) for f, _, names in walk if any(map(_is_image, names))]
        if not folders:
            self.ledger.todo.append(
                f"{self.name}: add a subset for each folder below {self.folder}"
            )
        return folders or [self.folder]

    def _repeats(self, folders: list[str]) -> int:
        """balancing: repeats, or a number of images an epoch."""
        key = f"{self.prefix}{'repeats' if 'repeats' in self.concept else 'balancing'}"
        value = self.ledger.number(key, 1.0)
        repeats = max(1, round(value))
        why = "repeats are whole numbers here"
        if self.concept.get("balancing_strategy") == "SAMPLES":
            files = [p.name for f in folders if os.path.isdir(f) for p in Path(f).iterdir()]
            count = sum(map(_is_image, files))
            repeats = max(1, round(value / count)) if count else 1
            why = f"{value:g} images an epoch, of {count} there"
        why = f"num_repeats {repeats}: {why}"
        if self.ledger.has(key) and repeats != value:
            self.ledger.explain(key, why)
            self.ledger.todo.append(f"{self.name}: {why}")
        self.ledger.place(key, "num_repeats")
        return repeats

    def _captions(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        text = self.text
        if text.get("enable_tag_shuffling"):
            found |= {"shuffle_caption": True, "keep_tokens": int(text.get("keep_tags_count", 1))}
            delimiter = str(text.get("tag_delimiter", ",")).strip()
            if delimiter not in ("", ","):
                found["caption_separator"] = delimiter
            # One number for all concepts here.
            number = self.ledger.whole(f"{self.prefix}text_variations", 1)
            if number > int(self.ledger.options.get("caption_variants", 1)):
                why = "the most text_variations of a concept"
                self.ledger.put("caption_variants", number, why)
        rate = text.get("tag_dropout_probability") or 0.0
        if text.get("tag_dropout_enable") and rate:
            mode = str(text.get("tag_dropout_mode", "FULL"))
            whole = mode == "FULL"
            found["caption_dropout_rate" if whole else "caption_tag_dropout_rate"] = float(rate)
            if "WEIGHTED" in mode:
                why = "every tag has the same chance here"
                self.ledger.explain(f"{self.prefix}text.tag_dropout_mode", why)
        source = str(text.get("prompt_source", "sample"))
        if source == "concept":
            found |= self._single_prompt()
        elif source == "filename":
            self.ledger.drop(f"{self.prefix}text.prompt_source", "captions are files here")
            self.ledger.todo.append(f"{self.name}: write captions, which were file names there")
        return found

    def _single_prompt(self) -> dict[str, Any]:
        """One text file for all images: its line is the caption of images without one."""
        path = Path(str(self.text.get("prompt_path", "")))
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
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
            name, value = key.removeprefix(self.prefix), self.ledger.get(key)
            needs = _NEEDS.get(name, "")
            if needs and not self.ledger.on(f"{self.prefix}{needs}"):
                self.ledger.drop(key, f"{needs.rpartition('.')[2]} is off")
            elif name in _TAKEN and not is_off(value):
                self.ledger.place(key, "the dataset file")
            elif name == "loss_weight" and value != 1:
                self.ledger.drop(key, "only regularisation images have a weight (is_reg)")
                self.ledger.todo.append(f"{self.name}: loss_weight {value} has no counterpart")
            elif value in (1, "1") and value is not True:
                # One variation is none, and a weight of 1 changes nothing.
                self.ledger.drop(key, "it is off")
        self.ledger.close(_NO_COUNTERPART, self.prefix)


def _is_image(name: str) -> bool:
    return name.lower().endswith(image_extensions()) and "-masklabel." not in name
