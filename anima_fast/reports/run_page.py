"""A run as one HTML page: curves from `log.jsonl`, facts and pictures, readable without a network.

Curves are inline SVG and pictures are embedded, so the file can be moved, mailed or opened years
later. There is no script in it.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from anima_fast import __version__
from anima_fast.files import write_text
from anima_fast.reports.run_parts import curves, preview_grid
from anima_fast.reports.watch.reading import number

if TYPE_CHECKING:
    from anima_fast.options.run import TrainOptions
    from anima_fast.training.run import TrainResult

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #667085; --line: #d9dee7; --page: #fff;
  --a: #1f6feb; --b: #d9480f; --c: #2b8a3e; --d: #862e9c; --e: #b8326f; --f: #0e7490; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #343b48;
  --page: #14181f; --a: #79b0ff; --b: #ff9f6b; --c: #7ddc91; --d: #dba6ef; --e: #ff8fbd;
  --f: #5fd0e3; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 1080px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 32px 0 8px; }
p.lead { color: var(--soft); margin: 0 0 16px; }
table { border-collapse: collapse; } th { text-align: left; font-weight: 500; color: var(--soft);
  padding: 2px 20px 2px 0; vertical-align: top; white-space: nowrap; }
td { padding: 2px 0; overflow-wrap: anywhere; }
@media (max-width: 460px) { .facts th { white-space: normal; padding-right: 12px; width: 40%; } }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr));
  gap: 16px; }
.charts svg { box-sizing: border-box; width: 100%; height: auto; display: block; padding: 12px;
  border: 1px solid var(--line); border-radius: 12px; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
svg text.title { font-size: 13px; font-weight: 600; fill: var(--ink); }
svg .grid { stroke: var(--line); stroke-width: 1; } svg polyline { fill: none; stroke-width: 1.6; }
svg .faint { opacity: .35; stroke-width: 1; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(44%, 200px), 1fr));
  gap: 12px; }
figure { margin: 0; } figure img { display: block; width: 100%; border-radius: 6px; }
figcaption { font-size: 13px; color: var(--soft); }
.over-time { overflow-x: auto; } .over-time td { padding: 0 8px 0 0; vertical-align: top; }
.over-time img { display: block; border-radius: 8px; height: auto;
  width: clamp(150px, calc((min(100vw, 1080px) - 32px) / var(--times) - 8px), 320px); }
.over-time th { font-size: 13px; padding: 2px 8px 6px 0; }
.over-time th.prompt { padding-top: 14px; white-space: normal; color: var(--ink); }
.prompt span { position: sticky; left: 0; display: inline-block; overflow-wrap: anywhere;
  max-width: calc(min(100vw, 1080px) - 32px); }
"""


@dataclass(frozen=True)
class Picture:
    """A PNG or JPEG file and what stands below it."""

    caption: str
    path: Path


def write_report(
    path: str | Path,
    *,
    title: str,
    lead: str = "",
    facts: Mapping[str, str],
    log: str | Path,
    galleries: Mapping[str, Sequence[Picture]] | None = None,
) -> Path:
    """Write the page, atomically.

    Args:
        path: the HTML file.
        title, lead: heading and the sentence below it.
        facts: name and value of each row of the table.
        log: the run's `log.jsonl`; unreadable lines are left out.
        galleries: pictures under a heading each.

    Returns:
        `path`.

    Raises:
        UserError: the page cannot be written.
    """
    escape = html.escape
    rows = "\n".join(
        f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
        for name, value in facts.items()
    )
    shown = "\n".join(
        f'<h2>{escape(heading)}</h2>\n<div class="gallery">\n{_figures(pictures)}\n</div>'
        for heading, pictures in (galleries or {}).items()
    )
    records = read_log(log)
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="lead">{escape(lead)}</p>
<table class="facts">
{rows}
</table>
<h2>Curves</h2>
<div class="charts">
{curves(records)}
</div>
{preview_grid(records, Path(log).parent)}
{shown}
</body>
</html>
"""
    write_text(Path(path), page)
    return Path(path)


def report_run(options: TrainOptions, result: TrainResult) -> Path:
    """Write `report.html` into the output folder of a run that has ended.

    Raises `UserError` when the page cannot be written.
    """
    state = f"stopped by signal {result.interrupted_by}" if result.interrupted_by else "finished"
    kind, facts = options.about
    return write_report(
        Path(options.output_dir) / "report.html",
        title=options.output_stem,
        lead=f"{kind} with anima_fast {__version__}, {state}.",
        facts={
            "saved file": result.output.name,
            "steps": str(result.steps),
            "loss (average over an epoch)": "-" if result.loss is None else f"{result.loss:.4f}",
            "base model": Path(options.pretrained_model_name_or_path).name,
            **facts,
            "optimizer": options.optimizer_type,
            "precision": options.mixed_precision,
            "all options": f"{options.output_stem}.toml",
        },
        log=result.log,
    )


def read_log(path: str | Path) -> list[dict]:
    """The records of a `log.jsonl`; lines that a crash cut off or broke are left out."""
    records = []
    path = Path(path)
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and number(record.get("step")) is not None:
            records.append(record)
    return records


def _figures(pictures: Sequence[Picture]) -> str:
    return "\n".join(
        f'<figure><img src="{_data_url(picture.path)}" alt="{html.escape(picture.caption)}">'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
        for picture in pictures
    )


def _data_url(path: Path) -> str:
    kind = "jpeg" if path.suffix.lower() in (".jpg", ".jpeg") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
