"""The survey of a dataset as one HTML page that needs no network and holds no script."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anima_fast.data.cache_folders import printable
from anima_fast.data.problems import KINDS, Problem
from anima_fast.dataset_report import health, thumbs
from anima_fast.dataset_report.findings import lost, scale
from anima_fast.dataset_report.survey import Survey
from anima_fast.dataset_report.terminal import facts, heading, histogram
from anima_fast.dataset_report.thumbs import Thumbs
from anima_fast.files import write_text
from anima_fast.report import STYLE

if TYPE_CHECKING:
    from anima_fast.data.plan import ImageItem

# Files named under a kind of problem, thumbnails beside them, tags and rows of the last table.
_FILES, _PICTURES, _TAGS, _ROWS, _GROUPS = 100, 24, 60, 3000, 40
# Up to this many thumbnails the buckets are unfolded.
_OPEN = 60

_STYLE = """
section.finding { border-left: 3px solid var(--line); padding: 2px 0 2px 14px; margin: 18px 0; }
section.stops { border-color: var(--b); }
section.finding h3 { font-size: 15px; margin: 0; } section.finding p { margin: 0 0 8px; }
p.remedy, .soft { color: var(--soft); }
ul.files { margin: 4px 0 8px; padding-left: 18px; overflow-wrap: anywhere; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 3px 10px;
  align-items: center; max-width: 720px; }
.bars i { display: block; height: 10px; border-radius: 2px; background: var(--a);
  min-width: 2px; }
.bars i.second { background: var(--c); margin-top: 2px; } .bars .end { color: var(--soft); }
details { margin: 8px 0; } summary { cursor: pointer; }
.scroll { overflow-x: auto; } .scroll td, .scroll th { padding-right: 14px; white-space: nowrap; }
.columns { columns: 260px; } .columns div { break-inside: avoid; display: flex; gap: 10px;
  justify-content: space-between; } .columns div span { overflow-wrap: anywhere; }
@media (max-width: 460px) { .thumbs { grid-template-columns: repeat(3, 1fr); }
  body { padding: 16px 12px; } table.facts th { padding-right: 12px; white-space: normal; } }
"""


def write_page(survey: Survey, path: Path, *, most_images: int) -> Path:
    """Write the page, atomically; at most `most_images` thumbnails stand in it.

    Raises `UserError` when the file cannot be written.
    """
    pictures = Thumbs(survey, most_images)
    parts = [
        _facts(survey),
        _findings(survey, pictures),
        _buckets(survey, pictures),
        _crops(survey, pictures),
        _tokens(survey),
        _groups("Same pixels", survey.exact, pictures),
        _groups("Nearly the same", survey.near, pictures),
        _tags(survey),
        _table(survey),
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
<style>{STYLE}{thumbs.STYLE}{_STYLE}
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


def _facts(survey: Survey) -> str:
    rows = "\n".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in facts(survey).items()
    )
    notes = "\n".join(f"<p>{html.escape(printable(note))}</p>" for note in survey.notices)
    subsets = "\n".join(
        f"<tr><td>{html.escape(entry['folder'])}</td>"
        f"<td>{'regularisation' if entry['is_reg'] else 'training'}</td>"
        + "".join(f"<td>{entry[n]}</td>" for n in _SUBSET_COLUMNS)
        + "</tr>"
        for entry in health.subsets(survey.plan)
    )
    heads = "".join(f"<th>{name}</th>" for name in _SUBSET_COLUMNS.values())
    return (
        f'<table class="facts">{rows}</table>\n{notes}\n<h2>Subsets</h2><div class="scroll">'
        f"<table><tr><th>folder</th><th>use</th>{heads}</tr>{subsets}</table></div>"
    )


_SUBSET_COLUMNS = {
    "images": "images",
    "repeats": "repeats",
    "uses": "uses",
    "validation": "held out",
    "unused": "unused",
}


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
        name = html.escape(printable(Path(problem.file).name))
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


def _bars(rows: Iterable[tuple[str, Sequence[int], str]]) -> str:
    """Labelled horizontal bars: (label, one or two counts, text at the end)."""
    rows = list(rows)
    most = max((max(counts) for _, counts, _ in rows), default=1) or 1
    cells = []
    for label, counts, end in rows:
        bars = "".join(
            f'<i class="{"second" if i else "first"}" style="width:{100 * n / most:.1f}%"></i>'
            for i, n in enumerate(counts)
            if n
        )
        cells.append(
            f"<span>{html.escape(label)}</span><div>{bars}</div>"
            f'<span class="end">{html.escape(end)}</span>'
        )
    return f'<div class="bars">{"".join(cells)}</div>'


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
        counts = f"{_count(entry['images'], 'image')}, {_count(entry['repeats'], 'use')}"
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
    return f"<h2>Buckets</h2>{_bars(bars)}{body}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _about(item: ImageItem) -> str:
    """What stands below a thumbnail in its bucket."""
    share = lost(item)
    facts = [f"{item.size[0]}x{item.size[1]}"]
    facts += [f"{item.repeats} uses"] if item.repeats != 1 else []
    facts += [f"{share:.0%} cut"] if share >= 0.005 else []
    return f"{html.escape(printable(item.path.name))}<br>{', '.join(facts)}"


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


def _tokens(survey: Survey) -> str:
    rows = histogram(survey)
    if not rows:
        return f"<h2>Captions by tokens</h2><p>{html.escape(survey.token_note)}</p>"
    bars = _bars((name, (qwen, t5), f"{qwen}, {t5}") for name, qwen, t5 in rows)
    legend = '<p class="soft">Captions with this many tokens of Qwen3 (upper bar) and T5.</p>'
    return f"<h2>Captions by tokens</h2>{legend}{bars}"


def _groups(title: str, groups: Sequence[Sequence[Path]], pictures: Thumbs) -> str:
    if not groups:
        return ""
    shown = "".join(
        '<section class="finding"><div class="thumbs">'
        + "".join(pictures.figure(p, html.escape(printable(p.name))) for p in group[:_PICTURES])
        + "</div></section>"
        for group in groups[:_GROUPS]
    )
    more = f"<p>and {len(groups) - _GROUPS} more groups</p>" if len(groups) > _GROUPS else ""
    return f"<details><summary>{title}: {len(groups)} groups</summary>{shown}{more}</details>"


def _tags(survey: Survey) -> str:
    if not survey.tags:
        return ""
    rows = "".join(
        f"<div><span>{html.escape(printable(tag[:80]))}</span><span>{count}</span></div>"
        for tag, count in survey.tags.most_common(_TAGS)
    )
    note = f" (the {_TAGS} most frequent of {len(survey.tags)})" if len(survey.tags) > _TAGS else ""
    return f'<h2>Tags{note}</h2><div class="columns">{rows}</div>'


def _table(survey: Survey) -> str:
    uses = survey.uses()
    names = ("file", "use", "size", "bucket", "cut off", "scale", "repeats", "tokens")
    rows = []
    for item, text in list(zip(survey.items, survey.texts, strict=True))[:_ROWS]:
        tokens = "" if survey.tokens is None else str(survey.tokens.lengths[text].longest)
        (width, height), bucket = item.size, item.bucket
        cells = (
            html.escape(printable(item.path.name)), uses[id(item)], f"{width}x{height}",
            f"{bucket[0]}x{bucket[1]}", f"{lost(item):.0%}", f"{scale(item):.2f}",
            str(item.repeats), tokens,
        )  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = "".join(f"<th>{name}</th>" for name in names)
    more = len(survey.items) - _ROWS
    note = f"<p>and {more} more: --json lists all</p>" if more > 0 else ""
    return (
        f"<h2>Images</h2><details><summary>All images as a table</summary>"
        f'<div class="scroll"><table><tr>{heads}</tr>{"".join(rows)}</table></div>{note}</details>'
    )
