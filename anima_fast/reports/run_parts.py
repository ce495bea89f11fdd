"""What a run's page takes from its log: curves, losses by noise level, previews over time."""

from __future__ import annotations

import base64
import html
import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from anima_fast.reports.charts import Series, bars, chart
from anima_fast.reports.watch.reading import number

# Columns of the grid of previews, and the longer side of a picture in it.
MOST_COLUMNS = 12
SIDE = 320
# Of a prompt above its row.
MOST_LETTERS = 160


def curves(records: Sequence[Mapping]) -> str:
    """Charts of a log's records, as SVG elements."""
    steps = _of_kind(records, "step")
    if not steps:
        return "<p>No step was logged.</p>"
    validations = _of_kind(records, "validation")
    rates = {name for record in steps for name in record.get("lr") or {}}
    charts = [
        chart(
            "Loss",
            [
                Series("each step", _points(steps, "loss"), faint=True),
                Series("average over an epoch", _points(steps, "loss_avg")),
                Series("validation", _points(validations, "loss")),
            ],
        ),
        chart(
            "Learning rate",
            [
                Series(name, [(r["step"], (r.get("lr") or {}).get(name)) for r in steps])
                for name in sorted(rates)
            ],
            zero=True,
        ),
        # The first step reads, compiles and allocates: beside the others it would hide them.
        chart(
            "Seconds per step",
            [Series("seconds", _points(steps[1:] or steps, "step_s"))],
            zero=True,
        ),
        _memory(steps),
        *_by_noise(records),
    ]
    return "\n".join(charts)


def _memory(steps: Sequence[Mapping]) -> str:
    """Peak memory, in GiB as soon as there is one."""
    points = _points(steps, "memory_mib")
    unit, size = ("MiB", 1) if max((y or 0 for _, y in points), default=0) < 1024 else ("GiB", 1024)
    scaled = [(x, None if y is None else y / size) for x, y in points]
    return chart(f"Peak memory in {unit}", [Series("memory", scaled)], zero=True)


def _by_noise(records: Sequence[Mapping]) -> list[str]:
    """Bars of the last epoch's training loss by sigma, and validation loss of each sigma."""
    found = []
    filled = [r for r in _of_kind(records, "sigma_bins") if any(r.get("counts") or [])]
    if filled:
        means = filled[-1].get("means") or []
        labels = [f"{(i + 0.5) / len(means):.2f}" for i in range(len(means))]
        found.append(bars("Training loss by sigma, last epoch", labels, means))
    validations = [r for r in _of_kind(records, "validation") if r.get("per_sigma")]
    if validations:
        names = sorted({name for r in validations for name in r["per_sigma"]})
        series = [
            Series(f"sigma {name}", [(r["step"], r["per_sigma"].get(name)) for r in validations])
            for name in names
        ]
        found.append(chart("Validation loss by sigma", series))
    return found


def preview_grid(records: Sequence[Mapping], folder: Path) -> str:
    """A table of previews: a row below each prompt, a column for each time; "" without any.

    Args:
        records: of the log.
        folder: the output folder, which the files are named from; missing ones stay empty.
    """
    previews = [r for r in _of_kind(records, "preview") if r.get("files")]
    if not previews:
        return ""
    shown = _spread(previews, MOST_COLUMNS)
    head = "".join(f"<th>step {record['step']}</th>" for record in shown)
    # The file of prompts may change during a run, so rows follow the text and not the place.
    found: dict[tuple[str, int], dict[int, Path]] = {}
    for column, record in enumerate(shown):
        seen: Counter[str] = Counter()
        for path in (folder / name for name in record["files"]):
            prompt = _prompt(path)
            if prompt is not None:
                found.setdefault((prompt, seen[prompt]), {})[column] = path
                seen[prompt] += 1
    rows = []
    for (prompt, _), paths in found.items():
        first = prompt.split("\n")[0]
        label = html.escape(first if len(first) <= MOST_LETTERS else f"{first[:MOST_LETTERS]}…")
        cells = "".join(f"<td>{_thumbnail(paths.get(i))}</td>" for i in range(len(shown)))
        rows.append(
            f'<tr><th class="prompt" colspan="{len(shown)}"><span>{label}</span></th></tr>'
            f"<tr>{cells}</tr>"
        )
    left_out = len(previews) - len(shown)
    note = f'<p class="lead">{left_out} more lie in the folder sample.</p>' if left_out else ""
    return (
        f'<h2>Previews</h2>\n<div class="over-time" style="--times: {len(shown)}">'
        f"<table><tr>{head}</tr>{''.join(rows)}</table></div>{note}"
    )


def _spread(items: Sequence[Mapping], most: int) -> list[Mapping]:
    """At most so many of them, evenly spread, the first and the last included."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _thumbnail(path: Path | None) -> str:
    """An embedded small JPEG, or nothing for a picture that is gone."""
    from PIL import Image

    if path is None or not path.is_file():
        return ""
    try:
        with Image.open(path) as image:
            image.thumbnail((SIDE, SIDE))
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=85)
    except OSError:
        return ""
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{html.escape(path.stem)}">'


def _prompt(path: Path) -> str | None:
    """The prompt that a picture carries; None when it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            text = str(getattr(image, "text", {}).get("parameters", ""))
    except OSError:
        return None
    return re.split(r"\n(?:Negative prompt|Steps):", text, maxsplit=1)[0]


def _of_kind(records: Sequence[Mapping], kind: str) -> list[Mapping]:
    return [record for record in records if record.get("kind") == kind]


def _points(records: Iterable[Mapping], name: str) -> list[tuple[float, float | None]]:
    return [(record["step"], number(record.get(name))) for record in records]
