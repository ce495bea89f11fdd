"""The survey of a dataset as tables in a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from anima_fast.console import one_line
from anima_fast.data import health
from anima_fast.data.findings import lost
from anima_fast.data.problems import KINDS, Problem
from anima_fast.reports.dataset.survey import Survey

# Files named under a problem; crops, tags and masks listed.
_FILES, _CROPS, _TAGS, _MASKS = 5, 5, 20, 20
_BAR = 32


def show_survey(survey: Survey, console: Console) -> None:
    """Print what will be trained, then what is wrong with it."""
    console.print(_facts(survey))
    console.print(_subsets(survey))
    console.print(_buckets(survey, _bar_width(console)))
    if crops := _crops(survey):
        console.print(crops)
    if survey.masks:
        console.print(_masks(survey))
    _show_tokens(survey, console)
    if survey.tags:
        console.print(_tags(survey))
    for notice in survey.notices:
        console.print(Text(f"note: {one_line(notice)}", "yellow"))
    _show_problems(survey, console)


def facts(survey: Survey) -> dict[str, str]:
    """What the first table and the page's first section say, by name."""
    plan, length = survey.plan, survey.length
    uses = Counter(survey.uses().values())
    images = f"{uses['training']} for training"
    for name in ("regularisation", "validation"):
        if uses[name]:
            images += f", {uses[name]} for {name}"
    if uses["unused"]:
        images += f", {uses['unused']} regularisation images unused"
    found = {
        "images": images,
        "uses in an epoch": f"{sum(item.repeats for item in plan.items)} (images times repeats)",
        "batches in an epoch": f"{plan.batches_per_epoch} (batch size {_batch_sizes(survey)})",
        "steps in an epoch": f"{length.updates_per_epoch} (accumulation {length.accumulation})",
        "the run": f"{length.steps} steps, {length.epochs} epochs",
    }
    if not plan.batches_per_epoch:
        found = {"images": images}
    return found | {"tokens": token_summary(survey)}


def token_summary(survey: Survey) -> str:
    """One sentence about the lengths of the captions."""
    if survey.tokens is None:
        return survey.token_note
    lengths = [survey.tokens.lengths[text] for text in survey.texts]
    if not lengths:
        return "no caption"
    mean = sum(one.t5 for one in lengths) / len(lengths)
    over = f"{len(survey.tokens.long)} above {max(survey.tokens.limits)}"
    most = (
        f"most {max(one.qwen for one in lengths)} of Qwen3, {max(one.t5 for one in lengths)} of T5"
    )
    return f"{mean:.0f} of T5 on average, {most}; {over}"


def histogram(survey: Survey, most: int = 12) -> list[tuple[str, int, int]]:
    """Captions by length: (range of tokens, captions by Qwen3's count, by T5's).

    The ranges are as wide as it takes for `most` of them to hold 95 % of the captions; what is
    longer stands in two rows, within the limit of the text and beyond it.
    """
    if survey.tokens is None or not survey.texts:
        return []
    lengths = [survey.tokens.lengths[text] for text in survey.texts]
    limit = max(survey.tokens.limits)
    usual = sorted(one.longest for one in lengths)[(len(lengths) - 1) * 95 // 100]
    width = next(w for w in (4 * 2**i for i in range(30)) if usual < w * most)
    last = min((usual // width + 1) * width, limit)
    edges = [*range(0, last, width), last, limit + 1, 2**62]
    rows = []
    for low, high in pairwise(dict.fromkeys(edges)):
        qwen, t5 = (
            sum(low <= getattr(one, name) < high for one in lengths) for name in ("qwen", "t5")
        )
        name = f"{low}-{high - 1}" if high <= limit + 1 else f"above {limit}"
        if low < last or qwen or t5:
            rows.append((name, qwen, t5))
    return rows


def _batch_sizes(survey: Survey) -> str:
    return ", ".join(str(n) for n in dict.fromkeys(d.batch_size for d in survey.plan.datasets))


def _facts(survey: Survey) -> Table:
    table = Table(box=None, show_header=False, title=survey.title, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, value in facts(survey).items():
        table.add_row(name, Text(value))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for name in columns:
        justify = "left" if name in _LEFT else "right"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name not in _NAMES)
    return table


# Columns of names, which a narrow terminal breaks.
_NAMES = ("folder", "image", "mask", "tag")
_LEFT = (*_NAMES, "bucket", "use", "share", "tokens", "")


def _bar_width(console: Console) -> int:
    return max(4, min(_BAR, console.width - 40))


def _subsets(survey: Survey) -> Table:
    entries = health.subsets(survey.plan)
    # What no subset has takes no column.
    more = {"held out": "validation", "unused": "unused"}
    more = {name: key for name, key in more.items() if any(entry[key] for entry in entries)}
    table = _table("Subsets", "folder", "use", "images", "repeats", "uses", *more)
    for entry in entries:
        use = "regularisation" if entry["is_reg"] else "training"
        counts = [entry[key] for key in ("images", "repeats", "uses", *more.values())]
        table.add_row(Text(one_line(entry["folder"])), use, *map(str, counts))
    return table


def _buckets(survey: Survey, width: int) -> Table:
    several = len(survey.plan.datasets) > 1
    table = _table(
        "Buckets", *(["dataset"] if several else []), "bucket", "images", "uses", "share"
    )
    entries = health.buckets(survey.plan.items)
    most = max((entry["repeats"] for entry in entries), default=1)
    for entry in entries:
        first = [str(entry["dataset"])] if several else []
        bar = "█" * max(1, round(width * entry["repeats"] / most))
        size = f"{entry['width']}x{entry['height']}"
        table.add_row(*first, size, str(entry["images"]), str(entry["repeats"]), bar)
    return table


def _crops(survey: Survey) -> Table | None:
    ordered = sorted(survey.items, key=lost, reverse=True)[:_CROPS]
    ordered = [item for item in ordered if lost(item) >= 0.01]
    if not ordered:
        return None
    table = _table("Largest crops", "image", "size", "bucket", "cut off")
    for item in ordered:
        size, bucket = (f"{w}x{h}" for w, h in (item.size, item.bucket))
        table.add_row(Text(one_line(item.path.name)), size, bucket, f"{lost(item):.0%}")
    return table


def _masks(survey: Survey) -> Table:
    shown = survey.masks[:_MASKS]
    more = len(survey.masks) - len(shown)
    table = _table(
        "Masks" + (f", the {_MASKS} smallest" if more else ""), "image", "mask", "trained"
    )
    for mask in shown:
        table.add_row(Text(one_line(mask.image.name)), Text(mask.source), f"{mask.area:.0%}")
    return table


def _show_tokens(survey: Survey, console: Console) -> None:
    rows = histogram(survey)
    if not rows:
        return
    table = _table("Captions by tokens", "tokens", "Qwen3", "T5", "")
    most, width = max(max(qwen, t5) for _, qwen, t5 in rows), _bar_width(console)
    for name, qwen, t5 in rows:
        bar = "█" * (round(width * t5 / most) or (1 if t5 else 0))
        table.add_row(name, str(qwen), str(t5), bar)
    console.print(table)


def _tags(survey: Survey) -> Table:
    total = len({item.path for item in survey.items if not item.is_reg})
    title = f"Most frequent of {len(survey.tags)} tags"
    table = _table(title, "tag", "captions", "of all")
    for tag, count in survey.tags.most_common(_TAGS):
        tag = one_line(tag)
        shown = tag if len(tag) <= 60 else tag[:57] + "..."
        table.add_row(Text(shown), str(count), f"{count / total:.0%}")
    return table


def _show_problems(survey: Survey, console: Console) -> None:
    groups = survey.by_kind()
    if not groups:
        console.print(Text("No problems found.", "bold green"))
        return
    if not survey.looks:
        console.print("Only headers were read: damage and duplicates are not looked for.")
    for kind, problems in groups.items():
        about = KINDS[kind]
        style = "bold red" if about.stops else "bold yellow"
        stops = " (training refuses to start)" if about.stops else ""
        console.print()
        console.print(Text(f"{heading(kind)}: {len(problems)}{stops}", style))
        for line in lines(problems, _FILES):
            console.print(Text(f"  {line}"), soft_wrap=True)
        console.print(Text(f"  → {about.remedy}", "green"), soft_wrap=True)
    console.print()
    stops = len(survey.stops)
    end = f"{len(survey.problems)} findings"
    console.print(Text(end + (f", {stops} of which stop training" if stops else ""), "bold"))


def heading(kind: str) -> str:
    """What a kind of problem is called at the start of a line."""
    title = KINDS[kind].title
    return title[0].upper() + title[1:]


def lines(problems: Sequence[Problem], most: int) -> list[str]:
    """A line for each of the first problems, and one for the rest."""
    found = []
    for problem in problems[:most]:
        name = Path(problem.file).name
        found.append(one_line(": ".join(part for part in (name, problem.text) if part)))
    if len(problems) > most:
        found.append(f"and {len(problems) - most} more")
    return found
