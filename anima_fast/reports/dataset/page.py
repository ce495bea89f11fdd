"""The record of a dataset as one HTML page with thumbnails.

This file chooses what is shown; `templates/dataset.html.j2` says how. Each thumbnail is in the page
once, as a style rule, however often it is shown.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path

from anima_fast.files import write_text
from anima_fast.reports.dataset.pixels import THUMBNAIL
from anima_fast.reports.dataset.record import (
    Record,
    described,
    facts,
    largest_crops,
    problem_groups,
    size_text,
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


def write_page(
    record: Record, thumbnails: Mapping[str, bytes], path: Path, *, most_images: int
) -> Path:
    """Write the page to `path`, atomically; raises `UserError` when it cannot be written.

    thumbnails: a JPEG file for each image of the record that could be read, by its file; at most
    `most_images` of them are shown.
    """
    shown = choose_thumbnails(record, thumbnails, most_images)
    # The style rule that holds the thumbnail of each file.
    styles = {file: f"t{i}" for i, file in enumerate(shown)}
    buckets = list(_buckets(record, styles))
    page = render(
        "dataset.html.j2",
        title=record["dataset"],
        lead=_lead(record, len(shown)),
        facts=facts(record),
        record=record,
        images={image["file"]: image for image in record["images"]},
        styles=styles,
        thumbnails={style: data_url(thumbnails[file]) for file, style in styles.items()},
        problems=_problems(record, styles),
        buckets=buckets,
        bucket_bars=_bars((one["label"], (one["uses"],), one["counts"]) for one in buckets),
        buckets_open=len(shown) <= _OPEN,
        crops=[image for image in largest_crops(record) if image["file"] in styles][:_PICTURES],
        token_bars=_bars(
            (name, (qwen, t5), f"{qwen}, {t5}") for name, qwen, t5 in token_histogram(record)
        ),
        most={"tags": _TAGS, "rows": _ROWS, "groups": _GROUPS, "pictures": _PICTURES},
        short_name=short_name,
        size_text=size_text,
        widest=widest,
        cut_strips=cut_strips,
    )
    write_text(path, page)
    return path


def _lead(record: Record, shown: int) -> str:
    """The sentences below the title."""
    count = record["plan"]["images"]
    lead = f"What would be trained: {count} images."
    if not record["decoded"]:
        return f"{lead} Only headers were read: no thumbnails, no search for damage or duplicates."
    if shown < count:
        lead += f" {shown} of them are shown."
    return f"{lead} Striped parts of a picture are cut off by its bucket."


def _problems(record: Record, shown: Collection[str]) -> list[Record]:
    """Kinds of problem: images `shown` with each problem, and the names of the others."""
    owners = caption_owners(record)
    found = []
    for group in problem_groups(record):
        pictures: list[Record] = []
        named: list[str] = []
        for problem in group["problems"]:
            file = owners.get(problem["file"], problem["file"])
            if file in shown and len(pictures) < _PICTURES:
                pictures.append({"image": file, "problem": problem})
            elif len(named) < _FILES:
                named.append(described({**problem, "file": short_name(problem["file"])}))
        if rest := len(group["problems"]) - len(pictures) - len(named):
            named.append(f"and {rest} more")
        found.append({"about": group, "pictures": pictures, "named": named})
    return found


def _buckets(record: Record, shown: Collection[str]) -> Iterator[Record]:
    """Each bucket with its label, counts and the images that are `shown`."""
    several = len({subset["dataset"] for subset in record["subsets"]}) > 1
    trained = [one for one in record["images"] if one["use"] not in ("validation", "unused")]
    for entry in record["buckets"]:
        size = [entry["width"], entry["height"]]
        place = entry["dataset"], size
        mine = [image for image in trained if (image["dataset"], image["bucket"]) == place]
        images = [image for image in mine if image["file"] in shown]
        label = size_text(size)
        yield {
            "label": f"dataset {entry['dataset']}: {label}" if several else label,
            "uses": entry["repeats"],
            "counts": f"{_count(entry['images'], 'image')}, {_count(entry['repeats'], 'use')}",
            "note": "" if len(images) == len(mine) else f", {len(images)} shown",
            "images": images,
        }


def widest(size: Sequence[int]) -> int:
    """Pixels of the page: a tall picture is narrow, so that it does not fill a screen."""
    width, height = size
    return max(8, min(THUMBNAIL, round(_TALLEST * width / height)))


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


def choose_thumbnails(record: Record, thumbnails: Collection[str], most: int) -> list[str]:
    """Images with findings and large crops first, then some of every bucket in turn."""
    owners = caption_owners(record)
    named = [problem["file"] for problem in record["problems"] if problem["file"]]
    found = [owners.get(file, file) for file in named]
    found += chain(*record["duplicates"]["exact"], *record["duplicates"]["near"])
    cropped = sorted(record["images"], key=lambda image: image["cut_off"], reverse=True)[:24]
    # One image of each bucket, then the next of each, held-out and unused ones included.
    buckets = defaultdict(list)
    for image in record["images"]:
        buckets[image["dataset"], tuple(image["bucket"])].append(image["file"])
    in_turn = chain(*zip_longest(*buckets.values()))
    # Many images of one kind should not leave the others without a picture.
    wanted = [*found[: most // 2], *(image["file"] for image in cropped), *in_turn]
    return [file for file in dict.fromkeys(wanted) if file in thumbnails][:most]


def _bars(rows: Iterable[tuple[str, Sequence[int], str]]) -> list[tuple[str, list[str], str]]:
    """Bars of the counts in each row, widths in percent of the largest count."""
    rows = list(rows)
    most = max((count for _, counts, _ in rows for count in counts), default=0) or 1
    return [
        (label, [f"{100 * count / most:.1f}" if count else "" for count in counts], end)
        for label, counts, end in rows
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
