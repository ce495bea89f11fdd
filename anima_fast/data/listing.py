"""`--debug_dataset`: what the first epoch would feed to the model, as text."""

from __future__ import annotations

from collections.abc import Iterator

from anima_fast.data import captions
from anima_fast.data.items import DatasetPlan
from anima_fast.data.seeding import seeded


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
