"""What is wrong with single files of a dataset, and what to do about it.

Training raises at the first kind that it cannot go on with. A check of the dataset passes a list
instead, which collects every finding; the file concerned is left out.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ProblemKind:
    """A kind of problem: its name, the remedy, and whether training refuses it."""

    title: str
    remedy: str
    stops: bool = False


KINDS = {
    "unreadable": ProblemKind(
        "images that cannot be read", "replace the files or remove them", stops=True
    ),
    "narrow": ProblemKind(
        "images too narrow or too large for a bucket", "crop or remove them", stops=True
    ),
    "wrong size": ProblemKind(
        "images without the size of the resolution",
        "set enable_bucket = true, or use cache_latents (crops the centre)",
        stops=True,
    ),
    "missing image": ProblemKind(
        "entries of a metadata file without an image",
        "add the files or remove the entries",
        stops=True,
    ),
    "unreadable caption": ProblemKind(
        "captions that cannot be read", "save them as UTF-8", stops=True
    ),
    "no caption": ProblemKind(
        "images without a caption",
        "add a caption file next to each, or set class_tokens to the caption of such images",
        stops=True,
    ),
    "missing mask": ProblemKind(
        "images without a mask of the same name",
        "add the masks or remove conditioning_data_dir",
        stops=True,
    ),
    "unreadable mask": ProblemKind(
        "masks that cannot be read", "replace the files or remove them", stops=True
    ),
    "class caption": ProblemKind(
        "images that have only class_tokens as caption", "write captions if they should differ"
    ),
    "empty caption": ProblemKind(
        "caption files that are empty", "write a caption; they train without one"
    ),
    "further lines": ProblemKind(
        "captions of several lines, of which only the first is trained",
        "write one line, or set enable_wildcard = true to draw one of them at random",
    ),
    "long caption": ProblemKind(
        "captions longer than the text's 512 rows",
        "shorten them, or use --long_captions whole",
    ),
    "whole caption": ProblemKind(
        "captions longer than 512 tokens, which are encoded whole",
        "shorten them to save time: attention over the further rows costs some",
    ),
    "orphan caption": ProblemKind("captions without an image", "look for a lost or renamed image"),
    "duplicate": ProblemKind(
        "images with the same pixels as another",
        "keep one of each; to weigh an image more, use num_repeats",
    ),
    "near duplicate": ProblemKind(
        "images that look nearly the same", "keep the best, unless the series is wanted"
    ),
    "upscaled": ProblemKind(
        "images smaller than their bucket",
        "find larger originals, lower the resolution, or set bucket_no_upscale = true",
    ),
    "crop": ProblemKind(
        "images that lose much to the crop",
        "crop by hand, raise max_bucket_reso, or lower bucket_reso_steps",
    ),
    "rotated": ProblemKind(
        "images with an EXIF rotation, which is not applied",
        "save them upright, or set exif_rotation = true",
    ),
    "transparent": ProblemKind(
        "images with transparent parts, which show the colour stored below",
        "put them on a background, or train with alpha_mask = true",
    ),
    "colours": ProblemKind(
        "images that are converted to 8-bit RGB", "convert them yourself if colours matter"
    ),
    "animated": ProblemKind(
        "animations, of which the first frame counts", "save the frame you want"
    ),
    "skipped": ProblemKind("files that are no part of the dataset", "convert, move or rename them"),
    "tag spelling": ProblemKind(
        "tags that differ only by case, space or underscore", "choose one spelling for each"
    ),
    "mask aspect": ProblemKind(
        "masks of another aspect ratio than their image", "draw them over the whole image"
    ),
    "empty mask": ProblemKind(
        "masks that leave nothing to train", "white is trained, black is not"
    ),
    "full mask": ProblemKind("masks that leave out nothing", "remove them if that is not meant"),
    "no alpha": ProblemKind(
        "images without transparency under alpha_mask", "each is trained in full"
    ),
}


@dataclass(frozen=True)
class Problem:
    """One finding: a key of `KINDS`, the file, and what it is about."""

    kind: str
    file: str
    text: str = ""

    @property
    def stops(self) -> bool:
        """Training refuses to start with it."""
        return KINDS[self.kind].stops
