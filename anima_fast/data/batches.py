"""Batches for training: latents, text inputs and masks of item indices, one batch ahead.

Everything random (mirroring, choice of the caption's rendering, caption dropout, augmentation) is a
pure function of (seed, epoch, step, position in the batch, item), so a resumed run repeats it.

Contexts of different lengths are padded with zero rows to S, the longest of the batch. A zero row
is itself a zero key in cross attention, so with `zero_keys` = 512 − S more of them every sample
sees exactly its own rows and zeros up to 512. Above 512 rows the padding of a shorter text is more
than it would have alone, and its count of further zero keys is negative: max(512, own rows) − S.
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from anima_fast.data import captions, images
from anima_fast.data.cache import LatentEntry, Stored, TextEntry
from anima_fast.data.encode import EncodedDataset
from anima_fast.data.encode_text import pad_rows
from anima_fast.data.seeding import seeded
from anima_fast.device import NOT_WHILE_RECORDING

if TYPE_CHECKING:
    from anima_fast.data.items import DatasetPlan, ImageItem
    from anima_fast.data.lowres import LowRes
    from anima_fast.options.run import TrainOptions

# The DiT attends to at least this many text rows.
PADDED_ROWS = 512


@dataclass
class TextInputs:
    """What the text path of one batch needs, by mode.

    context: `context` [B, S, C] and `zero_keys` (see `zero_key_counts`). states: `source_states`
    [B, N, C] with `source_mask` [B, N] int64, `t5_ids` and `t5_mask` [B, S] int64. live:
    `captions`.
    """

    context: Tensor | None = None
    zero_keys: int | tuple[int, ...] = 0
    source_states: Tensor | None = None
    source_mask: Tensor | None = None
    t5_ids: Tensor | None = None
    t5_mask: Tensor | None = None
    captions: list[str] | None = None


@dataclass
class Batch:
    """One batch on the CPU (pinned for a CUDA run).

    latents: [B, 16, h, w] fp32, or None when `pixels` [B, 3, H, W] fp32 in [-1, 1] are to be
    encoded. loss_weights: [B] fp32. masks: [B, 1, H, W] fp32 0..1 at pixel resolution, or None.
    sigma: noise levels [B] fp32 where they were drawn with the batch, `small` whether it holds
    smaller pictures (training/lowres.py).
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
class Access:
    """One use of one item; all that its randomness depends on."""

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
        """Mirror the image: half of the accesses with flip_aug, none in validation."""
        wanted = self.item.subset.flip_aug and not self.validation
        return wanted and self.rng("flip").random() < 0.5


class Batches:
    """Loads batches of a plan from its encoded dataset."""

    def __init__(
        self,
        plan: DatasetPlan,
        encoded: EncodedDataset,
        options: TrainOptions,
        seed: int,
        lowres: LowRes | None = None,
    ) -> None:
        self._lowres = lowres
        self._plan, self._encoded, self._options, self._seed = plan, encoded, options, seed
        threads = min(options.max_data_loader_n_workers, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None

    def load(self, indices: list[int], *, epoch: int, step: int, validation: bool = False) -> Batch:
        """The batch of these items.

        Args:
            indices: into `plan.items`, or `plan.validation_items` with `validation`; of one bucket.
            epoch: counts from 1.
            step: number of the batch within the epoch, from 0.
            validation: no dropout, no mirroring, always the same rendering of a caption.
        Raises:
            UserError: an image or cache file that can no longer be read.
        """
        items = self._plan.validation_items if validation else self._plan.items
        accesses = [
            Access(items[index], self._seed, epoch, step, position, validation)
            for position, index in enumerate(indices)
        ]
        sigma, small = None, None
        if self._lowres is not None and not validation:
            key = (self._seed, epoch, step)
            sigma, high = self._lowres.draw(len(accesses), accesses[0].item.bucket, *key)
            small = self._smaller(accesses) if high else None
        is_cached = self._encoded.image_mode == "cached"
        batch = (self._cached if is_cached else self._live)(small or accesses)
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

    def _smaller(self, accesses: list[Access]) -> list[Access] | None:
        """The same uses of the smaller pictures; None where they would be too small."""
        items = [self._lowres.small_item(access.item) for access in accesses]
        if any(item is None for item in items):
            return None
        return [replace(a, item=item) for a, item in zip(accesses, items, strict=True)]

    def _cached(self, accesses: list[Access]) -> Batch:
        entries = [self._latents(access).get() for access in accesses]
        flips = [access.is_flipped for access in accesses]
        latents = [e.flipped if flip else e.latents for e, flip in zip(entries, flips, strict=True)]
        masks = [
            self._mask(access, _alpha(entry), flip)
            for access, entry, flip in zip(accesses, entries, flips, strict=True)
        ]
        return self._batch(accesses, masks, latents=torch.stack(latents))

    def _live(self, accesses: list[Access]) -> Batch:
        run = self._pool.map if self._pool is not None else map
        pixels, masks = zip(*run(self._augmented, accesses), strict=True)
        return self._batch(accesses, masks, pixels=torch.stack(pixels))

    def _augmented(self, access: Access) -> tuple[Tensor, np.ndarray | None]:
        """Pixels [3, H, W] and mask [H, W] of one access, cropped and mirrored alike."""
        rng = None if access.validation else access.rng("augment")
        pixels, alpha = images.load_item(access.item, crop_rng=rng)
        mask = self._mask(access, alpha, access.is_flipped)
        if access.is_flipped:
            pixels = pixels[..., ::-1]
        return torch.from_numpy(np.ascontiguousarray(pixels)), mask

    def _mask(self, access: Access, alpha: np.ndarray | None, flip: bool) -> np.ndarray | None:
        """The item's mask file, else its alpha, else None."""
        mask = alpha
        if access.item.mask_path is not None:
            is_live = self._encoded.image_mode == "live" and not access.validation
            rng = access.rng("augment") if is_live else None
            mask = images.load_mask(access.item, crop_rng=rng)
        return mask[:, ::-1] if flip and mask is not None else mask

    def _batch(
        self,
        accesses: list[Access],
        masks: Iterable[np.ndarray | None],
        *,
        latents: Tensor | None = None,
        pixels: Tensor | None = None,
    ) -> Batch:
        items = [access.item for access in accesses]
        weights = torch.tensor([item.loss_weight for item in items], dtype=torch.float32)
        stacked = _stack_masks(list(masks), items[0].bucket)
        return Batch(latents, self._text(accesses), weights, stacked, items, pixels)

    def _text(self, accesses: list[Access]) -> TextInputs:
        if self._encoded.text_mode == "live":
            return TextInputs(captions=[self._caption(access) for access in accesses])
        entries = [self._rendering(access) for access in accesses]
        if self._encoded.text_mode == "context":
            return pad_contexts(entries)
        return pad_states(entries)

    def _rendering(self, access: Access) -> TextEntry:
        """One of the cached renderings of the caption, or the encoding of "" when it is dropped."""
        encoded, index = self._encoded, access.item.index
        if access.validation:
            return encoded.validation_texts[index][0].get()
        rng = access.rng("caption")
        if captions.is_dropped(access.item.subset, rng, access.epoch):
            return encoded.empty_text.get()
        variants = encoded.texts[index]
        return variants[rng.randrange(len(variants))].get()

    def _caption(self, access: Access) -> str:
        step, max_steps = self._optimizer_steps(access.epoch, access.step)
        return captions.render(
            access.item.caption,
            access.item.subset,
            rng=access.rng("caption"),
            epoch=access.epoch,
            step=step,
            max_steps=max_steps,
        )

    def _optimizer_steps(self, epoch: int, step: int) -> tuple[int, int]:
        """Optimizer steps before a batch, and in the whole run: what token warm-up counts."""
        options = self._options
        updates = -(-self._plan.batches_per_epoch // options.gradient_accumulation_steps)
        done = (epoch - 1) * updates + step // options.gradient_accumulation_steps
        epochs = options.max_train_epochs
        return done, epochs * updates if epochs else options.max_train_steps

    def _latents(self, access: Access) -> Stored[LatentEntry]:
        encoded = self._encoded
        if access.validation:
            return encoded.validation_latents[access.item.index]
        is_full = access.item.bucket == self._plan.items[access.item.index].bucket
        return (encoded.latents if is_full else encoded.small_latents)[access.item.index]


def pad_contexts(entries: list[TextEntry]) -> TextInputs:
    """Contexts [S_i, C] as [B, S, C] with S the longest, and the zero rows beyond it."""
    length = max(len(entry.context) for entry in entries)
    context = pad_rows([entry.context for entry in entries], length)
    zero_keys = zero_key_counts([len(entry.context) for entry in entries])
    return TextInputs(context=context, zero_keys=zero_keys)


def zero_key_counts(rows: list[int]) -> int | tuple[int, ...]:
    """Zero keys beyond a batch of contexts that is as long as its longest.

    Args:
        rows: the real rows of each text.
    Returns:
        one count for all where they agree, else one per sample; negative where the batch's padding
        holds more zero rows than the text would have alone.
    """
    length = max(rows)
    counts = tuple(max(PADDED_ROWS, own) - length for own in rows)
    return counts if len(set(counts)) > 1 else counts[0]


def pad_states(entries: list[TextEntry]) -> TextInputs:
    """States [N_i, C] and T5 ids [S_i] padded to the longest (at least 1), with their masks."""
    states, source_mask = _pad_masked([entry.source_states for entry in entries])
    ids, mask = _pad_masked([entry.t5_ids for entry in entries])
    return TextInputs(source_states=states, source_mask=source_mask, t5_ids=ids, t5_mask=mask)


def _pad_masked(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    counts = torch.tensor([len(row) for row in rows])
    length = max(1, int(counts.max()))
    return pad_rows(rows, length), (torch.arange(length) < counts[:, None]).long()


def _alpha(entry: LatentEntry) -> np.ndarray | None:
    return None if entry.alpha is None else entry.alpha.numpy() / np.float32(255)


def _stack_masks(masks: list[np.ndarray | None], size: tuple[int, int]) -> Tensor | None:
    """[B, 1, H, W], ones for samples without a mask; None when no sample has one."""
    if all(mask is None for mask in masks):
        return None
    ones = np.ones((size[1], size[0]), np.float32)
    stacked = np.stack([ones if mask is None else mask for mask in masks])
    return torch.from_numpy(np.ascontiguousarray(stacked, np.float32))[:, None]


def _pin(holder: Batch | TextInputs) -> None:
    """Page-lock the tensors, so that their copies to the card run beside the computation."""
    with NOT_WHILE_RECORDING:
        for name, value in vars(holder).items():
            if isinstance(value, Tensor):
                setattr(holder, name, value.pin_memory())
