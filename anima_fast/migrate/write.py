"""The lists of a ledger for the reader, and the TOML files with them as comments."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

import tomli_w

from anima_fast.migrate.ledger import CHANGED, DROPPED, TAKEN, Entry, Ledger
from anima_fast.options.declare import specs
from anima_fast.options.files import section_name

_WRAPPER = textwrap.TextWrapper(96, "  ", "    ", break_long_words=False, break_on_hyphens=False)


def list_lines(ledger: Ledger) -> list[str]:
    """The lists as lines of at most about 96 characters: to do, taken, changed, dropped, added."""
    taken, changed, dropped = (ledger.listed(verdict) for verdict in (TAKEN, CHANGED, DROPPED))
    added = [f"{option} = {value}: {why}" for option, (value, why) in ledger.added.items()]
    lists = {
        "To do before training": [f"- {text}" for text in ledger.todo],
        f"Taken over ({len(taken)})": [*_taken(taken)] or ["nothing"],
        f"Changed ({len(changed)})": [_changed(e) for e in changed] or ["nothing"],
        f"Dropped ({len(dropped)})": [*_dropped(dropped)] or ["nothing"],
        f"Added, as the source does not say ({len(added)})": added,
    }
    lines: list[str] = []
    for title, texts in lists.items():
        if texts:
            lines += ["", f"{title}:", *(line for text in texts for line in _WRAPPER.wrap(text))]
    return lines[1:]


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
    return "\n".join([f"[[{name}]]", *(_pair(key, value) for key, value in values.items()), ""])


def _pair(key: str, value: Any) -> str:
    """A key and its value; a table is written inline, as a header would end the one around it."""
    if isinstance(value, dict) and value:
        return f"{key} = {{ {', '.join(_pair(k, v) for k, v in value.items())} }}"
    return f"{key} = {{}}" if value == {} else tomli_w.dumps({key: value}).strip()


def _comments(lines: Iterable[str]) -> str:
    # A control character would end the comment, or make the file invalid.
    clean = ("".join(c if c.isprintable() else " " for c in line) for line in lines)
    return "\n".join(f"# {line}".rstrip() for line in clean)


def _taken(entries: list[Entry]) -> Iterator[str]:
    """Keys of the same name in one line, then one for each option or place."""
    same, renamed = [], dict[str, list[str]]()
    for entry in entries:
        if entry.option == entry.key.rsplit(".", 1)[-1].lstrip("-").replace("-", "_"):
            same.append(entry.option)
        else:
            where = f"{entry.option} = {entry.new}" if entry.new else entry.option
            renamed.setdefault(where, []).append(entry.key)
    if same:
        yield ", ".join(same)
    for where, keys in renamed.items():
        yield f"{', '.join(keys)} -> {where}"


def _changed(entry: Entry) -> str:
    new = f" = {entry.new}" if entry.new else ""
    return f"{entry.key} = {entry.shown} -> {entry.option}{new}: {entry.why}"


def _dropped(entries: list[Entry]) -> Iterator[str]:
    """A line for each reason; many keys of one table are written as `table.*`."""
    by_reason: dict[str, dict[str, list[Entry]]] = {}
    for entry in entries:
        table = entry.key.rpartition(".")[0] or entry.key
        by_reason.setdefault(entry.why, {}).setdefault(table, []).append(entry)
    for why, tables in by_reason.items():
        few, shown = sum(map(len, tables.values())) <= 6, []
        for table, members in tables.items():
            if len(members) > 3:
                shown.append(f"{table}.* ({len(members)} keys)")
            else:
                shown += [f"{e.key} = {e.shown}" if few else e.key for e in members]
        yield f"{', '.join(shown)}: {why}"
