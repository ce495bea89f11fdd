"""The measured parts of the suite's page: ops, steps, memory, and predictions beside them."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Sequence

from benchmarks import compare
from benchmarks.charts import Bar, bars, number, roofline
from benchmarks.rows import Row

PROVIDERS = ("eager", "library", "compiled", "ours")
PHASES = ("forward", "backward", "optimize")


class Html(str):
    """Text that is markup already."""


def table(
    header: Sequence[str],
    lines: Iterable[Sequence[str]],
    *,
    left: Collection[int] = (0,),
    why: int | None = None,
) -> str:
    """A table whose columns are right-aligned but for those in `left`; column `why` may wrap.

    A column in which nothing is known is left out.
    """
    lines = list(lines)
    known = [
        i
        for i in range(len(header))
        if not lines or any(line[i] not in ("", "–") for line in lines)
    ]

    def cell(tag: str, i: int, text: str) -> str:
        classes = [*([] if i in left else ["n"]), *(["why"] if i == why and tag == "td" else [])]
        attribute = f" class='{' '.join(classes)}'" if classes else ""
        return f"<{tag}{attribute}>{text if isinstance(text, Html) else html.escape(text)}</{tag}>"

    head = "".join(cell("th", i, header[i]) for i in known)
    body = "\n".join(
        "<tr>" + "".join(cell("td", i, line[i]) for i in known) + "</tr>" for line in lines
    )
    return f"<div class='wide'><table class='data'>\n<tr>{head}</tr>\n{body}\n</table></div>\n"


def ops_section(rows: Sequence[Row], green: Collection[str]) -> str:
    """Per number of tokens: a table, and how near each op comes to the roof."""
    found = compare.op_comparisons(rows)
    limits = compare.ceilings_of(rows)
    if not found or limits is None:
        return ""
    cpu = compare.is_cpu(rows[0].card)
    parts = [
        "<h3>Ops</h3>\n<p class='soft'>Milliseconds, median; bytes and operations are the "
        "registry's, each tensor touched once. Ceilings of the same run: copy "
        f"{number(limits[0] / 1e9)} GB/s, product {number(limits[1] / 1e12)} TFLOP/s.</p>"
    ]
    for tokens in sorted({item.tokens for item in found}):
        here = [item for item in found if item.tokens == tokens]
        parts.append(f"<h3>{tokens} tokens</h3>")
        parts.append(_ops_table(here, green, cpu))
        for mode in dict.fromkeys(item.mode for item in here):
            title = f"{mode} at {tokens} tokens: share of the roofline"
            chart = _roof_bars(title, [item for item in here if item.mode == mode])
            # What training pays is open, its half is folded away.
            folded = f"<details><summary>{title}</summary>{chart}</details>"
            parts.append(folded if mode == "forward" else chart)
        parts.append(roofline(f"Roofline at {tokens} tokens, ops with products",
                              list(_points(here)), *limits))  # fmt: skip
    return "\n".join(filter(None, parts))


def _ops_table(items: Sequence[compare.Comparison], green: Collection[str], cpu: bool) -> str:
    shown = [p for p in PROVIDERS if any(p in item.by_provider for item in items)]
    lines = []
    for item in items:
        own = item.by_provider.get("ours")
        label = compare.label_of(item.shape)
        times = [_time(item.by_provider.get(provider)) for provider in shown]
        faster = [
            "–" if cpu else number(item.speedup(over)) if item.op in green else "no parity"
            for over in ("eager", "compiled")
        ]
        lines.append(
            (
                f"{item.op} {label}".strip(), item.mode, *times,
                number(own.gb_s if own else None), number(own.tflop_s if own else None),
                "–" if own is None or own.share_of_ceiling is None
                else f"{own.share_of_ceiling:.0%}",
                *faster,
            )
        )  # fmt: skip
    header = (
        "op",
        "mode",
        *(f"{p} ms" for p in shown),
        "GB/s",
        "TFLOP/s",
        "of roof",
        "× eager",
        "× compiled",
    )
    return table(header, lines, left=(0, 1))


def _time(row: Row | None) -> str:
    if row is None:
        return "–"
    if row.p50 is None:
        return Html(f"<span title='{html.escape(row.note, quote=True)}'>failed</span>")
    tip = f"p20 {number(row.p20)}, p80 {number(row.p80)}"
    return Html(f"<span title='{tip}'>{number(row.p50)}</span>")


def _roof_bars(title: str, items: Sequence[compare.Comparison]) -> str:
    groups = {
        f"{item.op} {compare.label_of(item.shape)}".strip(): [
            Bar(provider, item.by_provider[provider].share_of_ceiling)
            for provider in PROVIDERS
            if provider in item.by_provider
            and item.by_provider[provider].share_of_ceiling is not None
        ]
        for item in items
    }
    return bars(title, {k: v for k, v in groups.items() if v}, "share", limit=1.0)


def _points(items: Iterable[compare.Comparison]) -> Iterable[tuple[str, str, float, float]]:
    for item in items:
        for provider, row in item.by_provider.items():
            if row.gb_s and row.tflop_s:
                intensity = row.tflop_s * 1e12 / (row.gb_s * 1e9)
                label = f"{item.op} {compare.label_of(item.shape)} {item.mode}"
                yield provider, label, intensity, row.tflop_s * 1e12


def step_section(rows: Sequence[Row]) -> str:
    """The training step: seconds, images, MFU, peak and phases per provider."""
    found = compare.step_values(rows)
    if not found:
        return ""
    cpu = compare.is_cpu(rows[0].card)
    parts = ["<h3>Training step</h3>"]
    for shape, by_provider in found.items():
        title = f"{image_size(by_provider)} ({shape})"
        seconds = {p: _p50(by_provider, p, "step") for p in by_provider}
        peaks = {p: _p50(by_provider, p, "peak") for p in by_provider}
        lines = []
        for provider, modes in by_provider.items():
            own, mfu = seconds[provider], _p50(by_provider, provider, "mfu")
            note = modes["step"].note if "step" in modes and own is None else ""
            faster = [_ratio(seconds.get(over), own, cpu) for over in ("eager", "compiled")]
            lines.append(
                (
                    provider, note or number(own),
                    number(_p50(by_provider, provider, "images")),
                    "–" if mfu is None else f"{mfu:.0%}", *faster, number(peaks[provider]),
                    _ratio(peaks[provider], peaks.get("eager"), cpu),
                )
            )  # fmt: skip
        header = ("provider", "s/step", "images/s", "MFU", "× eager", "× compiled", "peak GiB",
                  "peak / eager's")  # fmt: skip
        parts.append(f"<h3>{html.escape(title)}</h3>")
        parts.append(table(header, lines))
        spans = {p: modes["step"] for p, modes in by_provider.items() if seconds[p]}
        groups = {p: [Bar(p, row.p50, row.p20, row.p80)] for p, row in spans.items()}
        parts.append(bars(f"Seconds per step, {title}", groups, "s"))
        parts.append(
            bars(f"Peak memory of a step, {title}",
                 {p: [Bar(p, peak)] for p, peak in peaks.items() if peak is not None}, "GiB")
        )  # fmt: skip
        parts.append(_phases(by_provider))
    return "\n".join(filter(None, parts))


def image_size(by_provider: compare.Steps) -> str:
    """Side of the square images, and the batch: "1024x1024, batch 4"."""
    row = next(row for modes in by_provider.values() for row in modes.values())
    # A token stands for 2x2 latents of 8x8 pixels each.
    side = round(16 * (row.tokens or 0) ** 0.5)
    return f"{side}x{side}, batch {row.batch}"


def _ratio(value: float | None, base: float | None, cpu: bool) -> str:
    return "–" if cpu or not value or not base else number(value / base)


def _phases(by_provider: compare.Steps) -> str:
    lines = []
    for provider, modes in by_provider.items():
        for phase in PHASES:
            if phase in modes:
                busy = _p50(by_provider, provider, f"{phase} busy")
                launches = _p50(by_provider, provider, f"{phase} launches")
                lines.append((provider, phase, number(modes[phase].p50), number(busy),
                              "–" if launches is None else f"{launches:.0f}"))  # fmt: skip
    if not lines:
        return ""
    header = ("provider", "phase", "ms", "ms in kernels", "launches")
    return (
        "<details><summary>phases of one step, each waited for</summary>\n"
        + table(header, lines, left=(0, 1))
        + "</details>"
    )


def _p50(by_provider: compare.Steps, provider: str, mode: str) -> float | None:
    row = by_provider.get(provider, {}).get(mode)
    return row.p50 if row else None


def memory_section(rows: Sequence[Row]) -> str:
    """What a block keeps between forward and backward."""
    own = [row for row in rows if row.op == "block" and row.p50 is not None]
    if not own:
        return ""
    parts = [
        "<h3>Memory of a block</h3>\n<p class='soft'>Kept between forward and backward, counted "
        "from outside; a unit is one [B, L, D] tensor of 16 bit.</p>"
    ]
    for shape in dict.fromkeys(row.shape for row in own):
        here = [row for row in own if row.shape == shape]
        cells = {(row.provider, row.mode, row.unit): row.p50 for row in here}
        columns = [("saved", "units"), ("saved", "MiB"), ("allocated", "MiB"),
                   ("block peak", "MiB")]  # fmt: skip
        columns = [c for c in columns if any(key[1:] == c for key in cells)]
        providers = list(dict.fromkeys(row.provider for row in here))
        lines = [(p, *(number(cells.get((p, *c))) for c in columns)) for p in providers]
        parts.append(f"<h3>{html.escape(shape)}</h3>")
        parts.append(table(("provider", *(" ".join(c) for c in columns)), lines))
        groups = {
            p: [Bar(p, cells[p, "saved", "units"])]
            for p in providers
            if (p, "saved", "units") in cells
        }
        parts.append(bars(f"Kept by a block, {shape}", groups, "units"))
    return "\n".join(parts)


def prediction_section(rows: Sequence[Row]) -> str:
    """`bench model` at the measured ceilings, beside what was measured."""
    steps, ops = compare.predicted_steps(rows), compare.predicted_ops(rows)
    if not steps and not ops:
        return ""
    parts = ["<h3>Predicted and measured</h3>\n<p class='soft'>The prediction of "
             "<code>bench model</code> from this run's ceilings, ours.</p>"]  # fmt: skip
    if steps:
        missing = list(dict.fromkeys(name for step in steps for name in step["missing"]))
        if missing:
            names = html.escape(", ".join(missing))
            parts.append(f"<p class='failed'>The prediction lacks {names}: it is too low.</p>")
        header = ("step", "recompute", "predicted s", "measured s", "ratio",
                  "predicted GiB", "measured GiB")  # fmt: skip
        parts.append(table(header, [
            (s["shape"], s["recompute"], number(s["predicted_s"]), number(s["measured_s"]),
             number(s["measured_s"] / s["predicted_s"] if s["predicted_s"] else None),
             number(s["predicted_gib"]), number(s["measured_gib"]))
            for s in steps], left=(0, 1)))  # fmt: skip
        groups = {
            f"{s['shape']} {s['recompute']}": [
                Bar("predicted", s["predicted_s"]), Bar("measured", s["measured_s"])
            ]
            for s in steps
        }  # fmt: skip
        parts.append(bars("Seconds per step", groups, "s"))
    if ops:
        lines = [
            (o["op"], o["shape"], o["mode"], number(o["predicted"]), number(o["measured"]),
             number(o["measured"] / o["predicted"] if o["predicted"] else None))
            for o in ops
        ]  # fmt: skip
        header = ("op", "shape", "mode", "predicted ms", "measured ms", "ratio")
        parts.append(table(header, lines, left=(0, 1, 2)))
    return "\n".join(filter(None, parts))
