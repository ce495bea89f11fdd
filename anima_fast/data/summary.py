"""What a plan holds: as a LoRA's metadata, and as text for `--debug_dataset`.

The metadata has datasets, tag counts, folders, buckets and numbers of images, in the shapes of
sd-scripts (`ss_datasets`, `ss_tag_frequency`, ...), which user interfaces read. Folders appear by
their own name only, never with their path.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from anima_fast.data import captions
from anima_fast.data.items import DatasetPlan, ImageItem
from anima_fast.data.seeding import seeded
from anima_fast.data.subset import Dataset, Subset

_NOT_SHOWN = {"index", "dataset_index", "conditioning_data_dir"}
# Bytes of JSON for all tag counts together, once over all and once in the datasets: captions in
# whole sentences, each a tag of its own, would outgrow the LoRA and the format's 100 MB of header.
TAG_BYTES = 1_000_000


def summarise(plan: DatasetPlan) -> dict:
    """Values that serialise to JSON: settings, counts and subsets of each dataset, and over all

    tag_frequency: {folder: {tag: images}}, tags in lower case; of very many only the most frequent,
        and tag_frequency_left_out says how many others there are.
    dataset_dirs, reg_dataset_dirs: {folder: {"n_repeats", "img_count"}}.
    bucket_info: {"buckets": {"0": {"resolution", "count"}}, "mean_img_ar_error"}, or None.
    num_train_images, num_reg_images (with repeats), num_validation_images.
    """
    train = [item for item in plan.items if not item.is_reg]
    reg = [item for item in plan.items if item.is_reg]
    return {
        "datasets": [_dataset(dataset, plan) for dataset in plan.datasets],
        **_tag_frequency(plan.items, TAG_BYTES),
        "dataset_dirs": _folders(train),
        "reg_dataset_dirs": _folders(reg),
        "bucket_info": _bucket_info(plan.items),
        "num_train_images": sum(item.repeats for item in train),
        "num_reg_images": sum(item.repeats for item in reg),
        "num_validation_images": len(plan.validation_items),
    }


def _dataset(dataset: Dataset, plan: DatasetPlan) -> dict:
    mine = [item for item in plan.items if item.dataset.index == dataset.index]
    held_out = [item for item in plan.validation_items if item.dataset.index == dataset.index]
    return {
        "is_dreambooth": all(subset.metadata_file is None for subset in dataset.subsets),
        "batch_size_per_device": dataset.batch_size,
        "num_train_images": sum(item.repeats for item in mine if not item.is_reg),
        "num_reg_images": sum(item.repeats for item in mine if item.is_reg),
        "num_validation_images": len(held_out),
        "resolution": list(dataset.resolution),
        "skip_image_resolution": dataset.skip_image_resolution,
        "enable_bucket": dataset.enable_bucket,
        "min_bucket_reso": dataset.min_bucket_reso,
        "max_bucket_reso": dataset.max_bucket_reso,
        "bucket_reso_steps": dataset.bucket_reso_steps,
        "bucket_no_upscale": dataset.bucket_no_upscale,
        "network_multiplier": dataset.network_multiplier,
        **_tag_frequency(mine, TAG_BYTES // len(plan.datasets)),
        "bucket_info": _bucket_info(mine),
        "subsets": [_subset(subset, mine) for subset in dataset.subsets],
    }


def _subset(subset: Subset, items: list[ImageItem]) -> dict:
    values = {name: value for name, value in asdict(subset).items() if name not in _NOT_SHOWN}
    for name in ("image_dir", "metadata_file"):
        if values[name] is not None:
            values[name] = Path(os.path.abspath(values[name])).name
    # A table in the metadata of sd-scripts, empty or not.
    values["custom_attributes"] = values["custom_attributes"] or {}
    values["img_count"] = sum(item.subset.index == subset.index for item in items)
    # A TOML table may hold dates, which JSON does not know.
    return json.loads(json.dumps(values, default=str))


def _tag_frequency(items: list[ImageItem], limit: int) -> dict:
    """`tag_frequency` in at most `limit` bytes of JSON, and `tag_frequency_left_out` if cut."""
    counts: dict[str, Counter] = {}
    for item in _once(items):
        folder = counts.setdefault(item.subset.name, Counter())
        for line in item.caption.lines(item.subset):
            tags = (tag.strip().lower() for tag in line.split(item.subset.caption_separator))
            folder.update(tag for tag in tags if tag)
    tables = {name: dict(counter) for name, counter in counts.items()}
    if len(json.dumps(tables)) <= limit:
        return {"tag_frequency": tables}
    found = [(n, tag, name) for name, table in tables.items() for tag, n in table.items()]
    # The most frequent first; of equals the shortest, of which more find room.
    found.sort(key=lambda entry: (-entry[0], len(entry[1]), entry[1]))
    kept: dict[str, dict[str, int]] = {name: {} for name in tables}
    room = limit - len(json.dumps(kept))
    for count, tag, name in found:
        room -= len(json.dumps({tag: count}))
        if room < 0:
            break
        kept[name][tag] = count
    left_out = len(found) - sum(map(len, kept.values()))
    return {"tag_frequency": kept, "tag_frequency_left_out": left_out}


def _once(items: list[ImageItem]) -> list[ImageItem]:
    """One item for each file: a folder may be in several datasets."""
    first: dict[Path, ImageItem] = {}
    for item in items:
        first.setdefault(item.path, item)
    return list(first.values())


def _folders(items: list[ImageItem]) -> dict[str, dict[str, int]]:
    folders: dict[str, dict[str, int]] = {}
    for item in _once(items):
        entry = folders.setdefault(
            item.subset.name, {"n_repeats": item.subset.num_repeats, "img_count": 0}
        )
        entry["img_count"] += 1
    return folders


def _bucket_info(items: list[ImageItem]) -> dict | None:
    bucketed = [item for item in items if item.dataset.enable_bucket]
    if not bucketed:
        return None
    counts: Counter = Counter()
    for item in bucketed:
        counts[item.bucket] += item.repeats
    buckets = {
        str(i): {"resolution": list(bucket), "count": counts[bucket]}
        for i, bucket in enumerate(sorted(counts))
    }
    errors = [abs(i.bucket[0] / i.bucket[1] - i.size[0] / i.size[1]) for i in bucketed]
    return {"buckets": buckets, "mean_img_ar_error": sum(errors) / len(errors)}


def list_epoch(plan: DatasetPlan, seed: int, *, epoch: int = 1) -> Iterator[str]:
    """One line per batch and per image of an epoch: bucket, file, a rendering of the caption."""
    for number, indices in enumerate(plan.epoch_batches(epoch, seed), 1):
        width, height = plan.items[indices[0]].bucket
        yield f"batch {number}: {width}x{height}"
        for position, index in enumerate(indices):
            item = plan.items[index]
            text = captions.render(
                item.caption,
                item.subset,
                rng=seeded("listing", seed, epoch, number, position),
                epoch=epoch,
                step=number,
                max_steps=plan.batches_per_epoch,
            )
            reg = " (regularisation)" if item.is_reg else ""
            yield f"  {item.path.name}{reg}: {text!r}"
