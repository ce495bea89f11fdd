"""The record of a dataset as one HTML page with thumbnails.

Each thumbnail is in the page once, as a style rule, however often it is shown.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from anima_fast.files import write_text
from anima_fast.reports.dataset.pixels import THUMBNAIL
from anima_fast.reports.dataset.record import (
    ProblemGroup,
    Record,
    described,
    facts,
    largest_crops,
    problem_groups,
    token_histogram,
)
from anima_fast.reports.pages import data_url, render

# Files named under a kind of problem, thumbnails next to them, groups of similar images.
_FILES, _PICTURES, _GROUPS = 100, 24, 40
# Tags, rows of the table of all images, and characters of a file's name.
_TAGS, _ROWS, _NAME = 60, 3000, 60
# With at most this many thumbnails the buckets are unfolded.
_OPEN = 60
# Height of a thumbnail on the page, in its pixels.
_TALLEST = 240


@dataclass(frozen=True)
class Figure:
    """One image on the page.

    name: of the file. lines: below the picture. style: the rule that holds its thumbnail; None when
    it has none. width, height: of the image. cuts: CSS places of the strips that its crop cuts off.
    """

    name: str
    lines: Sequence[str]
    style: str | None = None
    width: int = 1
    height: int = 1
    cuts: Sequence[str] = ()

    @property
    def widest(self) -> int:
        """Pixels of the page: a tall picture is narrow, so that it does not fill a screen."""
        return max(8, min(THUMBNAIL, round(_TALLEST * self.width / self.height)))


def write_page(
    record: Record, thumbnails: Mapping[str, bytes], path: Path, *, most_images: int
) -> Path:
    """Write the page, atomically.

    Args:
        record: of the dataset.
        thumbnails: a JPEG file for each image of the record that could be read, by its file.
        path: the HTML file.
        most_images: thumbnails in it, at most.

    Raises:
        UserError: the file cannot be written.
    """
    chosen = choose_thumbnails(record, thumbnails, most_images)
    view = _View(record, chosen)
    buckets = view.buckets()
    page = render(
        "dataset.html.j2",
        title=record["dataset"],
        lead=view.lead(),
        facts=facts(record),
        record=record,
        thumbnails={view.styles[file]: data_url(thumbnails[file]) for file in chosen},
        problems=[view.problems(one) for one in problem_groups(record)],
        buckets=buckets,
        bucket_bars=_bars((one["label"], (one["uses"],), one["counts"]) for one in buckets),
        buckets_open=len(chosen) <= _OPEN,
        crops=view.crops(),
        token_bars=_bars(
            (name, (qwen, t5), f"{qwen}, {t5}") for name, qwen, t5 in token_histogram(record)
        ),
        duplicates={kind: view.duplicates(kind) for kind in ("exact", "near")},
        most_tags=_TAGS,
        most_rows=_ROWS,
    )
    write_text(path, page)
    return path


class _View:
    """The parts of the page that hold pictures.

    Args:
        record: of the dataset.
        shown: files that have a thumbnail.
    """

    def __init__(self, record: Record, shown: Sequence[str]) -> None:
        self.record = record
        self.images = {image["file"]: image for image in record["images"]}
        self.styles = {file: f"t{i}" for i, file in enumerate(shown)}

    def figure(self, file: str, *lines: str, crop: Record | None = None) -> Figure:
        """An image by its file; `crop` is the one whose crop is shown over it."""
        name = Path(file).name
        if file not in self.styles:
            return Figure(name, lines)
        cuts = cut_strips(crop) if crop else []
        width, height = self.images[file]["size"]
        return Figure(name, lines, self.styles[file], width, height, cuts)

    def lead(self) -> str:
        """The sentences below the title."""
        count = self.record["plan"]["images"]
        lead = f"What would be trained: {count} images."
        if not self.record["decoded"]:
            return (
                f"{lead} Only headers were read: no thumbnails, no search for damage or duplicates."
            )
        if len(self.styles) < count:
            lead += f" {len(self.styles)} of them are shown."
        return f"{lead} Striped parts of a picture are cut off by its bucket."

    def problems(self, group: ProblemGroup) -> dict[str, Any]:
        """One kind of problem: pictures of its files, and the names of the others."""
        owners = caption_owners(self.record)
        figures: list[Figure] = []
        named: list[str] = []
        for problem in group.problems:
            file = owners.get(problem["file"], problem["file"])
            if file in self.styles and len(figures) < _PICTURES:
                crop = self.images[file] if group.kind == "crop" else None
                name = short_name(problem["file"])
                figures.append(self.figure(file, name, problem["text"], crop=crop))
            elif len(named) < _FILES:
                named.append(described({**problem, "file": short_name(problem["file"])}))
        if rest := len(group.problems) - len(figures) - len(named):
            named.append(f"and {rest} more")
        return {"about": group, "figures": figures, "named": named}

    def buckets(self) -> list[dict[str, Any]]:
        """Each bucket with its label, counts and pictures."""
        several = len({subset["dataset"] for subset in self.record["subsets"]}) > 1
        trained = [
            image for image in self.record["images"] if image["use"] not in ("validation", "unused")
        ]
        found = []
        for entry in self.record["buckets"]:
            size = f"{entry['width']}x{entry['height']}"
            place = entry["dataset"], [entry["width"], entry["height"]]
            mine = [image for image in trained if (image["dataset"], image["bucket"]) == place]
            shown = [image for image in mine if image["file"] in self.styles]
            figures = [
                self.figure(image["file"], *_lines_in_bucket(image), crop=image) for image in shown
            ]
            found.append(
                {
                    "label": f"dataset {entry['dataset']}: {size}" if several else size,
                    "uses": entry["repeats"],
                    "counts": f"{_count(entry['images'], 'image')}, "
                    + _count(entry["repeats"], "use"),
                    "note": "" if len(shown) == len(mine) else f", {len(shown)} shown",
                    "figures": figures,
                }
            )
        return found

    def crops(self) -> list[Figure]:
        """The images that lose most."""
        shown = [image for image in largest_crops(self.record) if image["file"] in self.styles]
        figures = []
        for image in shown[:_PICTURES]:
            size, bucket = (f"{w}x{h}" for w, h in (image["size"], image["bucket"]))
            lines = f"{image['cut_off']:.0%} cut off", f"{size} to {bucket}"
            figures.append(self.figure(image["file"], *lines, crop=image))
        return figures

    def duplicates(self, kind: str) -> list[list[Figure]]:
        """The first groups of `exact` or `near` duplicates."""
        groups = self.record["duplicates"][kind][:_GROUPS]
        return [
            [self.figure(file, short_name(file)) for file in group[:_PICTURES]] for group in groups
        ]


def short_name(file: str) -> str:
    """A file's name for the page; the middle of a long one is left out."""
    name = Path(file).name
    return name if len(name) <= _NAME else f"{name[: _NAME - 20]}…{name[-19:]}"


def crop_box(image: Record) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of what a centre crop keeps, as shares of the image's sides."""
    box = []
    for full, kept in zip(image["resized"], image["bucket"], strict=True):
        start = (full - kept) // 2
        box.append((start / full, (start + kept) / full))
    return box[0][0], box[1][0], box[0][1], box[1][1]


def cut_strips(image: Record) -> list[str]:
    """CSS places of the strips that the crop to the bucket removes."""
    left, top, right, bottom = (100 * share for share in crop_box(image))
    strips = []
    if right - left < 99.9:
        strips += [f"left:0;top:0;bottom:0;width:{left:.2f}%"]
        strips += [f"right:0;top:0;bottom:0;width:{100 - right:.2f}%"]
    if bottom - top < 99.9:
        strips += [f"left:0;right:0;top:0;height:{top:.2f}%"]
        strips += [f"left:0;right:0;bottom:0;height:{100 - bottom:.2f}%"]
    return strips


def caption_owners(record: Record) -> dict[str, str]:
    """The image of each caption file."""
    images = record["images"]
    return {image["caption_file"]: image["file"] for image in images if image["caption_file"]}


def choose_thumbnails(record: Record, thumbnails: Mapping[str, bytes], most: int) -> list[str]:
    """Images with findings and large crops first, then some of every bucket in turn."""
    owners = caption_owners(record)
    named = [problem["file"] for problem in record["problems"] if problem["file"]]
    found = [owners.get(file, file) for file in named]
    found += chain(*record["duplicates"]["exact"], *record["duplicates"]["near"])
    cropped = sorted(record["images"], key=lambda image: image["cut_off"], reverse=True)[:24]
    # Many images of one kind should not leave the others without a picture.
    wanted = [*found[: most // 2], *(image["file"] for image in cropped), *_in_turn(record)]
    return [file for file in dict.fromkeys(wanted) if file in thumbnails][:most]


def _in_turn(record: Record) -> Iterator[str]:
    """One image of each bucket, then the next of each, held-out and unused ones included."""
    buckets = defaultdict(list)
    for image in record["images"]:
        buckets[image["dataset"], tuple(image["bucket"])].append(image["file"])
    return (file for file in chain(*zip_longest(*buckets.values())) if file is not None)


def _bars(rows: Iterable[tuple[str, Sequence[int], str]]) -> list[tuple[str, list[str], str]]:
    """Bars of the counts in each row, widths in percent of the largest count."""
    rows = list(rows)
    most = max((count for _, counts, _ in rows for count in counts), default=0) or 1
    return [
        (label, [f"{100 * count / most:.1f}" if count else "" for count in counts], end)
        for label, counts, end in rows
    ]


def _lines_in_bucket(image: Record) -> tuple[str, str]:
    parts = ["{}x{}".format(*image["size"])]
    parts += [f"{image['repeats']} uses"] if image["repeats"] != 1 else []
    parts += [f"{image['cut_off']:.0%} cut"] if image["cut_off"] >= 0.005 else []
    return short_name(image["file"]), ", ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
