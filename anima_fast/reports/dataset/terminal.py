"""The record of a dataset as tables in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from anima_fast.console import one_line
from anima_fast.reports.dataset.record import (
    Record,
    described,
    facts,
    largest_crops,
    problem_groups,
    size_text,
    token_histogram,
)

# Files named under a problem; crops, tags and masks listed.
_FILES, _CROPS, _TAGS, _MASKS = 5, 5, 20, 20
_LETTERS = 60
_BAR = 32
# Columns of names, which a narrow terminal breaks.
_NAMES = ("folder", "image", "mask", "tag")
_LEFT = (*_NAMES, "bucket", "use", "share", "tokens", "")


def show_record(record: Record, console: Console) -> None:
    """Print what will be trained, then what is wrong with it."""
    bar_width = max(4, min(_BAR, console.width - 40))
    for table in _tables(record, bar_width):
        console.print(table)
    for notice in record["notices"]:
        console.print(Text(f"note: {one_line(notice)}", "yellow"))
    _show_problems(record, console)


def _tables(record: Record, bar_width: int) -> Iterator[Table]:
    """The tables that have something to show."""
    rows: list[tuple[object, ...]]
    yield _facts(record)
    yield _subsets(record["subsets"])
    yield _buckets(record, bar_width)
    if crops := largest_crops(record)[:_CROPS]:
        rows = [
            (_name(one), size_text(one["size"]), size_text(one["bucket"]), f"{one['cut_off']:.0%}")
            for one in crops
        ]
        yield _table("Largest crops", ("image", "size", "bucket", "cut off"), rows)
    if masks := record["masks"]:
        more = f", the {_MASKS} smallest" if len(masks) > _MASKS else ""
        rows = [(_name(one), one["mask"], f"{one['trained']:.0%}") for one in masks[:_MASKS]]
        yield _table(f"Masks{more}", ("image", "mask", "trained"), rows)
    if counts := token_histogram(record):
        most = max(max(qwen, t5) for _, qwen, t5 in counts)
        rows = [(name, qwen, t5, _bar(t5, most, bar_width)) for name, qwen, t5 in counts]
        yield _table("Captions by tokens", ("tokens", "Qwen3", "T5", ""), rows)
    if record["tags"]:
        yield _tags(record)


def _facts(record: Record) -> Table:
    table = Table(box=None, show_header=False, title=record["dataset"], title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, value in facts(record).items():
        table.add_row(name, Text(value))
    return table


def _subsets(entries: Sequence[Record]) -> Table:
    # What no subset has takes no column.
    more = {"held out": "validation", "unused": "unused"}
    more = {name: key for name, key in more.items() if any(entry[key] for entry in entries)}
    rows = [
        (
            entry["folder"],
            "regularisation" if entry["is_reg"] else "training",
            *(entry[key] for key in ("images", "repeats", "uses", *more.values())),
        )
        for entry in entries
    ]
    return _table("Subsets", ("folder", "use", "images", "repeats", "uses", *more), rows)


def _buckets(record: Record, bar_width: int) -> Table:
    entries = record["buckets"]
    most = max((entry["repeats"] for entry in entries), default=1)
    several = len({subset["dataset"] for subset in record["subsets"]}) > 1
    rows = [
        (
            *([entry["dataset"]] if several else []),
            f"{entry['width']}x{entry['height']}",
            entry["images"],
            entry["repeats"],
            _bar(entry["repeats"], most, bar_width),
        )
        for entry in entries
    ]
    first = ["dataset"] if several else []
    return _table("Buckets", [*first, "bucket", "images", "uses", "share"], rows)


def _tags(record: Record) -> Table:
    used = ("training", "validation")
    total = len({image["file"] for image in record["images"] if image["use"] in used})
    rows = []
    for tag, count in record["tags"][:_TAGS]:
        tag = one_line(tag)
        shown = tag if len(tag) <= _LETTERS else f"{tag[: _LETTERS - 3]}..."
        rows.append((shown, count, f"{count / total:.0%}"))
    title = f"Most frequent of {len(record['tags'])} tags"
    return _table(title, ("tag", "captions", "of all"), rows)


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for name in columns:
        table.add_column(
            name,
            justify="left" if name in _LEFT else "right",
            overflow="fold",
            no_wrap=name not in _NAMES,
        )
    for row in rows:
        table.add_row(*(Text(one_line(cell)) for cell in row))
    return table


def _name(image: Record) -> str:
    return Path(image["file"]).name


def _bar(count: int, most: int, width: int) -> str:
    return "█" * max(bool(count), round(width * count / most))


def _show_problems(record: Record, console: Console) -> None:
    if not record["problems"]:
        console.print(Text("No problems found.", "bold green"))
        return
    if not record["decoded"]:
        console.print("Only headers were read: damage and duplicates are not looked for.")
    for group in problem_groups(record):
        style = "bold red" if group["stops"] else "bold yellow"
        stops = " (training refuses to start)" if group["stops"] else ""
        console.print()
        console.print(Text(f"{group['title']}: {len(group['problems'])}{stops}", style))
        for problem in group["problems"][:_FILES]:
            console.print(Text(f"  {one_line(described(problem))}"), soft_wrap=True)
        if len(group["problems"]) > _FILES:
            console.print(Text(f"  and {len(group['problems']) - _FILES} more"), soft_wrap=True)
        console.print(Text(f"  → {group['remedy']}", "green"), soft_wrap=True)
    stops = sum(problem["stops"] for problem in record["problems"])
    end = f"{len(record['problems'])} findings"
    console.print()
    console.print(Text(end + (f", {stops} of which stop training" if stops else ""), "bold"))
