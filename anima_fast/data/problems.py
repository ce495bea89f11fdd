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


# Kind: title and remedy, first of what training refuses.
_REFUSED = {
    "unreadable": ("images that cannot be read", "replace the files or remove them"),
    "narrow": ("images too narrow or too large for a bucket", "crop or remove them"),
    "wrong size": ("images without the size of the resolution",
        "set enable_bucket = true, or use cache_latents (crops the centre)"),
    "missing image": ("entries of a metadata file without an image",
        "add the files or remove the entries"),
    "unreadable caption": ("captions that cannot be read",
        "save them as UTF-8, JSON in a form that is read"),
    "no caption": ("images without a caption",
        "add a caption file next to each, or set class_tokens to the caption of such images "
        '(class_tokens = "" trains them without a caption)'),
    "missing mask": ("images without a mask of the same name",
        "add the masks or remove conditioning_data_dir"),
    "unreadable mask": ("masks that cannot be read", "replace the files or remove them"),
}  # fmt: skip
_TRAINED = {
    "caption not taken": ("images whose caption may be in a file that is not read, so that only "
        "class_tokens are trained",
        "name it like the image, with the ending .txt, or set caption_extension"),
    "class caption": ("images that have only class_tokens as caption",
        "write captions if they should differ"),
    "empty caption": ("caption files that are empty", "write a caption; they train without one"),
    "further lines": ("captions of several lines, of which only the first is trained",
        "write one line, or set enable_wildcard = true to draw one of them at random"),
    "prompt syntax": ("captions with \\( or (word:1.2), which are plain text in training",
        "leave out backslashes and weights: ComfyUI and `sample` drop them from prompts, so what "
        "was trained never comes again"),
    "underscore": ("captions with underscores in tags", "write spaces, as Anima's own tags have"),
    "empty tag": ("captions with empty tags, which wander when tags are shuffled or dropped",
        "remove commas at the end and double ones"),
    "long caption": ("captions longer than the text's 512 rows",
        "shorten them, or use --long_captions whole"),
    "whole caption": ("captions longer than 512 tokens, which are encoded whole",
        "shorten them to save time: attention over the further rows costs some"),
    "orphan caption": ("captions without an image", "look for a lost or renamed image"),
    "duplicate": ("images with the same pixels as another",
        "keep one of each; to weigh an image more, use num_repeats"),
    "near duplicate": ("images that look nearly the same",
        "keep the best, unless the series is wanted"),
    "upscaled": ("images smaller than their bucket",
        "find larger originals, lower the resolution, or set bucket_no_upscale = true"),
    "crop": ("images that lose much to the crop",
        "crop by hand, raise max_bucket_reso, or lower bucket_reso_steps"),
    "rotated": ("images with an EXIF rotation, which is not applied",
        "save them upright, or set exif_rotation = true"),
    "transparent": ("images with transparent parts, which show the colour stored below",
        "put them on a background, or train with alpha_mask = true"),
    "colours": ("images that are converted to 8-bit RGB",
        "convert them yourself if colours matter"),
    "animated": ("animations, of which the first frame counts", "save the frame you want"),
    "unused": ("regularisation images beyond the number of training uses, which are never trained",
        "raise the repeats of the training images, or remove them"),
    "trained and held out": ("images that are trained and also held out for validation",
        "set the same validation_split and validation_seed where they are used, or hold out "
        "others: the validation loss says nothing about them"),
    "subfolder": ("subfolders with images, which are not searched", "name them as subsets"),
    "skipped": ("files that are no part of the dataset", "convert, move or rename them"),
    "tag spelling": ("tags that differ only by case, space or underscore",
        "choose one spelling for each"),
    "mask aspect": ("masks of another aspect ratio than their image",
        "draw them over the whole image"),
    "empty mask": ("masks that leave nothing to train", "white is trained, black is not"),
    "full mask": ("masks that leave out nothing", "remove them if that is not meant"),
    "no alpha": ("images without transparency under alpha_mask", "each is trained in full"),
}  # fmt: skip
KINDS = {kind: ProblemKind(*row, stops=True) for kind, row in _REFUSED.items()}
KINDS |= {kind: ProblemKind(*row) for kind, row in _TRAINED.items()}


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
