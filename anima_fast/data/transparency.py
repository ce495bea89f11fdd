"""What the alpha channel of an image means for training: a background, or a loss mask."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from anima_fast.data import images
from anima_fast.data.items import DatasetPlan
from anima_fast.data.problems import Problem

# Alpha above this is opaque to the eye.
_OPAQUE = 250
# Images that a start decodes for their alpha; `anima-fast dataset` and --strict_data take all.
MOST_DECODED = 400
_THREADS = 8


def alpha_problems(plan: DatasetPlan, *, everything: bool) -> tuple[list[Problem], int]:
    """Findings about the alpha channels of a plan's images, and how many were not looked at.

    Only images whose header promises transparency are decoded, unless `everything` is set the
    first `MOST_DECODED` of them.
    """
    chosen: dict[Path, bool] = {}
    found = []
    for item in (*plan.items, *plan.validation_items):
        masked = item.subset.alpha_mask
        if item.has_alpha:
            chosen[item.path] = chosen.get(item.path, False) or masked
        elif masked:
            found.append(Problem("no alpha", str(item.path)))
    some = dict(list(chosen.items())[: None if everything else MOST_DECODED])
    with ThreadPoolExecutor(_THREADS, "alpha") as pool:
        for problem in pool.map(_look, some.keys(), some.values()):
            found += [] if problem is None else [problem]
    return found, len(chosen) - len(some)


def alpha_problem(image: Image.Image, file: str, masked: bool) -> Problem | None:
    """What is to be said about a decoded image's alpha; `masked` where it is a loss mask."""
    if not images.has_alpha(image):
        return Problem("no alpha", file) if masked else None
    alpha = np.asarray(image.convert("RGBA").getchannel("A"))
    if masked:
        return None if alpha.any() else Problem("empty mask", file, "mask alpha")
    transparent = float((alpha < _OPAQUE).mean())
    return Problem("transparent", file, f"{transparent:.0%} of it") if transparent else None


def _look(path: Path, masked: bool) -> Problem | None:
    try:
        with images.opened(path) as image:
            image.load()
            return alpha_problem(image, str(path), masked)
    except images.ImageError as error:
        return Problem("unreadable", str(path), error.reason)
