"""A run as one HTML page: curves from `log.jsonl`, facts and pictures."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from anima_fast import __version__
from anima_fast.files import write_text
from anima_fast.reports.charts import Series, bars, chart
from anima_fast.reports.pages import data_url, render
from anima_fast.reports.reading import number, picture_prompt, read_log

# Columns of the table of previews, and the longer side of a picture in it.
MOST_COLUMNS = 12
SIDE = 320
# Of a prompt above its row.
MOST_LETTERS = 160
LogRecord = Mapping[str, Any]
# The name of a picture and the URL that holds it.
Preview = tuple[str, str]


def report_run(
    name: str,
    *,
    kind: str,
    facts: Mapping[str, str],
    base_model: str | Path,
    optimizer: str,
    precision: str,
    output: Path,
    log: Path,
    steps: int,
    loss: float | None,
    interrupted_by: int | None = None,
) -> Path:
    """Write `report.html` for a run that has ended, into the folder of its log.

    kind: what was trained, "LoRA training" say. facts: further rows of the table. output: the saved
    file. loss: the average of the last epoch. interrupted_by: the signal that stopped the run.
    Raises `UserError` when the page cannot be written.
    """
    state = f"stopped by signal {interrupted_by}" if interrupted_by else "finished"
    return write_report(
        log.parent / "report.html",
        title=name,
        lead=f"{kind} with anima_fast {__version__}, {state}.",
        facts={
            "saved file": output.name,
            "steps": str(steps),
            "loss (average over an epoch)": "-" if loss is None else f"{loss:.4f}",
            "base model": Path(base_model).name,
            **facts,
            "optimizer": optimizer,
            "precision": precision,
            "all options": f"{name}.toml",
        },
        log=log,
    )


def write_report(
    path: Path,
    *,
    title: str,
    lead: str = "",
    facts: Mapping[str, str],
    log: Path,
    galleries: Mapping[str, Mapping[str, Path]] | None = None,
) -> Path:
    """Write the page of a run to `path`, atomically.

    facts: name and value of each row of the table. log: the run's `log.jsonl`; unreadable lines are
    left out. galleries: PNG or JPEG files by the text below them, under a heading each. Raises
    `UserError` when the page cannot be written.
    """
    records = read_log(log)
    page = render(
        "run.html.j2",
        title=title,
        lead=lead,
        facts=facts,
        charts=run_charts(records),
        previews=preview_table(records, log.parent),
        galleries={
            heading: {text: _embedded(picture) for text, picture in pictures.items()}
            for heading, pictures in (galleries or {}).items()
        },
    )
    write_text(path, page)
    return path


def run_charts(records: Sequence[LogRecord]) -> list[Markup]:
    """The charts of a log's records; none when there is no step."""
    steps = _of_kind(records, "step")
    if not steps:
        return []
    loss = [
        Series("each step", _points(steps, "loss"), faint=True),
        Series("average over an epoch", _points(steps, "loss_avg")),
        Series("validation", _points(_of_kind(records, "validation"), "loss")),
    ]
    # The first step reads, compiles and allocates: next to the others it would hide them.
    later = steps[1:] or steps
    seconds = [
        Series("step", _points(later, "step_s")),
        Series("of it waiting for data", _points(later, "wait_s")),
    ]
    return [
        chart("Loss", loss),
        chart("Learning rate", _parts_of(steps, "lr"), zero=True),
        chart("Seconds per step", seconds, zero=True),
        _memory(steps),
        *_by_noise(records),
    ]


def _memory(steps: Sequence[LogRecord]) -> Markup:
    """Peak memory, in GiB as soon as there is one."""
    points = _points(steps, "memory_mib")
    unit, size = ("MiB", 1) if max((y or 0 for _, y in points), default=0) < 1024 else ("GiB", 1024)
    scaled = [(x, None if y is None else y / size) for x, y in points]
    return chart(f"Peak memory in {unit}", [Series("memory", scaled)], zero=True)


def _by_noise(records: Sequence[LogRecord]) -> list[Markup]:
    """Bars of the last epoch's training loss by sigma, and validation loss of each sigma."""
    found = []
    filled = [r for r in _of_kind(records, "sigma_bins") if any(r.get("counts") or [])]
    if filled:
        means = filled[-1].get("means") or []
        labels = [f"{(i + 0.5) / len(means):.2f}" for i in range(len(means))]
        found.append(bars("Training loss by sigma, last epoch", labels, means))
    validations = [r for r in _of_kind(records, "validation") if r.get("per_sigma")]
    if validations:
        lines = _parts_of(validations, "per_sigma", label="sigma {}")
        found.append(chart("Validation loss by sigma", lines))
    return found


def preview_table(records: Sequence[LogRecord], folder: Path) -> dict[str, Any] | None:
    """The previews of a run over time, from its log and its output folder; None without any.

    `steps`: at most `MOST_COLUMNS` of them, evenly spread, the first and the last included.
    `left_out`: how many have no column. `rows`: each prompt with a picture at each step, or None
    where it is gone.
    """
    previews = [r for r in _of_kind(records, "preview") if r.get("files")]
    if not previews:
        return None
    columns, last = min(len(previews), MOST_COLUMNS), len(previews) - 1
    shown = [previews[round(i * last / max(columns - 1, 1))] for i in range(columns)]
    # The file of prompts may change during a run, so rows follow the text and not the place.
    rows: dict[tuple[str, int], list[Preview | None]] = {}
    for column, record in enumerate(shown):
        seen: Counter[str] = Counter()
        for path in (folder / name for name in record["files"]):
            prompt, picture = _preview(path)
            if prompt is not None:
                row = rows.setdefault((prompt, seen[prompt]), [None] * len(shown))
                row[column] = picture
                seen[prompt] += 1
    return {
        "steps": [record["step"] for record in shown],
        "left_out": len(previews) - len(shown),
        "rows": [(_label(prompt), pictures) for (prompt, _), pictures in rows.items()],
    }


def _label(prompt: str) -> str:
    first = prompt.split("\n")[0]
    return first if len(first) <= MOST_LETTERS else f"{first[:MOST_LETTERS]}…"


def _preview(path: Path) -> tuple[str | None, Preview | None]:
    """A picture's prompt, and its name with a small JPEG of it; None for what is unreadable."""
    prompt = None
    try:
        with Image.open(path) as image:
            prompt = picture_prompt(getattr(image, "text", {}).get("parameters"))
            image.thumbnail((SIDE, SIDE))
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=85)
    # Pillow raises many kinds for damaged files, SyntaxError among them.
    except Exception:
        return prompt, None
    return prompt, (path.stem, data_url(buffer.getvalue()))


def _embedded(picture: Path) -> str:
    kind = "jpeg" if picture.suffix.lower() in (".jpg", ".jpeg") else "png"
    return data_url(picture.read_bytes(), kind)


def _of_kind(records: Sequence[LogRecord], kind: str) -> list[LogRecord]:
    return [record for record in records if record.get("kind") == kind]


def _points(records: Iterable[LogRecord], name: str) -> list[tuple[float, float | None]]:
    return [(record["step"], number(record.get(name))) for record in records]


def _parts_of(records: Sequence[LogRecord], name: str, label: str = "{}") -> list[Series]:
    """A line for each entry of the table `name` in the records."""
    parts = sorted({part for record in records for part in record.get(name) or {}})
    return [
        Series(label.format(part), [(r["step"], (r.get(name) or {}).get(part)) for r in records])
        for part in parts
    ]
