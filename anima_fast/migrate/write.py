"""The lists of a ledger for the reader, and the TOML files with them as comments."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from typing import Any

import tomli_w

from anima_fast.migrate.ledger import Entry, Ledger
from anima_fast.options.declare import specs
from anima_fast.options.files import section_name

WIDTH = 96


def list_lines(ledger: Ledger) -> list[str]:
    """The lists as lines of at most about 96 characters: to do, taken, changed, dropped, added."""
    lines = []
    if ledger.todo:
        lines += ["To do before training:", *_wrapped(f"- {text}" for text in ledger.todo), ""]
    lines += [f"Taken over ({len(ledger.taken)}):", *_taken(ledger.taken), ""]
    changed = [
        f"{e.key} = {e.shown}" + (f" -> {e.option} = {e.new}" if e.option else "") + f": {e.why}"
        for e in ledger.changed
    ]
    lines += [f"Changed ({len(changed)}):", *_wrapped(changed or ["nothing"]), ""]
    dropped = _dropped(ledger.dropped)
    lines += [f"Dropped ({len(ledger.dropped)}):", *_wrapped(dropped or ["nothing"]), ""]
    if ledger.added:
        lines += [f"Added, as the source does not say ({len(ledger.added)}):"]
        lines += [*_wrapped(f"{e.option} = {e.new}: {e.why}" for e in ledger.added), ""]
    return lines[:-1]


def options_text(ledger: Ledger, cls: type, header: Iterable[str]) -> str:
    """A TOML file of the options of `cls`, a section for each group, with comments above."""
    sections: dict[str, dict[str, Any]] = {}
    for name, spec in specs(cls).items():
        if name in ledger.options and not spec.secret:
            sections.setdefault(section_name(spec), {})[name] = ledger.options[name]
    return f"{_comments([*header, '', *list_lines(ledger)])}\n\n{tomli_w.dumps(sections)}"


def dataset_text(dataset: dict[str, Any], header: Iterable[str]) -> str:
    """A dataset file: `[general]`, then each dataset with its subsets."""
    parts = [_comments(header) + "\n"]
    if dataset.get("general"):
        parts.append(tomli_w.dumps({"general": dataset["general"]}))
    for entry in dataset["datasets"]:
        own = {key: value for key, value in entry.items() if key != "subsets"}
        parts.append(_array_table("datasets", own))
        parts += [_array_table("datasets.subsets", subset) for subset in entry.get("subsets", [])]
    return "\n".join(parts)


def _array_table(name: str, values: dict[str, Any]) -> str:
    """One `[[name]]`; tables in it are written inline, as headers would end it."""
    lines = [
        f"{key} = {_inline(value)}" if isinstance(value, dict) else tomli_w.dumps({key: value})
        for key, value in values.items()
    ]
    return "\n".join([f"[[{name}]]", *(line.rstrip("\n") for line in lines), ""])


def _inline(table: dict[str, Any]) -> str:
    pairs = [
        f"{key} = {_inline(value)}"
        if isinstance(value, dict)
        else tomli_w.dumps({key: value}).strip()
        for key, value in table.items()
    ]
    return "{ " + ", ".join(pairs) + " }" if pairs else "{}"


def _comments(lines: Iterable[str]) -> str:
    # A control character would end the comment, or make the file invalid.
    clean = ("".join(c if c.isprintable() else " " for c in line) for line in lines)
    return "\n".join(f"# {line}".rstrip() for line in clean)


def _taken(entries: list[Entry]) -> list[str]:
    same = [e.option for e in entries if e.option == _name(e.key)]
    renamed = [e for e in entries if e.option != _name(e.key) and e.new]
    moved: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.option != _name(entry.key) and not entry.new:
            moved.setdefault(str(entry.option), []).append(entry)
    lines = [", ".join(same)] if same else []
    lines += [f"{e.key} -> {e.option} = {e.new}" for e in renamed]
    lines += [f"{', '.join(e.key for e in moved[where])} -> {where}" for where in moved]
    return _wrapped(lines or ["nothing"])


def _name(key: str) -> str:
    return key.rsplit(".", 1)[-1].lstrip("-").replace("-", "_")


def _dropped(entries: list[Entry]) -> list[str]:
    """A line for each reason; many keys of one table are written as `table.*`."""
    by_reason: dict[str, list[Entry]] = {}
    for entry in entries:
        by_reason.setdefault(entry.why, []).append(entry)
    return [f"{', '.join(_folded(members))}: {why}" for why, members in by_reason.items()]


def _folded(entries: list[Entry]) -> list[str]:
    tables: dict[str, list[Entry]] = {}
    for entry in entries:
        table = re.sub(r"[^.]+$", "", entry.key) or entry.key
        tables.setdefault(table if table.endswith(".") else entry.key, []).append(entry)
    shown = []
    for table, members in tables.items():
        if len(members) > 3 and table.endswith("."):
            shown.append(f"{table}* ({len(members)} keys)")
        else:
            shown += [f"{e.key} = {e.shown}" if len(entries) <= 6 else e.key for e in members]
    return shown


def _wrapped(texts: Iterable[str]) -> list[str]:
    return [
        line
        for text in texts
        for line in textwrap.wrap(
            text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False,
            break_on_hyphens=False,
        )
    ]  # fmt: skip
