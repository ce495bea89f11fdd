"""The record of a dataset as tables in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
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
    yield _facts(record)
    yield _subsets(record)
    yield _buckets(record, bar_width)
    if crops := largest_crops(record)[:_CROPS]:
        yield _crops(crops)
    if record["masks"]:
        yield _masks(record)
    if rows := token_histogram(record):
        yield _tokens(rows, bar_width)
    if record["tags"]:
        yield _tags(record)


def _facts(record: Record) -> Table:
    table = Table(box=None, show_header=False, title=record["dataset"], title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, value in facts(record).items():
        table.add_row(name, Text(value))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for name in columns:
        table.add_column(
            name,
            justify="left" if name in _LEFT else "right",
            overflow="fold",
            no_wrap=name not in _NAMES,
        )
    return table


def _subsets(record: Record) -> Table:
    entries = record["subsets"]
    # What no subset has takes no column.
    more = {"held out": "validation", "unused": "unused"}
    more = {name: key for name, key in more.items() if any(entry[key] for entry in entries)}
    table = _table("Subsets", "folder", "use", "images", "repeats", "uses", *more)
    for entry in entries:
        use = "regularisation" if entry["is_reg"] else "training"
        counts = [entry[key] for key in ("images", "repeats", "uses", *more.values())]
        table.add_row(Text(one_line(entry["folder"])), use, *map(str, counts))
    return table


def _buckets(record: Record, bar_width: int) -> Table:
    entries = record["buckets"]
    several = len({subset["dataset"] for subset in record["subsets"]}) > 1
    first = ["dataset"] if several else []
    table = _table("Buckets", *first, "bucket", "images", "uses", "share")
    most = max((entry["repeats"] for entry in entries), default=1)
    for entry in entries:
        first = [str(entry["dataset"])] if several else []
        bar = "█" * max(1, round(bar_width * entry["repeats"] / most))
        size = f"{entry['width']}x{entry['height']}"
        table.add_row(*first, size, str(entry["images"]), str(entry["repeats"]), bar)
    return table


def _crops(images: list[Record]) -> Table:
    table = _table("Largest crops", "image", "size", "bucket", "cut off")
    for image in images:
        size, bucket = (f"{w}x{h}" for w, h in (image["size"], image["bucket"]))
        table.add_row(_file_name(image["file"]), size, bucket, f"{image['cut_off']:.0%}")
    return table


def _masks(record: Record) -> Table:
    shown = record["masks"][:_MASKS]
    more = f", the {_MASKS} smallest" if len(record["masks"]) > _MASKS else ""
    table = _table(f"Masks{more}", "image", "mask", "trained")
    for mask in shown:
        table.add_row(_file_name(mask["file"]), Text(mask["mask"]), f"{mask['trained']:.0%}")
    return table


def _tokens(rows: list[tuple[str, int, int]], bar_width: int) -> Table:
    table = _table("Captions by tokens", "tokens", "Qwen3", "T5", "")
    most = max(max(qwen, t5) for _, qwen, t5 in rows)
    for name, qwen, t5 in rows:
        bar = "█" * (round(bar_width * t5 / most) or (1 if t5 else 0))
        table.add_row(name, str(qwen), str(t5), bar)
    return table


def _tags(record: Record) -> Table:
    used = ("training", "validation")
    total = len({image["file"] for image in record["images"] if image["use"] in used})
    title = f"Most frequent of {len(record['tags'])} tags"
    table = _table(title, "tag", "captions", "of all")
    for tag, count in record["tags"][:_TAGS]:
        tag = one_line(tag)
        shown = tag if len(tag) <= _LETTERS else f"{tag[: _LETTERS - 3]}..."
        table.add_row(Text(shown), str(count), f"{count / total:.0%}")
    return table


def _file_name(file: str) -> Text:
    return Text(one_line(Path(file).name))


def _show_problems(record: Record, console: Console) -> None:
    if not record["problems"]:
        console.print(Text("No problems found.", "bold green"))
        return
    if not record["decoded"]:
        console.print("Only headers were read: damage and duplicates are not looked for.")
    for group in problem_groups(record):
        style = "bold red" if group.stops else "bold yellow"
        stops = " (training refuses to start)" if group.stops else ""
        console.print()
        console.print(Text(f"{group.title}: {len(group.problems)}{stops}", style))
        for problem in group.problems[:_FILES]:
            console.print(Text(f"  {one_line(described(problem))}"), soft_wrap=True)
        if len(group.problems) > _FILES:
            console.print(Text(f"  and {len(group.problems) - _FILES} more"), soft_wrap=True)
        console.print(Text(f"  → {group.remedy}", "green"), soft_wrap=True)
    stops = sum(problem["stops"] for problem in record["problems"])
    end = f"{len(record['problems'])} findings"
    console.print()
    console.print(Text(end + (f", {stops} of which stop training" if stops else ""), "bold"))
