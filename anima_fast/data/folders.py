"""Files in the image folders that no subset uses, and masks that do not fit."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from anima_fast.data import images, layouts
from anima_fast.data.caption_files import caption_endings, plain
from anima_fast.data.problems import Problem

if TYPE_CHECKING:
    from anima_fast.data.items import ImageItem
    from anima_fast.data.subset import Dataset, Subset

# Extensions that people expect to be read as images.
_OTHER_IMAGES = (
    ".gif", ".tif", ".tiff", ".heic", ".heif", ".psd", ".jfif", ".jp2", ".svg", ".tga", ".ico",
    ".avif", ".jxl", ".raw", ".dng", ".cr2", ".nef", ".arw", ".exr",
)  # fmt: skip
# Relative difference of aspect ratios from which a mask is called another shape.
_ASPECT = 0.02


def folder_problems(datasets: Iterable[Dataset]) -> list[Problem]:
    """Other formats, images in subfolders, dead links and captions without an image."""
    found = []
    for subset in (subset for dataset in datasets for subset in dataset.subsets):
        if subset.image_dir is not None and os.path.isdir(subset.image_dir):
            found += _of_folder(Path(subset.image_dir), subset)
    return found


def mask_problems(items: Iterable[ImageItem]) -> list[Problem]:
    """Mask files that cannot be read or have another shape than their image (headers only)."""
    found = []
    for item in items:
        if item.mask_path is None:
            continue
        try:
            header = images.read_header(item.mask_path)
        except images.ImageError as error:
            found.append(Problem("unreadable mask", str(item.mask_path), error.reason))
            continue
        width, height = header.upright_size if item.subset.exif_rotation else header.size
        if abs(width / height / (item.size[0] / item.size[1]) - 1) > _ASPECT:
            sizes = f"{width}x{height}, the image is {item.size[0]}x{item.size[1]}"
            found.append(Problem("mask aspect", str(item.mask_path), f"{sizes}: it is stretched"))
    return found


def _of_folder(folder: Path, subset: Subset) -> list[Problem]:
    known = layouts.image_extensions()
    entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    files = sorted(entry.name for entry in entries if entry.is_file())
    pictures = [Path(name) for name in files if Path(name).suffix.lower() in known]
    stems = {plain(name) for path in pictures for name in (path.stem, path.name)}
    found = []
    for name in files:
        suffix = Path(name).suffix.lower()
        if suffix in _OTHER_IMAGES and suffix not in known:
            found.append(Problem("skipped", str(folder / name), f"{suffix} is not read"))
    if subset.metadata_file is None:
        endings = caption_endings(subset.caption_extension)
        found += [
            Problem("orphan caption", str(folder / name))
            for name in files
            if name.endswith(endings) and not _has_image(name, endings, stems)
        ]
    for entry in sorted(entries, key=lambda entry: entry.name):
        if entry.is_symlink() and not os.path.exists(entry.path):
            found.append(Problem("skipped", entry.path, "a link to a file that does not exist"))
        if entry.is_dir() and (count := _count_images(entry.path, known)):
            found.append(Problem("subfolder", entry.path, f"{count} images"))
    return found


def _has_image(name: str, endings: tuple[str, ...], stems: set[str]) -> bool:
    """Whether an image has this caption, also one whose name continues with a face box."""
    stem = plain(next(name[: -len(ending)] for ending in endings if name.endswith(ending)))
    if stem in stems:
        return True
    return any(s.startswith(stem + "_") and images.face_box(s) is not None for s in stems)


def _count_images(folder: str, known: tuple[str, ...]) -> int:
    try:
        return sum(
            entry.is_file() and os.path.splitext(entry.name)[1].lower() in known
            for entry in os.scandir(folder)
        )
    except OSError:
        return 0
