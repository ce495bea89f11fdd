"""Thumbnails on a page: which images get one, and how it is shown with its crop.

Each thumbnail stands in the page once, as a style rule, however often it is shown.
"""

from __future__ import annotations

import base64
import html
from collections import defaultdict
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from anima_fast.data.cache_folders import printable
from anima_fast.data.findings import crop_box, lost
from anima_fast.reports.dataset.pixels import THUMBNAIL

if TYPE_CHECKING:
    from anima_fast.data.items import ImageItem
    from anima_fast.reports.dataset.survey import Survey

# Height of a thumbnail on the page, in its pixels.
_TALLEST = 240

STYLE = """
.thumbs { display: grid; gap: 10px; align-items: end;
  grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)); }
.thumb { position: relative; background-size: 100% 100%; border-radius: 4px; overflow: hidden;
  width: 100%; max-width: 176px; min-height: 8px; background-color: var(--line); }
.cut { position: absolute; background: repeating-linear-gradient(45deg, #d9480fcc 0 4px,
  #000a 4px 8px); }
.thumbs figure { min-width: 0; }
.thumbs figcaption { overflow-wrap: anywhere; line-height: 1.35; margin-top: 3px; }
.none { display: grid; place-items: center; aspect-ratio: 1; font-size: 12px; color: var(--soft); }
"""


class Thumbs:
    """The thumbnails of a page, by file."""

    def __init__(self, survey: Survey, most: int) -> None:
        self._looks = survey.looks
        self._sizes = {item.path: item.size for item in survey.items}
        names = _choose(survey, most)
        self._classes = {path: f"t{i}" for i, path in enumerate(names)}

    def __contains__(self, path: Path) -> bool:
        return path in self._classes

    def __len__(self) -> int:
        return len(self._classes)

    def rules(self) -> str:
        """The style rules that hold the pictures."""
        return "\n".join(
            f".{name} {{ background-image: url(data:image/jpeg;base64,{self._data(path)}) }}"
            for path, name in self._classes.items()
        )

    def figure(self, path: Path, caption: str, crop: ImageItem | None = None) -> str:
        """One thumbnail with a line below it; `crop` shades what its placement cuts off."""
        name = html.escape(printable(path.name))
        if path not in self._classes:
            picture = f'<div class="thumb none">{name}</div>'
        else:
            width, height = self._sizes[path]
            picture = (
                f'<div class="thumb {self._classes[path]}" role="img" aria-label="{name}" '
                f'style="aspect-ratio: {width} / {height}; max-width: {_widest(width, height)}px">'
                f"{_cuts(crop) if crop else ''}</div>"
            )
        return f'<figure title="{name}">{picture}<figcaption>{caption}</figcaption></figure>'

    def _data(self, path: Path) -> str:
        return base64.b64encode(self._looks[path].thumbnail).decode()


def _widest(width: int, height: int) -> int:
    """Pixels of the page: a tall picture is narrow, so that it does not fill a screen."""
    return max(8, min(THUMBNAIL, round(_TALLEST * width / height)))


def _cuts(item: ImageItem) -> str:
    """Shades over the strips that the crop to the bucket takes away."""
    left, top, right, bottom = (100 * share for share in crop_box(item))
    strips = []
    if right - left < 99.9:
        strips += [f"left:0;top:0;bottom:0;width:{left:.2f}%"]
        strips += [f"right:0;top:0;bottom:0;width:{100 - right:.2f}%"]
    if bottom - top < 99.9:
        strips += [f"left:0;right:0;top:0;height:{top:.2f}%"]
        strips += [f"left:0;right:0;bottom:0;height:{100 - bottom:.2f}%"]
    return "".join(f'<span class="cut" style="{strip}"></span>' for strip in strips)


def _choose(survey: Survey, most: int) -> list[Path]:
    """Images with findings and large crops first, then some of every bucket in turn."""
    found = [Path(problem.file) for problem in survey.problems if problem.file]
    captions = {item.caption.file: item.path for item in survey.items if item.caption.file}
    found = [captions.get(path, path) for path in found]
    found += [path for group in (*survey.exact, *survey.near) for path in group]
    cropped = sorted(survey.items, key=lost, reverse=True)[:24]
    # Many images of one kind shall not leave the others without a picture.
    found = found[: most // 2] + [item.path for item in cropped]
    wanted = dict.fromkeys([*found, *_in_turn(survey.items)])
    shown = [path for path in wanted if path in survey.looks]
    return [path for path in shown if survey.looks[path].thumbnail is not None][:most]


def _in_turn(items: Iterable[ImageItem]) -> list[Path]:
    buckets = defaultdict(list)
    for item in items:
        buckets[item.dataset.index, item.bucket].append(item.path)
    rounds = zip_longest(*buckets.values())
    return [path for paths in rounds for path in paths if path is not None]
