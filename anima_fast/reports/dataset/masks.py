"""The loss masks drawn over their images, as the loss sees them.

An image is cut to its bucket as for training; its mask is cut the same way and averaged over each
latent cell (8x8 pixels). What is left out is darkened and reddened, in proportion; a yellow line
runs between cells that count more than half and those that count less.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from anima_fast.data import images
from anima_fast.data.cache import LATENT_SCALE
from anima_fast.data.problems import Problem
from anima_fast.errors import UserError
from anima_fast.files import atomic_write
from anima_fast.models.flow import mask_cells
from anima_fast.reports.dataset.pixels import OnProgress
from anima_fast.reports.dataset.survey import Survey

if TYPE_CHECKING:
    from anima_fast.data.items import ImageItem

# Each thread holds a few full-size images in memory.
_THREADS = 4
_RED = np.array([150, 20, 40], np.float32)
_YELLOW = np.array([255, 220, 0], np.uint8)
# How much of the picture remains where nothing is trained.
_FAINT = 0.3


def draw_masks(survey: Survey, folder: Path, *, on_progress: OnProgress) -> str:
    """Write a picture of each mask into `folder`, and say how many were written.

    Masks, and what is wrong with them, are added to the survey. Raises `UserError` when no subset
    has masks, or when the folder cannot be written.
    """
    subsets = [item.subset for item in survey.items]
    if not any(subset.alpha_mask or subset.conditioning_data_dir for subset in subsets):
        raise UserError(
            "--masks: no subset has masks: set alpha_mask = true or conditioning_data_dir in one"
        )
    items = [item for item in survey.items if item.subset.alpha_mask or item.mask_path]
    damaged = {Path(p.file) for p in survey.problems if p.kind.startswith("unreadable")}
    items = [item for item in items if item.path not in damaged and item.mask_path not in damaged]
    several = len({item.subset.where for item in items}) > 1
    with ThreadPoolExecutor(_THREADS, "masks") as pool:
        drawn = pool.map(partial(_draw, folder=folder, several=several), items)
        for done, (item, found) in enumerate(zip(items, drawn, strict=True), 1):
            on_progress("drawing masks", done, len(items))
            if isinstance(found, Problem):
                survey.problems += [] if found in survey.problems else [found]
                continue
            mask = "alpha" if item.mask_path is None else item.mask_path.name
            survey.masks.append({"file": str(item.path), "mask": mask, "trained": found})
            if found == 0:
                empty = Problem("empty mask", str(item.path), f"mask {mask}")
                survey.problems += [] if empty in survey.problems else [empty]
            # An image without transparency is another finding.
            elif found == 1 and item.mask_path is not None:
                survey.problems.append(Problem("full mask", str(item.path), f"mask {mask}"))
    survey.masks.sort(key=lambda mask: mask["trained"])
    return f"wrote {len(survey.masks)} pictures of masks into {folder}"


def overlay(pixels: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """The picture of a mask, [h, w, 3] uint8, as are the `pixels` below it.

    cells: [h / 8, w / 8] float32 in [0, 1], the loss factor of each latent cell.
    """
    factor = _enlarged(cells)[..., None]
    hidden = _FAINT * pixels + (1 - _FAINT) * _RED
    shown = np.rint(factor * pixels + (1 - factor) * hidden).astype(np.uint8)
    inside = _enlarged(cells > 0.5)
    edge = np.zeros_like(inside)
    edge[1:] |= inside[1:] != inside[:-1]
    edge[:, 1:] |= inside[:, 1:] != inside[:, :-1]
    shown[edge] = _YELLOW
    return shown


def _draw(item: ImageItem, *, folder: Path, several: bool) -> float | Problem:
    """Write the picture of one mask; the mean of its cells."""
    try:
        pixels, alpha = images.load_item(item)
        mask = images.load_mask(item) if item.mask_path is not None else alpha
    except images.ImageError as error:
        return Problem("unreadable", str(item.path), error.reason)
    # `draw_masks` gives only items that have one of the two.
    assert mask is not None
    cells = loss_cells(mask)
    rgb = np.rint((pixels.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)
    subset = item.subset
    if several:
        folder = folder / f"{subset.dataset_index}.{subset.index} {subset.name}"
    with atomic_write(folder / f"{item.path.name}.jpg") as file:
        Image.fromarray(overlay(rgb, cells)).save(file, "JPEG", quality=92)
    return float(cells.mean())


def loss_cells(mask: np.ndarray) -> np.ndarray:
    """The loss factors [h / 8, w / 8] of a pixel mask [h, w] with values 0..1."""
    height, width = mask.shape
    pixels = torch.from_numpy(np.ascontiguousarray(mask, np.float32))[None]
    return mask_cells(pixels, (height // LATENT_SCALE, width // LATENT_SCALE))[0, 0].numpy()


def _enlarged(cells: np.ndarray) -> np.ndarray:
    return cells.repeat(LATENT_SCALE, 0).repeat(LATENT_SCALE, 1)
