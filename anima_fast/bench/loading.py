"""How long the training step waits for its data, with the trainer's own loader.

Random latents and text of the published sizes lie in a temporary folder as the cache files of a
run do. A thread reads, checks, collates and pins the next batch while the step computes, as in
training with the caches on disk; the copy to the card is part of the step. Files that were just
written come from the system's memory: what a slow disk or `live` images add, a run itself tells
(`wait_s` in its log.jsonl).
"""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from anima_fast.bench.step_models import CONFIG, DEVICE, DTYPE, TEXT_ROWS, Inputs, Phases
from anima_fast.data.batches import Batch, Batches, in_steps
from anima_fast.data.cache import LatentEntry, Stored, TextEntry, read_latents, read_text, write
from anima_fast.data.caption_tokens import CaptionTokens
from anima_fast.data.captions import Caption
from anima_fast.data.conditioning import Conditioning
from anima_fast.data.encode import EncodedDataset, Texts
from anima_fast.data.items import DatasetPlan, ImageItem
from anima_fast.data.subset import Dataset, Subset
from anima_fast.measure.timer import synchronize
from anima_fast.models.vae import LATENT_SCALE
from anima_fast.options.run import TrainOptions

# Batches of different images, and how often each is used.
DIFFERENT, REPEATS = 4, 5


@dataclass(frozen=True)
class Waits:
    """Seconds of some steps, whole and waiting for the batch."""

    whole: tuple[float, ...]
    waiting: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """The wait of the middling step."""
        return median(self.waiting)

    @property
    def share(self) -> float:
        """What part of all the time went into waiting."""
        return sum(self.waiting) / sum(self.whole)


def waits(step: Phases, tokens: int, batch: int) -> Waits:
    """Time steps that get each batch from the loader; the first, before any prefetch, is left out.

    The step keeps the inputs of the last one.
    """
    whole, waiting = [], []
    with tempfile.TemporaryDirectory() as folder:
        loader, plan = batches(Path(folder), tokens, batch)
        with closing(loader.iterate(plan.epoch_batches(1, seed=0), epoch=1)) as running:
            started = time.perf_counter()
            for (loaded,), wait_s in in_steps(running, 1):
                step.inputs = inputs(loaded)
                step()
                # The trainer waits for the card in every step too: it reads the loss.
                synchronize()
                now = time.perf_counter()
                whole.append(now - started)
                waiting.append(wait_s)
                started = now
    return Waits(tuple(whole[1:]), tuple(waiting[1:]))


def batches(folder: Path, tokens: int, batch: int) -> tuple[Batches, DatasetPlan]:
    """A loader, and its plan, of square images of `tokens` patches; their cache is in `folder`."""
    side = 2 * round(tokens**0.5)
    size = (LATENT_SCALE * side, LATENT_SCALE * side)
    dataset, subset = Dataset(resolution=size, batch_size=batch), Subset(num_repeats=REPEATS)
    items, latents = [], []
    texts: Texts = []
    for index in range(DIFFERENT * batch):
        items.append(
            ImageItem(
                index=index, path=folder / f"{index}.png", caption=Caption(), subset=subset,
                dataset=dataset, size=size, resized=size, bucket=size, repeats=REPEATS,
                loss_weight=1.0, mask_path=None, exif_rotated=False,
            )
        )  # fmt: skip
        picture, text = folder / f"{index}.latents", folder / f"{index}.text"
        write(picture, LatentEntry(torch.randn(CONFIG.in_channels, side, side)), "", {})
        context = torch.randn(TEXT_ROWS, CONFIG.context_dim, dtype=DTYPE)
        write(text, TextEntry(context), "", {})
        latents.append(Stored(picture, read_latents))
        texts.append((Stored(text, read_text),))
    encoded = EncodedDataset(
        "cached", "context", torch.device(DEVICE), CaptionTokens({}, [], (0, 0), False),
        latents=latents, texts=texts,
    )  # fmt: skip
    plan = DatasetPlan(items, [], [dataset])
    return Batches(plan, encoded, TrainOptions(), seed=0), plan


def inputs(batch: Batch) -> Inputs:
    """A loaded batch on the device, with noise and σ drawn there, as a training step does."""
    context, zero_keys = Conditioning(torch.device(DEVICE), DTYPE)(batch.text)
    # Latents are cached, and all texts are of one length.
    assert batch.latents is not None and isinstance(zero_keys, int)
    latents = batch.latents.to(DEVICE, non_blocking=True)
    sigma = torch.rand(len(latents), device=DEVICE)
    return Inputs(latents, torch.randn_like(latents), sigma, context, zero_keys)
