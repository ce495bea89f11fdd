"""The parts of a dataset's page that hold no picture: tables, bars and tags."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from anima_fast.data import health
from anima_fast.data.cache_folders import printable
from anima_fast.data.findings import lost, scale
from anima_fast.reports.dataset.terminal import facts, histogram

if TYPE_CHECKING:
    from anima_fast.reports.dataset.survey import Survey

# Tags and rows of the last table.
_TAGS, _ROWS = 60, 3000

STYLE = """
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
@media (max-width: 460px) { .thumbs { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  body { padding: 16px 12px; } table.facts th { padding-right: 12px; white-space: normal; } }
"""


def facts_table(survey: Survey) -> str:
    """Numbers of the run, notes and subsets."""
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


def bar_chart(rows: Iterable[tuple[str, Sequence[int], str]]) -> str:
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


def count_of(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def token_chart(survey: Survey) -> str:
    """Captions by length, or why that is not known."""
    rows = histogram(survey)
    if not rows:
        return f"<h2>Captions by tokens</h2><p>{html.escape(survey.token_note)}</p>"
    bars = bar_chart((name, (qwen, t5), f"{qwen}, {t5}") for name, qwen, t5 in rows)
    legend = '<p class="soft">Captions with this many tokens of Qwen3 (upper bar) and T5.</p>'
    return f"<h2>Captions by tokens</h2>{legend}{bars}"


def tag_list(survey: Survey) -> str:
    """The most frequent tags."""
    if not survey.tags:
        return ""
    rows = "".join(
        f"<div><span>{html.escape(printable(tag[:80]))}</span><span>{count}</span></div>"
        for tag, count in survey.tags.most_common(_TAGS)
    )
    note = f" (the {_TAGS} most frequent of {len(survey.tags)})" if len(survey.tags) > _TAGS else ""
    return f'<h2>Tags{note}</h2><div class="columns">{rows}</div>'


def image_table(survey: Survey) -> str:
    """All images, folded up."""
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
