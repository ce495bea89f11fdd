"""The images of a run, the order of its batches, and how long it is."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from anima_fast.data.buckets import Size
from anima_fast.data.captions import Caption
from anima_fast.data.problems import Problem
from anima_fast.data.seeding import seeded
from anima_fast.data.subset import Dataset, Subset
from anima_fast.options.output import LengthOptions


@dataclass(frozen=True)
class ImageItem:
    """One image of one dataset. Sizes are (width, height) in pixels.

    `index` is its place in `DatasetPlan.items` or `.validation_items`, `repeats` its number of uses
    in an epoch, `loss_weight` the factor of its loss, `mask_path` the loss mask from a mask folder.
    `exif_rotated`: EXIF asks for a rotation; `size` is that of the turned image if it is applied.
    `has_alpha`: the file stores transparency.
    """

    index: int
    path: Path
    caption: Caption
    subset: Subset
    dataset: Dataset
    size: Size
    resized: Size
    bucket: Size
    repeats: int
    loss_weight: float
    mask_path: Path | None
    exif_rotated: bool
    has_alpha: bool = False

    @property
    def is_reg(self) -> bool:
        """Whether it is a regularisation image."""
        return self.subset.is_reg

    @property
    def is_turned(self) -> bool:
        """Whether the pixels are turned as EXIF asks for, which is an option."""
        return self.exif_rotated and self.subset.exif_rotation


@dataclass
class DatasetPlan:
    """All images of a run and how they form batches (data/plan.py makes it)."""

    items: list[ImageItem]
    validation_items: list[ImageItem]
    datasets: list[Dataset]
    notices: list[str] = field(default_factory=list)
    # Regularisation images beyond the number of training images.
    unused: list[ImageItem] = field(default_factory=list)
    # What was found to be wrong, once it was looked for (data/announce.py).
    problems: list[Problem] = field(default_factory=list)

    def epoch_batches(self, epoch: int, seed: int) -> list[list[int]]:
        """The batches of an epoch (counted from 1), as indices into `items`.

        A batch has one dataset and one bucket. Each image enters its bucket `repeats` times; the
        bucket is shuffled and cut, a short last batch is kept, and the batches of all datasets are
        shuffled together.
        """
        if epoch < 1:
            raise ValueError(f"epoch is {epoch}, expected 1 or more")
        rng = seeded("batches", seed, epoch)
        batches = []
        for batch_size, uses in self._buckets:
            shuffled = list(uses)
            rng.shuffle(shuffled)
            batches += _cut(shuffled, batch_size)
        rng.shuffle(batches)
        return batches

    @cached_property
    def batches_per_epoch(self) -> int:
        """Σ over datasets and buckets of ⌈uses / batch size⌉."""
        return sum(math.ceil(len(uses) / batch_size) for batch_size, uses in self._buckets)

    def validation_batches(self) -> list[list[int]]:
        """The validation images in fixed batches, as indices into `validation_items`."""
        groups = _group(self.validation_items)
        return [batch for size, uses in groups for batch in _cut(uses, size)]

    @cached_property
    def _buckets(self) -> list[tuple[int, list[int]]]:
        return _group(self.items)


def _group(items: list[ImageItem]) -> list[tuple[int, list[int]]]:
    """(batch size, item indices with repeats) of each bucket, by dataset and bucket size."""
    groups: dict[tuple[int, Size], list[int]] = defaultdict(list)
    sizes = {}
    for item in items:
        groups[item.dataset.index, item.bucket] += [item.index] * item.repeats
        sizes[item.dataset.index] = item.dataset.batch_size
    return [(sizes[key[0]], groups[key]) for key in sorted(groups)]


def _cut(uses: list[int], batch_size: int) -> list[list[int]]:
    return [uses[i : i + batch_size] for i in range(0, len(uses), batch_size)]


@dataclass(frozen=True)
class Length:
    """How long the run is (spec: steps count optimizer updates)."""

    batches_per_epoch: int
    accumulation: int
    epochs: int
    steps: int

    @property
    def updates_per_epoch(self) -> int:
        """⌈batches / accumulation⌉: an incomplete accumulation group at the end is stepped."""
        return math.ceil(self.batches_per_epoch / self.accumulation)


def run_length(options: LengthOptions, batches_per_epoch: int) -> Length:
    """Epochs and steps from whichever of the two was given; epochs win."""
    accumulation = options.gradient_accumulation_steps
    updates = math.ceil(batches_per_epoch / accumulation)
    if options.max_train_epochs:
        epochs, steps = options.max_train_epochs, options.max_train_epochs * updates
    else:
        steps = options.max_train_steps
        epochs = math.ceil(steps / updates)
    return Length(batches_per_epoch, accumulation, epochs, steps)
