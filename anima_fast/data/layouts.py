"""Where images and captions are: "N_class" folders, caption files, metadata files, mask folders.

Images are directly in their folder. A caption is a text file with the image's stem; a metadata
file (.json or .jsonl) holds the captions of many images instead. Everything is UTF-8.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path

from PIL import Image, features

from anima_fast.data.caption_files import caption_endings, caption_file, lookalikes, read_caption
from anima_fast.data.captions import Caption
from anima_fast.data.problems import Problem
from anima_fast.data.subset import Subset
from anima_fast.errors import UserError
from anima_fast.files import read_text

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PLUGIN_EXTENSIONS = {".avif": "pillow-avif-plugin", ".jxl": "pillow-jxl-plugin"}


def some(names: list, limit: int = 3) -> str:
    """The first few names of a list, for messages."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(str(name) for name in names[:limit]) + more


@functools.cache
def image_extensions() -> tuple[str, ...]:
    """The extensions (lower case) that this machine can decode."""
    for module in ("pillow_avif", "pillow_jxl"):
        try:
            __import__(module)
        except ImportError:
            continue
    found = Image.registered_extensions()
    has_avif = features.check("avif") if "avif" in features.get_supported_modules() else True
    extra = [e for e in PLUGIN_EXTENSIONS if e in found and (e != ".avif" or has_avif)]
    return (*EXTENSIONS, *extra)


def list_images(folder: str | os.PathLike, notices: list[str]) -> list[Path]:
    """The images directly in `folder`, sorted by name; `UserError` when there are none."""
    if not os.path.isdir(folder):
        kind = "is not a folder" if os.path.exists(folder) else "does not exist"
        base = "" if os.path.isabs(folder) else f" in {os.getcwd()}, which it is relative to"
        raise UserError(f"image_dir {str(folder)!r} {kind}{base}: check the path")
    try:
        names = sorted(entry.name for entry in os.scandir(Path(folder)) if entry.is_file())
    except OSError as error:
        raise UserError(f"cannot list image_dir {folder}: {error.strerror or error}") from None
    # Hidden files are leftovers of file managers ("._name.jpg"), not images.
    names = [name for name in names if not name.startswith(".")]
    for extension, package in PLUGIN_EXTENSIONS.items():
        skipped = [n for n in names if n.lower().endswith(extension)]
        if skipped and extension not in image_extensions():
            notices.append(f"{folder}: {len(skipped)} {extension} files skipped: install {package}")
    paths = [Path(folder, n) for n in names if os.path.splitext(n)[1].lower() in image_extensions()]
    if not paths:
        raise UserError(
            f"image_dir {folder} has no images: expected files ending in "
            f"{', '.join(image_extensions())} directly in it (not in its subfolders)"
        )
    return paths


def class_folders(root: Path, notices: list[str]) -> list[dict]:
    """The subsets of a folder whose subfolders are named "N_words" (repeats, class tokens)."""
    if not os.path.isdir(root):
        raise UserError(f"folder {str(root)!r} does not exist: check the path")
    try:
        folders = sorted(Path(entry.path) for entry in os.scandir(root) if entry.is_dir())
    except OSError as error:
        raise UserError(f"cannot list folder {root}: {error.strerror or error}") from None
    subsets = []
    for folder in (f for f in folders if not f.name.startswith(".")):
        number, _, words = folder.name.partition("_")
        if not re.fullmatch(r"[0-9]{1,5}", number) or int(number) < 1:
            notices.append(f"folder {folder} is ignored: its name is not like '10_name'")
            continue
        subset = {"image_dir": str(folder), "num_repeats": int(number)}
        subsets.append(subset | ({"class_tokens": words} if words else {}))
    if not subsets:
        raise UserError(
            f"{root} has no folder named like '10_name' (repeats, then the class): put the images "
            "into such a folder"
        )
    return subsets


def captioned_images(
    subset: Subset, notices: list[str], problems: list[Problem] | None = None
) -> list[tuple[Path, Caption]]:
    """The images of a subset in order, each with its caption.

    `problems` collects what is wrong with single files, which are left out; None raises instead.
    """
    if subset.metadata_file is not None:
        return _read_metadata_file(subset.metadata_file, subset, problems)
    assert subset.image_dir is not None
    entries, without = [], []
    for path in list_images(subset.image_dir, notices):
        file = caption_file(path, subset.caption_extension)
        caption = _caption(file, subset, problems) if file else None
        if file is None:
            without.append(path)
        entries.append((path, caption or Caption(subset.class_tokens or "", file=file)))
    near = lookalikes(without)
    missing = without if subset.class_tokens is None else []
    if problems is not None:
        kind = "no caption" if missing else "caption not taken"
        problems += [Problem(kind, str(p), near.get(p, "")) for p in (missing or near)]
    elif missing:
        wanted = " or ".join(caption_endings(subset.caption_extension))
        names = some(
            [f"{path.name}: {near[path]}" if path in near else path.name for path in missing]
        )
        raise UserError(
            f"{subset.where}: {len(missing)} images in {subset.image_dir} have no caption "
            f"({names}): add a {wanted} file next to each, or set class_tokens to the caption of "
            'such images (class_tokens = "" trains them without a caption)'
        )
    return entries


def _caption(file: Path, subset: Subset, problems: list[Problem] | None) -> Caption | None:
    try:
        return read_caption(file, subset)
    except UserError as error:
        if problems is None:
            raise
        text = str(error).removeprefix(f"caption file {file} ")
        problems.append(Problem("unreadable caption", str(file), text))
        return None


def mask_files(
    images: list[Path], folder: str, where: str, problems: list[Problem] | None = None
) -> dict[Path, Path]:
    """The mask of each image: the image of the same stem in `folder`; `problems` as above."""
    by_stem = {path.stem: path for path in reversed(list_images(folder, []))}
    missing = [path for path in images if path.stem not in by_stem]
    if problems is not None:
        problems += [Problem("missing mask", str(path), f"not in {folder}") for path in missing]
    elif missing:
        raise UserError(
            f"{where}: {len(missing)} images have no mask of the same name in {folder} "
            f"({some([path.name for path in missing])}): add them or remove conditioning_data_dir"
        )
    return {path: by_stem[path.stem] for path in images if path.stem in by_stem}


def _read_metadata_file(
    path: str, subset: Subset, problems: list[Problem] | None
) -> list[tuple[Path, Caption]]:
    """The images that a .json or .jsonl metadata file names, sorted by path.

    `.json` is an object of image path or stem to {"caption", "tags"}; `.jsonl` has one object with
    "image_path" in a line. A relative path is below `image_dir`. Sizes written in the file are
    checked for their type only: the image's own header decides.
    """
    entries, missing = [], []
    folders: dict[str, dict[str, Path]] = {}
    for key, entry in _metadata_entries(path):
        caption, tags = entry.get("caption"), entry.get("tags")
        if not all(t is None or isinstance(t, str) for t in (caption, tags)):
            raise UserError(f"{path}: {key!r}: caption and tags must be texts")
        if caption is None and tags is None:
            raise UserError(f"{path}: {key!r} has neither caption nor tags: add one of them")
        image = _find_image(key, subset.image_dir, folders, f"{subset.where}: {path}")
        if image is None:
            missing.append(key)
        else:
            entries.append((image, Caption(caption or "", tags or "")))
    if problems is not None:
        problems += [Problem("missing image", key, f"named by {path}") for key in missing]
    elif missing:
        place = f" in {subset.image_dir}" if subset.image_dir else ""
        raise UserError(
            f"{path}: {len(missing)} images are missing{place} ({some(missing)}): add the files or "
            "remove their entries"
        )
    if not entries:
        raise UserError(f"{path} names no images: add entries with a caption")
    return sorted(entries, key=lambda entry: str(entry[0]))


def _metadata_entries(path: str) -> list[tuple[str, dict]]:
    text = read_text(path, "metadata file")
    is_lines = path.lower().endswith(".jsonl")
    if not is_lines and not path.lower().endswith(".json"):
        raise UserError(f"metadata file {path} is not .json or .jsonl: rename it")
    try:
        if is_lines:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
            found = [(r.get("image_path") if isinstance(r, dict) else None, r) for r in rows]
        else:
            data = json.loads(text)
            found = list(data.items()) if isinstance(data, dict) else [(None, data)]
    except (ValueError, RecursionError) as error:
        raise UserError(f"metadata file {path} is not valid JSON: {error}") from None
    pairs: list[tuple[str, dict]] = []
    for key, entry in found:
        if not isinstance(key, str) or not key or not isinstance(entry, dict):
            form = '{"image path": {"caption": ...}, ...}'
            form = '{"image_path": ..., "caption": ...} in each line' if is_lines else form
            raise UserError(f"metadata file {path}: expected {form}, found {str(entry)[:60]}")
        for name in ("image_size", "train_resolution"):
            size = entry.get(name)
            if size is not None and not _is_size(size):
                raise UserError(f"{path}: {key!r}: {name} must be [width, height]")
        pairs.append((key, entry))
    return pairs


def _is_size(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in value)
    )


def _find_image(
    key: str, image_dir: str | None, folders: dict[str, dict[str, Path]], where: str
) -> Path | None:
    """The file of a metadata key: a path, or a path without its extension."""
    if not os.path.isabs(key):
        if image_dir is None:
            raise UserError(f"{where}: {key!r} is a relative path: set image_dir for this subset")
        key = os.path.join(image_dir, key)
    if os.path.splitext(key)[1].lower() in image_extensions() and os.path.isfile(key):
        return Path(key)
    folder, stem = os.path.split(key)
    if folder not in folders:
        found = list_images(folder, []) if os.path.isdir(folder) and os.listdir(folder) else []
        folders[folder] = {p.stem: p for p in reversed(found)}
    return folders[folder].get(stem)
