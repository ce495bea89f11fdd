"""What a finished plan shows without decoding a pixel: problems of single files, and notices."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

from anima_fast.data.captions import has_empty_tag
from anima_fast.data.dataset_config import caches_latents
from anima_fast.data.images import face_box
from anima_fast.data.layouts import some
from anima_fast.data.problems import Problem
from anima_fast.errors import UserError
from anima_fast.options.run import AnyRun

if TYPE_CHECKING:
    from anima_fast.data.caption_tokens import CaptionTokens
    from anima_fast.data.items import DatasetPlan, ImageItem
    from anima_fast.data.subset import Dataset

# Enlarged by more than this, an image is soft; a crop that removes more than this share is named.
MOST_SCALE, MOST_LOST = 1.25, 0.2
# A backslash before a bracket, or a weight.
_PROMPT_SYNTAX = re.compile(r"\\[()\[\]]|\([^()]*:\s*\d*\.?\d+\)")
# Words joined by underscores; not faces such as ^_^ and not score_7, which is a tag of Anima's.
_UNDERSCORE = re.compile(r"(?!score_)\S*\w[^\W_]_(?:[^\W_]|\()\S*", re.IGNORECASE)


def check_exact_sizes(
    items: Iterable[ImageItem], options: AnyRun, problems: list[Problem] | None = None
) -> None:
    """Without buckets and without cached latents nothing resizes the images.

    Those of another size go to `problems`, or raise `UserError` when that is None.
    """
    if caches_latents(options):
        return
    wrong = [
        (item, f"{item.size[0]}x{item.size[1]}")
        for item in items
        if not (item.dataset.enable_bucket or item.subset.random_crop or item.size == item.bucket)
    ]
    if problems is not None:
        problems += [Problem("wrong size", str(item.path), size) for item, size in wrong]
    elif wrong:
        named = some([f"{item.path.name} ({size})" for item, size in wrong])
        raise UserError(
            f"{len(wrong)} images do not have the size of the dataset's resolution "
            f"({named}): set enable_bucket = true, or use cache_latents (resizes and "
            "crops the centre) or random_crop"
        )


def advise(items: list[ImageItem], datasets: list[Dataset], options: AnyRun) -> Iterator[str]:
    """Notices about what will be trained but may not be what the user wants."""
    for dataset in datasets:
        mine = [item for item in items if item.dataset.index == dataset.index]
        if shrunk := sum(_is_shrunk_by_limit(item) for item in mine):
            width, height = dataset.resolution
            yield (
                f"datasets[{dataset.index}]: max_bucket_reso {dataset.max_bucket_reso} makes "
                f"{shrunk} of {len(mine)} images smaller than the area of {width}x{height}: set "
                f"max_bucket_reso = {2 * max(width, height)} to train portrait and landscape "
                "images at full area"
            )
    has_masks = any(item.mask_path or item.subset.alpha_mask for item in items)
    masked = {i.path for i in items if i.mask_path or (i.subset.alpha_mask and i.has_alpha)}
    if has_masks:
        every = len({item.path for item in items})
        rest = "" if len(masked) == every else "; the others are trained in full"
        yield f"masks for {len(masked)} of {every} images{rest}"
    if options.masked_loss and not has_masks:
        yield "masked_loss has no effect: no subset has conditioning_data_dir or alpha_mask"
    faces = [item for item in items if item.subset.face_crop_aug_range]
    plain = [item.path.name for item in faces if face_box(item.path.stem) is None]
    if faces and caches_latents(options):
        yield "face_crop_aug_range is ignored: cached latents are cropped at the centre"
    elif plain:
        yield (
            f"face_crop_aug_range is ignored for {len(plain)} images without a face box at the end "
            f"of the name, as in name_CX_CY_W_H ({some(plain)})"
        )
    if any(item.subset.cache_info for item in items):
        yield "cache_info has no effect: captions and headers are read again at every start"
    named = [s.where for dataset in datasets for s in dataset.subsets if s.custom_attributes]
    if named:
        what = "custom_attributes have no effect, timestep_sampling.offset included"
        yield f"{what}: {some(named)}"


def _is_shrunk_by_limit(item: ImageItem) -> bool:
    dataset, high = item.dataset, item.dataset.max_bucket_reso
    if not dataset.enable_bucket or dataset.bucket_no_upscale:
        return False
    if high >= 2 * max(dataset.resolution):
        return False
    area = math.prod(dataset.resolution)
    return max(item.bucket) == high and math.prod(item.bucket) < 0.9 * area


def scale(item: ImageItem) -> float:
    """The factor of an image's size when it is resized to its bucket."""
    return max(item.resized[i] / item.size[i] for i in (0, 1))


def lost(item: ImageItem) -> float:
    """The share of an image that the crop to its bucket removes."""
    return max(0.0, 1 - math.prod(item.bucket) / math.prod(item.resized))


def has_no_caption(item: ImageItem) -> bool:
    """Whether an image has neither a caption file nor an entry in a metadata file."""
    return item.caption.file is None and item.subset.metadata_file is None


def plan_problems(plan: DatasetPlan, tokens: CaptionTokens | None) -> list[Problem]:
    """What the images' headers and captions show, each file once per kind."""
    items = [*plan.items, *plan.validation_items]
    in_order = chain(
        *(_of_caption(item) for item in items),
        (Problem("unused", str(item.path)) for item in plan.unused),
        _trained_and_held_out(plan),
        (Problem("rotated", str(i.path)) for i in items if i.exif_rotated and not i.is_turned),
        # The worst first.
        *(_upscaled(item) for item in sorted(items, key=scale, reverse=True)),
        *(_cropped(item) for item in sorted(items, key=lost, reverse=True)),
    )
    found: dict[tuple[str, str], Problem] = {}
    for problem in in_order:
        found.setdefault((problem.kind, problem.file), problem)
    if tokens is not None:
        for caption in tokens.long:
            cut = "" if tokens.whole else f", the last {caption.beyond} are lost"
            kind = "whole caption" if tokens.whole else "long caption"
            problem = Problem(kind, str(caption.file), f"{caption.tokens} tokens{cut}")
            found[problem.kind, problem.file] = problem
    return list(found.values())


def _of_caption(item: ImageItem) -> Iterator[Problem]:
    if item.caption.blank:
        yield Problem("empty caption", str(item.caption.file))
    elif has_no_caption(item) and item.subset.class_tokens is not None:
        yield Problem("class caption", str(item.path), f"trained as {item.subset.class_tokens!r}")
    if lines := item.caption.unused_lines(item.subset):
        what = "1 line is left out" if lines == 1 else f"{lines} lines are left out"
        yield Problem("further lines", str(item.caption.file or item.path), what)
    file, subset = str(item.caption.file or item.path), item.subset
    parts = [
        p.strip() for n in item.caption.lines(subset) for p in n.split(subset.caption_separator)
    ]
    if found := next(filter(_PROMPT_SYNTAX.search, parts), None):
        yield Problem("prompt syntax", file, found)
    if found := next(filter(_UNDERSCORE.fullmatch, parts), None):
        yield Problem("underscore", file, found)
    if has_empty_tag(item.caption, subset):
        yield Problem("empty tag", file)


def _trained_and_held_out(plan: DatasetPlan) -> Iterator[Problem]:
    """Validation images that another subset or dataset trains."""
    held_out = {os.path.realpath(item.path): item for item in plan.validation_items}
    for item in plan.items if held_out else ():
        if other := held_out.get(os.path.realpath(item.path)):
            text = f"held out in {other.subset.where}, trained in {item.subset.where}"
            yield Problem("trained and held out", str(other.path), text)


def _upscaled(item: ImageItem) -> Iterator[Problem]:
    if (factor := scale(item)) > MOST_SCALE:
        yield Problem("upscaled", str(item.path), f"{_sizes(item)}: enlarged {factor:.1f}x")


def _cropped(item: ImageItem) -> Iterator[Problem]:
    if (share := lost(item)) > MOST_LOST:
        yield Problem("crop", str(item.path), f"{_sizes(item)}: {share:.0%} cut off")


def _sizes(item: ImageItem) -> str:
    (width, height), bucket = item.size, item.bucket
    return f"{width}x{height} to {bucket[0]}x{bucket[1]}"
