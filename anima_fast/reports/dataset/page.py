"""The survey of a dataset as one HTML page that needs no network and holds no script."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anima_fast.data import health
from anima_fast.data.cache_folders import printable
from anima_fast.data.findings import lost
from anima_fast.data.problems import KINDS, Problem
from anima_fast.files import write_text
from anima_fast.reports.dataset import page_parts, thumbs
from anima_fast.reports.dataset.page_parts import count_of
from anima_fast.reports.dataset.survey import Survey
from anima_fast.reports.dataset.terminal import heading
from anima_fast.reports.dataset.thumbs import Thumbs
from anima_fast.reports.run_page import STYLE

if TYPE_CHECKING:
    from anima_fast.data.items import ImageItem

# Files named under a kind of problem, thumbnails beside them, groups of likes.
_FILES, _PICTURES, _GROUPS = 100, 24, 40
# Characters of a file's name.
_NAME = 60
# Up to this many thumbnails the buckets are unfolded.
_OPEN = 60


def write_page(survey: Survey, path: Path, *, most_images: int) -> Path:
    """Write the page, atomically; at most `most_images` thumbnails stand in it.

    Raises `UserError` when the file cannot be written.
    """
    pictures = Thumbs(survey, most_images)
    parts = [
        page_parts.facts_table(survey),
        _findings(survey, pictures),
        _buckets(survey, pictures),
        _crops(survey, pictures),
        page_parts.token_chart(survey),
        _groups("Same pixels", survey.exact, pictures),
        _groups("Nearly the same", survey.near, pictures),
        page_parts.tag_list(survey),
        page_parts.image_table(survey),
    ]
    shown = "\n".join(part for part in parts if part)
    title = html.escape(printable(survey.title))
    write_text(
        path,
        f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}{thumbs.STYLE}{page_parts.STYLE}
{pictures.rules()}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="lead">{_lead(survey, pictures)}</p>
{shown}
</body>
</html>
""",
    )
    return path


def _lead(survey: Survey, pictures: Thumbs) -> str:
    files = len({item.path for item in survey.items})
    lead = f"What would be trained: {files} images."
    if not survey.looks:
        return f"{lead} Only headers were read: no thumbnails, no search for damage or duplicates."
    if len(pictures) < files:
        lead += f" {len(pictures)} of them are shown."
    return f"{lead} Striped parts of a picture are cut off by its bucket."


def _findings(survey: Survey, pictures: Thumbs) -> str:
    groups = survey.by_kind()
    if not groups:
        return "<h2>Findings</h2><p>No problems found.</p>"
    captions = {item.caption.file: item.path for item in survey.items if item.caption.file}
    shown = [_finding(survey, kind, found, captions, pictures) for kind, found in groups.items()]
    return "<h2>Findings</h2>\n" + "\n".join(shown)


def _finding(
    survey: Survey,
    kind: str,
    problems: Sequence[Problem],
    captions: dict[Path, Path],
    pictures: Thumbs,
) -> str:
    about = KINDS[kind]
    items = {item.path: item for item in survey.items}
    figures, lines = [], []
    for problem in problems:
        path = captions.get(Path(problem.file), Path(problem.file))
        text = html.escape(problem.text)
        name = _short(Path(problem.file))
        if path in pictures and len(figures) < _PICTURES:
            cut = items.get(path) if kind == "crop" else None
            figures.append(pictures.figure(path, f"{name}<br>{text}", cut))
        elif len(lines) < _FILES:
            lines.append(f"<li>{': '.join(part for part in (name, text) if part)}</li>")
    rest = len(problems) - len(figures) - len(lines)
    lines += [f"<li>and {rest} more</li>"] if rest else []
    listed = f'<ul class="files">{"".join(lines)}</ul>' if lines else ""
    if len(lines) > 8:
        listed = f"<details><summary>{len(lines)} further files</summary>{listed}</details>"
    lost_text = ""
    if kind == "long caption" and survey.lost_text:
        lost_text = "".join(
            f"<details><summary>{html.escape(printable(Path(file).name))}: what is cut off"
            f"</summary><p>{html.escape(text)}</p></details>"
            for file, text in list(survey.lost_text.items())[:_PICTURES]
        )
    stops = ", training refuses to start" if about.stops else ""
    return (
        f'<section class="finding{" stops" if about.stops else ""}">'
        f"<h3>{html.escape(heading(kind))}: {len(problems)}{stops}</h3>"
        f'<p class="remedy">{html.escape(about.remedy)}</p>'
        f'<div class="thumbs">{"".join(figures)}</div>{listed}{lost_text}</section>'
    )


def _buckets(survey: Survey, pictures: Thumbs) -> str:
    entries = health.buckets(survey.plan.items)
    several = len(survey.plan.datasets) > 1
    members: dict[tuple, list[ImageItem]] = defaultdict(list)
    for item in survey.plan.items:
        members[(item.dataset.index, *item.bucket)].append(item)
    bars, galleries = [], []
    opened = " open" if len(pictures) <= _OPEN else ""
    for entry in entries:
        label = f"{entry['width']}x{entry['height']}"
        label = f"dataset {entry['dataset']}: {label}" if several else label
        counts = f"{count_of(entry['images'], 'image')}, {count_of(entry['repeats'], 'use')}"
        bars.append((label, [entry["repeats"]], counts))
        mine = members[entry["dataset"], entry["width"], entry["height"]]
        shown = [item for item in mine if item.path in pictures]
        note = "" if len(shown) == len(mine) else f", {len(shown)} shown"
        figures = "".join(pictures.figure(i.path, _about(i), i) for i in shown)
        galleries.append(
            f"<details{opened}><summary>{html.escape(label)}: {counts}{note}</summary>"
            f'<div class="thumbs">{figures}</div></details>'
        )
    body = "".join(galleries) if len(pictures) else ""
    return f"<h2>Buckets</h2>{page_parts.bar_chart(bars)}{body}"


def _about(item: ImageItem) -> str:
    """What stands below a thumbnail in its bucket."""
    share = lost(item)
    facts = [f"{item.size[0]}x{item.size[1]}"]
    facts += [f"{item.repeats} uses"] if item.repeats != 1 else []
    facts += [f"{share:.0%} cut"] if share >= 0.005 else []
    return f"{_short(item.path)}<br>{', '.join(facts)}"


def _short(path: Path) -> str:
    """A file's name for the page; the middle of a long one is left out."""
    name = printable(path.name)
    return html.escape(name if len(name) <= _NAME else f"{name[: _NAME - 20]}…{name[-19:]}")


def _crops(survey: Survey, pictures: Thumbs) -> str:
    ordered = [i for i in sorted(survey.items, key=lost, reverse=True) if lost(i) >= 0.01]
    ordered = [item for item in ordered if item.path in pictures][:_PICTURES]
    if not ordered:
        return ""
    figures = "".join(
        pictures.figure(
            item.path,
            f"{lost(item):.0%} cut off<br>{item.size[0]}x{item.size[1]} to "
            f"{item.bucket[0]}x{item.bucket[1]}",
            item,
        )
        for item in ordered
    )
    return f'<h2>Largest crops</h2><div class="thumbs">{figures}</div>'


def _groups(title: str, groups: Sequence[Sequence[Path]], pictures: Thumbs) -> str:
    if not groups:
        return ""
    shown = "".join(
        '<section class="finding"><div class="thumbs">'
        + "".join(pictures.figure(p, _short(p)) for p in group[:_PICTURES])
        + "</div></section>"
        for group in groups[:_GROUPS]
    )
    more = f"<p>and {len(groups) - _GROUPS} more groups</p>" if len(groups) > _GROUPS else ""
    return f"<details><summary>{title}: {len(groups)} groups</summary>{shown}{more}</details>"
