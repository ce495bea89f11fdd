"""The plan of a training run's data: which images, in which buckets, how often.

`build_plan` lists the images of every subset, reads their headers and captions, holds out the
validation images, balances the regularisation images and places everything in buckets. No pixels
are decoded.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from anima_fast.data import findings, images, layouts
from anima_fast.data.buckets import Size, place
from anima_fast.data.dataset_config import resolve_datasets
from anima_fast.data.items import DatasetPlan, ImageItem
from anima_fast.data.problems import Problem
from anima_fast.data.seeding import seeded
from anima_fast.data.subset import Dataset, Subset
from anima_fast.errors import UserError
from anima_fast.options.run import AnyRun

# Reading headers waits for the disk, not for the processor.
_HEADER_THREADS = 8


def build_plan(options: AnyRun, problems: list[Problem] | None = None) -> DatasetPlan:
    """Plan the data that the options name.

    `problems` collects what is wrong with single files, which are left out. Raises `UserError` for
    anything wrong with the configuration or a folder and, without `problems`, with a file.
    """
    datasets, notices = resolve_datasets(options)
    items: list[ImageItem] = []
    held_out: list[ImageItem] = []
    unused: list[ImageItem] = []
    for dataset in datasets:
        train, reg = [], []
        for subset in dataset.subsets:
            found = _read_subset(subset, dataset, options, notices, problems)
            if subset.is_reg:
                reg += found
                continue
            kept, validation = _split(found, subset)
            train += kept
            held_out += [_for_validation(item) for item in validation]
        balanced = _balance(reg, sum(item.repeats for item in train))
        items += train + balanced
        unused += reg[len(balanced) :]
    if not items and not problems:
        raise UserError(
            "no training images: every image is held out for validation, for regularisation, or "
            "ignored with num_repeats 0, or left out by skip_image_resolution; lower "
            "validation_split or add a subset without is_reg"
        )
    items = [replace(item, index=i) for i, item in enumerate(items)]
    held_out = [replace(item, index=i) for i, item in enumerate(held_out)]
    everything = items + held_out
    findings.check_exact_sizes(everything, options, problems)
    notices += findings.advise(everything, datasets, options)
    if not held_out and any(s.validation_split > 0 for d in datasets for s in d.subsets):
        notices.append("validation_split holds out no image: the subsets are too small for it")
    return DatasetPlan(items, held_out, datasets, notices, unused)


def _read_subset(
    subset: Subset,
    dataset: Dataset,
    options: AnyRun,
    notices: list[str],
    problems: list[Problem] | None,
) -> list[ImageItem]:
    entries = layouts.captioned_images(subset, notices, problems)
    paths = [path for path, _ in entries]
    masks: dict[Path, Path] = {}
    if subset.conditioning_data_dir and options.masked_loss:
        masks = layouts.mask_files(paths, subset.conditioning_data_dir, subset.where, problems)
    elif subset.conditioning_data_dir:
        notices.append(f"{subset.where}: conditioning_data_dir is ignored without masked_loss")
    headers = _headers(paths, problems)
    found, small = [], []
    for path, caption in entries:
        header = headers.get(path)
        if header is None:
            continue
        if _is_skipped(header.size, dataset):
            small.append(path.name)
            continue
        size = header.upright_size if subset.exif_rotation else header.size
        try:
            resized, bucket = _place(size, dataset)
        except UserError as error:
            if problems is None:
                raise UserError(f"{path}: {error}") from None
            problems.append(Problem("narrow", str(path), str(error)))
            continue
        found.append(
            ImageItem(
                index=-1,
                path=path,
                caption=caption,
                subset=subset,
                dataset=dataset,
                size=size,
                resized=resized,
                bucket=bucket,
                repeats=subset.num_repeats,
                loss_weight=options.prior_loss_weight if subset.is_reg else 1.0,
                mask_path=masks.get(path),
                exif_rotated=header.exif_rotated,
                has_alpha=header.has_alpha,
            )
        )
    if small:
        names = layouts.some(small)
        notices.append(f"{subset.where}: skip_image_resolution: {len(small)} left out ({names})")
    return found


def _is_skipped(size: Size, dataset: Dataset) -> bool:
    """Whether an image has at most the area that the dataset leaves out."""
    least = dataset.skip_image_resolution
    return least is not None and math.prod(size) <= math.prod(least)


def _headers(paths: list[Path], problems: list[Problem] | None) -> dict[Path, images.Header]:
    """The header of each image; with `problems`, of each that can be read."""

    def read(path: Path) -> images.Header | images.ImageError:
        try:
            return images.read_header(path)
        except images.ImageError as error:
            if problems is None:
                raise
            return error

    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        found = dict(zip(paths, pool.map(read, paths), strict=True))
    headers = {}
    for path, header in found.items():
        if isinstance(header, images.Header):
            headers[path] = header
        elif problems is not None:
            problems.append(Problem("unreadable", str(path), header.reason))
    return headers


def _place(size: Size, dataset: Dataset) -> tuple[Size, Size]:
    """As `buckets.place`, and refuse what would be huge when resized."""
    resized, bucket = place(size, dataset)
    if math.prod(resized) > images.MAX_PIXELS:
        raise UserError(
            f"{size[0]}x{size[1]} is too narrow to fill the bucket "
            f"{bucket[0]}x{bucket[1]}: crop it or remove it"
        )
    return resized, bucket


def _split(found: list[ImageItem], subset: Subset) -> tuple[list[ImageItem], list[ImageItem]]:
    """Training and validation images of a subset: disjoint, chosen by `validation_seed` alone."""
    # 10·(1−0.7) is a little above 3 in binary; that must not round up to 4.
    kept = math.ceil(len(found) * (1 - subset.validation_split) - 1e-9)
    if kept >= len(found):
        return found, []
    order = list(range(len(found)))
    seeded("validation", subset.validation_seed or 0).shuffle(order)
    return [found[i] for i in sorted(order[:kept])], [found[i] for i in sorted(order[kept:])]


def _for_validation(item: ImageItem) -> ImageItem:
    """The item without repeats and everything random except wildcards, which need a choice."""
    subset = replace(
        item.subset,
        num_repeats=1,
        shuffle_caption=False,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
        token_warmup_step=0.0,
        flip_aug=False,
        color_aug=False,
        random_crop=False,
        face_crop_aug_range=None,
    )
    return replace(item, subset=subset, repeats=1)


def _balance(reg: list[ImageItem], wanted: int) -> list[ImageItem]:
    """Repeat regularisation images in turn until they are as many as the training images.

    The first round counts each with its own repeats, every later one adds a single use; images
    that the first round does not reach stay unused.
    """
    uses, total = [], 0
    for item in reg:
        if total >= wanted:
            break
        uses.append(item.repeats)
        total += item.repeats
    if uses and total < wanted:
        rounds, rest = divmod(wanted - total, len(uses))
        uses = [use + rounds + (i < rest) for i, use in enumerate(uses)]
    return [replace(item, repeats=use) for item, use in zip(reg, uses, strict=False)]
