"""Batches for training: latents, text inputs and masks of item indices, one batch ahead.

Everything random (mirroring, choice of the caption's rendering, caption dropout, augmentation) is a
pure function of (seed, epoch, step, position in the batch, item), so a resumed run repeats it.

Contexts of different lengths are padded with zero rows to S, the longest of the batch. A zero row
is itself a zero key in cross attention, so with `zero_keys` = 512 − S more of them every sample
sees exactly its own rows and zeros up to 512. Above 512 rows a shorter text gets more padding
than it would alone, and its count of further zero keys is negative: max(512, own rows) − S.
"""

from __future__ import annotations

import os
import random
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from anima_fast.data import captions, images
from anima_fast.data.cache import LatentEntry, Stored, TextEntry
from anima_fast.data.encode import EncodedDataset
from anima_fast.data.encode_text import pad_rows
from anima_fast.data.items import DatasetPlan, ImageItem, run_length
from anima_fast.data.lowres import LowRes
from anima_fast.data.seeding import seeded
from anima_fast.device import NOT_WHILE_RECORDING
from anima_fast.models.dit_config import TEXT_ROWS
from anima_fast.options.run import AnyRun

# Alpha of an opaque pixel.
_WHITE = np.float32(255)


@dataclass
class ContextInputs:
    """The text of a batch whose contexts are cached (text mode "context")."""

    context: Tensor  # [B, S, C]
    zero_keys: int | tuple[int, ...]  # see `zero_key_counts`


@dataclass
class StateInputs:
    """The text of a batch whose LLM adapter is trained (text mode "states"); masks are int64."""

    source_states: Tensor  # [B, N, C]
    source_mask: Tensor  # [B, N]
    t5_ids: Tensor  # [B, S] int64
    t5_mask: Tensor  # [B, S]


@dataclass
class CaptionInputs:
    """The text of a batch that is encoded in every step (text mode "live")."""

    captions: list[str]


TextInputs = ContextInputs | StateInputs | CaptionInputs


@dataclass
class Batch:
    """One batch on the CPU (pinned for a CUDA run).

    latents: [B, 16, h, w] fp32, or None when `pixels` [B, 3, H, W] fp32 in [-1, 1] are to be
    encoded. loss_weights: [B] fp32. masks: [B, 1, H, W] fp32 0..1 at pixel resolution, or None.
    sigma: noise levels [B] fp32 where they were drawn with the batch, `small` whether it holds
    smaller pictures (lowres.py).
    """

    latents: Tensor | None
    text: TextInputs
    loss_weights: Tensor
    masks: Tensor | None
    items: list[ImageItem]
    pixels: Tensor | None = None
    sigma: Tensor | None = None
    small: bool = False


@dataclass(frozen=True)
class ItemUse:
    """One use of one item: everything that its randomness depends on."""

    item: ImageItem
    seed: int
    epoch: int
    step: int
    position: int
    validation: bool

    def rng(self, purpose: str) -> random.Random:
        """A fresh generator; two calls with the same purpose give equal generators."""
        if self.validation:
            return seeded("validation", purpose, self.item.index)
        return seeded(purpose, self.seed, self.epoch, self.step, self.position, self.item.index)

    @property
    def is_flipped(self) -> bool:
        """Mirror the image: half of the uses with flip_aug, none in validation."""
        wanted = self.item.subset.flip_aug and not self.validation
        return wanted and self.rng("flip").random() < 0.5


class Batches:
    """Loads batches of a plan from its encoded dataset."""

    def __init__(
        self,
        plan: DatasetPlan,
        encoded: EncodedDataset,
        options: AnyRun,
        seed: int,
        lowres: LowRes | None = None,
    ) -> None:
        self._lowres = lowres
        self._plan, self._encoded, self._options, self._seed = plan, encoded, options, seed
        threads = min(options.max_data_loader_n_workers, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None

    def load(self, indices: list[int], *, epoch: int, step: int, validation: bool = False) -> Batch:
        """The batch of these items of one bucket; `UserError` for a file that cannot be read now.

        Args:
            indices: into `plan.items`, or `plan.validation_items` with `validation`.
            epoch, step: of the run, from 1, and of the batch within the epoch, from 0.
            validation: no dropout, no mirroring, always the same rendering of a caption.
        """
        items = self._plan.validation_items if validation else self._plan.items
        uses = [
            ItemUse(items[index], self._seed, epoch, step, position, validation)
            for position, index in enumerate(indices)
        ]
        sigma, small = None, None
        if self._lowres is not None and not validation:
            key = (self._seed, epoch, step)
            sigma, high = self._lowres.draw(len(uses), uses[0].item.bucket, *key)
            small = smaller(uses, self._lowres) if high else None
        is_cached = self._encoded.image_mode == "cached"
        batch = (self._cached if is_cached else self._live)(small or uses)
        batch.sigma, batch.small = sigma, small is not None
        if self._encoded.device.type == "cuda":
            _pin(batch)
            _pin(batch.text)
        return batch

    def iterate(
        self, batches: Iterable[list[int]], *, epoch: int, first_step: int = 0
    ) -> Generator[Batch]:
        """Load batches in a thread, one ahead of the one in use.

        `first_step` is the number of the first of them within the epoch. An error of the thread is
        raised where its batch would have come; closing the iterator ends the thread.
        """
        waiting: deque = deque()
        with ThreadPoolExecutor(1, "prefetch") as pool:
            for step, indices in enumerate(batches, first_step):
                waiting.append(pool.submit(self.load, indices, epoch=epoch, step=step))
                if len(waiting) > 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _cached(self, uses: list[ItemUse]) -> Batch:
        latents, masks = [], []
        for use in uses:
            entry = self._latents(use).get()
            latents.append(entry.latents_flipped if use.is_flipped else entry.latents)
            alpha = entry.alpha_mask
            masks.append(self._mask(use, None if alpha is None else alpha.numpy() / _WHITE))
        return self._batch(uses, masks, latents=torch.stack(latents))

    def _live(self, uses: list[ItemUse]) -> Batch:
        run = self._pool.map if self._pool is not None else map
        pixels, masks = zip(*run(self._augmented, uses), strict=True)
        return self._batch(uses, masks, pixels=torch.stack(pixels))

    def _augmented(self, use: ItemUse) -> tuple[Tensor, np.ndarray | None]:
        """Pixels [3, H, W] and mask [H, W] of one use, cropped and mirrored alike."""
        rng = None if use.validation else use.rng("augment")
        pixels, alpha = images.load_item(use.item, crop_rng=rng)
        mask = self._mask(use, alpha)
        if use.is_flipped:
            pixels = pixels[..., ::-1]
        return torch.from_numpy(np.ascontiguousarray(pixels)), mask

    def _mask(self, use: ItemUse, alpha: np.ndarray | None) -> np.ndarray | None:
        """The item's mask file, else its alpha, else None; mirrored as its picture is."""
        mask = alpha
        if use.item.mask_path is not None:
            is_live = self._encoded.image_mode == "live" and not use.validation
            rng = use.rng("augment") if is_live else None
            mask = images.load_mask(use.item, crop_rng=rng)
        return mask[:, ::-1] if mask is not None and use.is_flipped else mask

    def _batch(
        self,
        uses: list[ItemUse],
        masks: Iterable[np.ndarray | None],
        *,
        latents: Tensor | None = None,
        pixels: Tensor | None = None,
    ) -> Batch:
        items = [use.item for use in uses]
        weights = torch.tensor([item.loss_weight for item in items], dtype=torch.float32)
        stacked = _stack_masks(list(masks), items[0].bucket)
        return Batch(latents, self._text(uses), weights, stacked, items, pixels)

    def _text(self, uses: list[ItemUse]) -> TextInputs:
        if self._encoded.text_mode == "live":
            return CaptionInputs([self._caption(use) for use in uses])
        entries = [self._rendering(use) for use in uses]
        if self._encoded.text_mode == "context":
            return pad_contexts(entries)
        return pad_states(entries)

    def _rendering(self, use: ItemUse) -> TextEntry:
        """One of the cached renderings of the caption, or the encoding of "" when it is dropped."""
        encoded, index = self._encoded, use.item.index
        if use.validation:
            return encoded.validation_texts[index][0].get()
        rng = use.rng("caption")
        if captions.is_dropped(use.item.subset, rng, use.epoch):
            assert encoded.empty_text is not None
            return encoded.empty_text.get()
        variants = encoded.texts[index]
        return variants[rng.randrange(len(variants))].get()

    def _caption(self, use: ItemUse) -> str:
        length = run_length(self._options, self._plan.batches_per_epoch)
        before = (use.epoch - 1) * length.updates_per_epoch + use.step // length.accumulation
        return captions.render(
            use.item.caption,
            use.item.subset,
            rng=use.rng("caption"),
            epoch=use.epoch,
            step=before,
            max_steps=length.steps,
        )

    def _latents(self, use: ItemUse) -> Stored[LatentEntry]:
        encoded = self._encoded
        if use.validation:
            return encoded.validation_latents[use.item.index]
        is_full = use.item.bucket == self._plan.items[use.item.index].bucket
        return (encoded.latents if is_full else encoded.small_latents)[use.item.index]


def in_steps(loader: Iterator[Batch], count: int) -> Iterator[tuple[list[Batch], float]]:
    """`count` batches for each step, fewer for the last, and the seconds it waited for them."""
    while True:
        started = time.perf_counter()
        batches = list(islice(loader, count))
        if not batches:
            return
        yield batches, time.perf_counter() - started


def smaller(uses: list[ItemUse], lowres: LowRes) -> list[ItemUse] | None:
    """The same uses of the smaller pictures; None where they would be too small."""
    items = [lowres.small_item(use.item) for use in uses]
    small = [replace(a, item=i) for a, i in zip(uses, items, strict=True) if i is not None]
    return small if len(small) == len(uses) else None


def pad_contexts(entries: list[TextEntry]) -> ContextInputs:
    """Contexts [S_i, C] as [B, S, C] with S the longest, and the zero rows beyond it."""
    contexts = [entry.context for entry in entries if entry.context is not None]
    counts = [len(context) for context in contexts]
    return ContextInputs(pad_rows(contexts, max(counts)), zero_key_counts(counts))


def zero_key_counts(rows: list[int]) -> int | tuple[int, ...]:
    """Zero keys beyond a batch of contexts that is as long as its longest, from their real rows.

    One count for all where they agree, else one per sample; negative where the batch's padding
    holds more zero rows than the text would have alone.
    """
    length = max(rows)
    counts = tuple(max(TEXT_ROWS, own) - length for own in rows)
    return counts if len(set(counts)) > 1 else counts[0]


def pad_states(entries: list[TextEntry]) -> StateInputs:
    """States [N_i, C] and T5 ids [S_i] padded to the longest (at least 1), with their masks."""
    states, source_mask = _pad_masked([e.source_states for e in entries])
    return StateInputs(states, source_mask, *_pad_masked([e.t5_ids for e in entries]))


def _pad_masked(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    counts = torch.tensor([len(row) for row in rows])
    length = max(1, int(counts.max()))
    return pad_rows(rows, length), (torch.arange(length) < counts[:, None]).long()


def _stack_masks(masks: list[np.ndarray | None], size: tuple[int, int]) -> Tensor | None:
    """[B, 1, H, W], ones for samples without a mask; None when no sample has one."""
    if all(mask is None for mask in masks):
        return None
    ones = np.ones((size[1], size[0]), np.float32)
    stacked = np.stack([ones if mask is None else mask for mask in masks])
    return torch.from_numpy(np.ascontiguousarray(stacked, np.float32))[:, None]


def _pin(holder: Batch | TextInputs) -> None:
    """Page-lock the tensors, so that their copies to the card overlap the computation."""
    with NOT_WHILE_RECORDING:
        for name, value in vars(holder).items():
            if isinstance(value, Tensor):
                setattr(holder, name, value.pin_memory())
