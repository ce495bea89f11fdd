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
from anima_fast.migrate.datasets import dataset_entry, joined
from anima_fast.migrate.ledger import Ledger, is_rows
from anima_fast.migrate.paths import find_base, resolve

FOLDERS = {"path": "image_dir", "mask_path": "conditioning_data_dir"}
# Keys of any level.
PLACED = ("resolutions", "enable_ar_bucket", "num_repeats")
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
    ledger.place("batch_size of the datasets", key)
    ledger.drop("it was for videos: images have a size of their own", shared)
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
    base = find_base([str(row.get(key, "")) for row in rows for key in FOLDERS], folders)
    shared = {key: value for key, value in config.items() if key != "directory"}
    parts = []
    for i, row in enumerate(rows):
        merged = {**shared, **row}
        subset = _subset(merged, row, f"{prefix}directory[{i}].", ledger, base)
        parts += [(_entry(merged, size, sizes, name), subset) for size in _sizes(merged, name)]
    general = _captions(shared, prefix, ledger)
    ledger.dataset = {"general": general, "datasets": joined(parts)}
    for key in ledger.open_keys(prefix):
        last = key.removeprefix(prefix).rsplit(".", 1)[-1]
        if last in PLACED:
            ledger.place("the dataset file", key)
        elif last in LIMITS:
            why = "limits of buckets are sides of images here, around the sizes"
            ledger.place("the dataset file", key, why=why)
        elif last in BY_HAND and ledger.on(key):
            ledger.drop(BY_HAND[last], key)
            ledger.todo.append(f"{last}: {BY_HAND[last]}")
    ledger.close(prefix=prefix)


def _sizes(merged: Mapping[str, Any], name: str) -> list[tuple[int, int]]:
    """Width and height of all resolutions; of explicit size buckets, the largest area."""
    if buckets := merged.get("size_buckets"):
        width, height, *_ = max(buckets, key=lambda b: float(b[0]) * float(b[1]))
        return [(int(width), int(height))]
    found = []
    for value in merged.get("resolutions") or [512]:
        pair = value if isinstance(value, list) else [value, value]
        if len(pair) != 2 or not all(isinstance(v, (int, float)) and v >= 16 for v in pair):
            raise UserError(f"{name}: resolutions: {value!r} is no side and no [width, height]")
        found.append((int(pair[0]), int(pair[1])))
    return found


def _entry(
    merged: Mapping[str, Any], size: tuple[int, int], sizes: BatchSizes, name: str
) -> dict[str, Any]:
    """The keys of a dataset at one resolution; without buckets images are cut to squares."""
    side = math.sqrt(size[0] * size[1])
    batch = min(sizes, key=lambda pair: abs(pair[0] - side))[1]
    if not merged.get("enable_ar_bucket") and not merged.get("size_buckets"):
        return dataset_entry((side, side), batch, ())
    given = merged.get("ar_buckets") or merged.get("size_buckets")
    given = given or [merged.get("min_ar", 0.5), merged.get("max_ar", 2.0)]
    try:
        ratios = [v[0] / v[1] if isinstance(v, list) else float(v) for v in given]
    except (TypeError, ValueError, IndexError, ZeroDivisionError):
        ratios = []
    if not ratios or min(ratios) <= 0:
        raise UserError(f"{name}: aspect ratios must be numbers above 0, or pairs of sides")
    return dataset_entry(size, batch, ratios)


def _subset(
    merged: Mapping[str, Any], own: Mapping[str, Any], prefix: str, ledger: Ledger,
    base: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """The keys of a subset; settles the directory's own keys."""
    if not merged.get("path"):
        raise UserError(f"{prefix[:-1]} has no path: every directory of diffusion-pipe has one")
    found: dict[str, Any] = {}
    for key, option in FOLDERS.items():
        if key in own:
            found[option], moved = resolve(str(own[key]), base)
            ledger.place(option, f"{prefix}{key}", why=moved, new=found[option])
    if "mask_path" in own:
        ledger.add("mask_path is given", masked_loss=True)
    found["num_repeats"] = _repeats(merged, f"{prefix}num_repeats", ledger)
    found |= _captions(own, prefix, ledger)
    if merged.get("skip_empty_caption") is False:
        # What an image without a caption file has as caption.
        found["class_tokens"] = ""
        for level in (prefix, prefix.partition("directory[")[0]):
            ledger.place("class_tokens", f"{level}skip_empty_caption")
    if merged.get("cache_shuffle_num") or merged.get("shuffle_tags"):
        separator = str(merged.get("cache_shuffle_delimiter", ",")).strip() or ","
        tags = str(merged.get("caption_prefix") or "").split(separator)
        if kept := sum(bool(tag.strip()) for tag in tags):
            found["keep_tokens"] = kept
            why = "the tags of caption_prefix, which stand before the shuffled ones there"
            ledger.added[f"{prefix}keep_tokens"] = (str(kept), why)
    return found


def _repeats(merged: Mapping[str, Any], key: str, ledger: Ledger) -> int:
    value = merged.get("num_repeats", 1)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise UserError(f"{key}: expected a number, got {value!r}")
    repeats = max(1, round(value))
    why = "repeats are whole numbers here" if repeats != value else ""
    ledger.place("num_repeats", key, why=why, new=repeats)
    return repeats


def _captions(own: Mapping[str, Any], prefix: str, ledger: Ledger) -> dict[str, Any]:
    """Keys about captions of one level."""
    found: dict[str, Any] = {}
    if own.get("caption_prefix"):
        found["caption_prefix"] = str(own["caption_prefix"]).rstrip(" ")
        ledger.place("caption_prefix", f"{prefix}caption_prefix")
    number = ledger.whole(f"{prefix}cache_shuffle_num")
    if number or own.get("shuffle_tags"):
        found["shuffle_caption"] = True
        ledger.place("shuffle_caption", f"{prefix}cache_shuffle_num", f"{prefix}shuffle_tags")
        why = "cache_shuffle_num: renderings of a caption"
        ledger.add(why, caption_variants=max(number, 1))
        if "cache_shuffle_delimiter" in own:
            found["caption_separator"] = str(own["cache_shuffle_delimiter"]).strip() or " "
            ledger.place("caption_separator", f"{prefix}cache_shuffle_delimiter")
    return found
