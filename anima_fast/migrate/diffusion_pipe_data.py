"""diffusion-pipe's dataset TOML as ours.

There every image of a directory is trained at every resolution, so each resolution becomes a
dataset with all directories in it. Aspect ratios between two limits become limits of the sides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anima_fast.errors import UserError
from anima_fast.migrate.ledger import Ledger, is_rows
from anima_fast.migrate.paths import Paths

STEP = 64
PLACED = {
    "resolutions": "a dataset for each, with all images", "enable_ar_bucket": "enable_bucket",
    "num_repeats": "num_repeats of every subset",
}  # fmt: skip
LIMITS = ("min_ar", "max_ar", "ar_buckets", "size_buckets")
BY_HAND = {
    "default_mask_file": "every image of a folder with masks needs one of its own here",
    "control_path": "training on pairs of images is not supported",
    "online_captions": "captions are read from .txt files here",
}
# (Side of the resolution, images a batch): the nearest side counts; one number has the side 0.
BatchSizes = list[tuple[float, int]]


def read_batch_sizes(ledger: Ledger) -> BatchSizes:
    """Images a batch, from the main file's keys; those for images beat the others."""
    own, shared = "image_micro_batch_size_per_gpu", "micro_batch_size_per_gpu"
    key = own if ledger.has(own) else shared
    value = ledger.get(key, 1)
    try:
        rows = value if isinstance(value, list) else [[0, value]]
        sizes = [(float(side), max(1, int(size))) for side, size in rows]
    except (TypeError, ValueError):
        raise UserError(f"{key}: expected a number or [[side, number], ...]") from None
    ledger.place(key, "batch_size of the datasets")
    ledger.drop(shared, "it was for videos: images have a size of their own")
    return sizes or [(0.0, 1)]


def convert_dataset(
    config: Any, name: str, ledger: Ledger, folders: tuple[Path, ...], sizes: BatchSizes
) -> None:
    """Settle the keys of a dataset file and put the datasets into the ledger."""
    rows = config.get("directory") if isinstance(config, Mapping) else None
    if not is_rows(rows):
        raise UserError(f"{name} has no [[directory]]: it is no dataset file of diffusion-pipe")
    prefix = f"{name}: "
    ledger.extend(config, prefix)
    paths = Paths.find(
        [str(row.get(key, "")) for row in rows for key in ("path", "mask_path")], folders
    )
    shared = {key: value for key, value in config.items() if key != "directory"}
    datasets: dict[str, dict[str, Any]] = {}
    for i, row in enumerate(rows):
        merged = {**shared, **row}
        subset = _subset(merged, row, f"{prefix}directory[{i}].", ledger, paths)
        for resolution in _resolutions(merged, name):
            entry = _entry(merged, resolution, sizes, name)
            datasets.setdefault(repr(entry), {**entry, "subsets": []})["subsets"].append(subset)
    general = _captions(shared, prefix, ledger)
    ledger.dataset = {"general": general, "datasets": [*datasets.values()]}
    _settle_rest(prefix, ledger)


def _resolutions(merged: Mapping[str, Any], name: str) -> list[list[int]]:
    """Sizes as [width, height]; of explicit size buckets, the largest area."""
    if buckets := merged.get("size_buckets"):
        widest = max(buckets, key=lambda b: float(b[0]) * float(b[1]))
        return [[int(widest[0]), int(widest[1])]]
    found = []
    for value in merged.get("resolutions") or [512]:
        pair = value if isinstance(value, list) else [value, value]
        if len(pair) != 2 or not all(isinstance(v, (int, float)) and v >= 16 for v in pair):
            raise UserError(f"{name}: resolutions: {value!r} is no side and no [width, height]")
        found.append([int(v) for v in pair])
    return found


def _entry(
    merged: Mapping[str, Any], size: list[int], sizes: BatchSizes, name: str
) -> dict[str, Any]:
    """The keys of a dataset at one resolution."""
    width, height = size
    side = math.sqrt(width * height)
    entry: dict[str, Any] = {"resolution": width if width == height else size}
    entry["batch_size"] = min(sizes, key=lambda pair: abs(pair[0] - side))[1]
    if not merged.get("enable_ar_bucket") and not merged.get("size_buckets"):
        square = max(16, round(side / 16) * 16)
        return entry | {"resolution": square, "enable_bucket": False}
    roots = [math.sqrt(ratio) for ratio in _ratios(merged, name)]
    shortest = min(min(side * root, side / root) for root in roots)
    longest = max(max(side * root, side / root) for root in roots)
    entry["enable_bucket"] = True
    entry["min_bucket_reso"] = max(STEP, int(min(shortest, *size)) // STEP * STEP)
    entry["max_bucket_reso"] = math.ceil(max(longest, *size) / STEP) * STEP
    return entry


def _ratios(merged: Mapping[str, Any], name: str) -> list[float]:
    given = merged.get("ar_buckets") or merged.get("size_buckets")
    given = given or [merged.get("min_ar", 0.5), merged.get("max_ar", 2.0)]
    try:
        ratios = [v[0] / v[1] if isinstance(v, list) else float(v) for v in given]
    except (TypeError, ValueError, IndexError, ZeroDivisionError):
        ratios = []
    if not ratios or min(ratios) <= 0:
        raise UserError(f"{name}: aspect ratios must be numbers above 0, or pairs of sides")
    return ratios


def _subset(
    merged: Mapping[str, Any], own: Mapping[str, Any], prefix: str, ledger: Ledger, paths: Paths
) -> dict[str, Any]:
    """The keys of a subset; settles the directory's own keys."""
    if not merged.get("path"):
        raise UserError(f"{prefix[:-1]} has no path: every directory of diffusion-pipe has one")
    found: dict[str, Any] = {}
    for key, option in (("path", "image_dir"), ("mask_path", "conditioning_data_dir")):
        if key in own:
            found[option], why = paths.resolve(str(own[key]))
            if why:
                ledger.explain(f"{prefix}{key}", f"{option} {found[option]}: {why}")
            ledger.place(f"{prefix}{key}", option)
    if "conditioning_data_dir" in found:
        ledger.add("masked_loss", True, "mask_path is given")
    found["num_repeats"] = _repeats(merged, f"{prefix}num_repeats", ledger)
    found |= _captions(own, prefix, ledger)
    if merged.get("skip_empty_caption") is False:
        # What an image without a caption file has as caption.
        found["class_tokens"] = ""
        for level in (prefix, prefix.partition("directory[")[0]):
            ledger.place(f"{level}skip_empty_caption", 'class_tokens = ""')
    if (merged.get("cache_shuffle_num") or merged.get("shuffle_tags")) and (
        kept := _tags_of_prefix(merged)
    ):
        found["keep_tokens"] = kept
        why = "the tags of caption_prefix, which stand before the shuffled ones there"
        ledger.note(f"{prefix}keep_tokens", str(kept), why)
    return found


def _tags_of_prefix(merged: Mapping[str, Any]) -> int:
    separator = str(merged.get("cache_shuffle_delimiter", ",")).strip() or ","
    tags = str(merged.get("caption_prefix") or "").split(separator)
    return sum(bool(tag.strip()) for tag in tags)


def _repeats(merged: Mapping[str, Any], key: str, ledger: Ledger) -> int:
    value = merged.get("num_repeats", 1)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise UserError(f"{key}: expected a number, got {value!r}")
    repeats = max(1, round(value))
    if repeats != value:
        ledger.explain(key, f"num_repeats {repeats}: repeats are whole numbers here")
    ledger.place(key, "num_repeats")
    return repeats


def _captions(own: Mapping[str, Any], prefix: str, ledger: Ledger) -> dict[str, Any]:
    """Keys about captions of one level."""
    found: dict[str, Any] = {}
    if own.get("caption_prefix"):
        found["caption_prefix"] = str(own["caption_prefix"]).rstrip(" ")
        ledger.place(f"{prefix}caption_prefix", "caption_prefix")
    number = ledger.whole(f"{prefix}cache_shuffle_num")
    if number or own.get("shuffle_tags"):
        found["shuffle_caption"] = True
        for name in ("cache_shuffle_num", "shuffle_tags"):
            ledger.place(f"{prefix}{name}", "shuffle_caption")
        ledger.add("caption_variants", max(number, 1), "cache_shuffle_num: renderings of a caption")
        if "cache_shuffle_delimiter" in own:
            found["caption_separator"] = str(own["cache_shuffle_delimiter"]).strip() or " "
            ledger.place(f"{prefix}cache_shuffle_delimiter", "caption_separator")
    return found


def _settle_rest(prefix: str, ledger: Ledger) -> None:
    """Keys of any level about sizes, and those without a counterpart."""
    for key in ledger.open_keys(prefix):
        name = key.removeprefix(prefix).rsplit(".", 1)[-1]
        if name in PLACED:
            ledger.place(key, PLACED[name])
        elif name in LIMITS:
            ledger.explain(key, "limits of buckets are sides of images here, around the sizes")
        elif name in BY_HAND and ledger.on(key):
            ledger.drop(key, BY_HAND[name])
            ledger.todo.append(f"{name}: {BY_HAND[name]}")
    ledger.close(prefix=prefix)
