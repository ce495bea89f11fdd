"""Checks of a finished plan: what cannot be trained, and what the user should know before it is."""

from __future__ import annotations

import math
from collections.abc import Iterable

from anima_fast.data import images, layouts
from anima_fast.data.dataset_config import caches_latents, option
from anima_fast.data.items import ImageItem
from anima_fast.data.problems import Problem
from anima_fast.data.subset import Dataset
from anima_fast.errors import UserError


def check_exact_sizes(
    items: Iterable[ImageItem], options: object, problems: list[Problem] | None = None
) -> None:
    """Without buckets and without cached latents nothing resizes the images.

    Those of another size go to `problems`, or raise `UserError` when that is None.
    """
    if caches_latents(options):
        return
    wrong = [
        item
        for item in items
        if not item.dataset.enable_bucket
        and not item.subset.random_crop
        and item.size != item.bucket
    ]
    sizes = [f"{item.size[0]}x{item.size[1]}" for item in wrong]
    if problems is not None:
        pairs = zip(wrong, sizes, strict=True)
        problems += [Problem("wrong size", str(item.path), size) for item, size in pairs]
    elif wrong:
        named = [f"{item.path.name} ({size})" for item, size in zip(wrong, sizes, strict=True)]
        raise UserError(
            f"{len(wrong)} images do not have the size of the dataset's resolution "
            f"({layouts.some(named)}): set enable_bucket = true, or use cache_latents (resizes and "
            "crops the centre) or random_crop"
        )


def advise(items: list[ImageItem], datasets: list[Dataset], options: object) -> list[str]:
    """Notices about what will be trained but may not be what the user wants.

    Args:
        items: training and validation images of all datasets.
    """
    return [
        *(notice for dataset in datasets for notice in _about_limits(items, dataset)),
        *_about_masks(items, options),
        *_about_faces(items, options),
        *_about_cache_info(items),
        *_about_attributes(datasets),
    ]


def about_rotation(items: list[ImageItem]) -> list[str]:
    """A notice that names the images with an EXIF rotation that is not applied."""
    turned = {item.path.name for item in items if item.exif_rotated and not item.is_turned}
    rotated = sorted(turned)
    if not rotated:
        return []
    return [
        f"{len(rotated)} images carry an EXIF rotation, which is not applied "
        f"({layouts.some(rotated)}): if they lie on their side, set exif_rotation = true or save "
        "them upright"
    ]


def _about_limits(items: list[ImageItem], dataset: Dataset) -> list[str]:
    mine = [item for item in items if item.dataset.index == dataset.index]
    shrunk = sum(_is_shrunk_by_limit(item) for item in mine)
    if not shrunk:
        return []
    width, height = dataset.resolution
    return [
        f"datasets[{dataset.index}]: max_bucket_reso {dataset.max_bucket_reso} makes {shrunk} of "
        f"{len(mine)} images smaller than the area of {width}x{height}: set max_bucket_reso = "
        f"{2 * max(width, height)} to train portrait and landscape images at full area"
    ]


def _about_masks(items: list[ImageItem], options: object) -> list[str]:
    has_masks = any(item.mask_path or item.subset.alpha_mask for item in items)
    if has_masks or not option(options, "masked_loss", False):
        return []
    return ["masked_loss has no effect: no subset has conditioning_data_dir or alpha_mask"]


def _about_faces(items: list[ImageItem], options: object) -> list[str]:
    faces = [item for item in items if item.subset.face_crop_aug_range]
    if faces and caches_latents(options):
        return ["face_crop_aug_range is ignored: cached latents are cropped at the centre"]
    plain = [item.path.name for item in faces if images.face_box(item.path.stem) is None]
    if not plain:
        return []
    return [
        f"face_crop_aug_range is ignored for {len(plain)} images without a face box at the end "
        f"of the name, as in name_CX_CY_W_H ({layouts.some(plain)})"
    ]


def _about_cache_info(items: list[ImageItem]) -> list[str]:
    if not any(item.subset.cache_info for item in items):
        return []
    return ["cache_info has no effect: captions and headers are read again at every start"]


def _about_attributes(datasets: list[Dataset]) -> list[str]:
    named = [s.where for dataset in datasets for s in dataset.subsets if s.custom_attributes]
    if not named:
        return []
    what = "custom_attributes have no effect, timestep_sampling.offset included"
    return [f"{what}: {layouts.some(named)}"]


def _is_shrunk_by_limit(item: ImageItem) -> bool:
    dataset = item.dataset
    high = dataset.max_bucket_reso
    if (
        not dataset.enable_bucket
        or dataset.bucket_no_upscale
        or high >= 2 * max(dataset.resolution)
    ):
        return False
    area = math.prod(dataset.resolution)
    return max(item.bucket) == high and math.prod(item.bucket) < 0.9 * area
