"""What became of every key of a source: taken over, changed or dropped, and nothing else.

A converter settles the source's keys one after the other. What it says about a key that the source
leaves out, or that is settled already, has no effect: the first word counts. What nobody settles is
dropped when the ledger is closed, so no key gets lost in silence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from anima_fast.errors import UserError
from anima_fast.migrate.paths import PATHS, Paths

# Values of keys with such names are neither written nor shown.
SECRET = re.compile(r"(?i)(api_?key|(^|[._-])token$|password|secret|credential)")
SECRET_VALUE = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|[0-9a-f]{40})\b")
HIDDEN = "(hidden)"
OFF, NOT_SET, UNKNOWN = "it is off", "it is not set", "it has no counterpart here"


@dataclass(frozen=True)
class Entry:
    """A settled key of the source: `shown` is its value, `option` and `new` are ours."""

    key: str
    shown: str
    option: str | None = None
    new: str | None = None
    why: str = ""


@dataclass
class Ledger:
    """The source's keys, what became of them, and the settings that came out.

    Attributes:
        source: every key of the source by its full name, with its value.
        options: our options so far.
        taken, changed, dropped: the lists that the user sees.
        added: options that the source does not have, each with the reason.
        todo: what the user has to do by hand before training.
        dataset: a dataset file to write beside the options; None when there is nothing to write.
        paths: where relative paths of the source start.
    """

    source: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    taken: list[Entry] = field(default_factory=list)
    changed: list[Entry] = field(default_factory=list)
    dropped: list[Entry] = field(default_factory=list)
    added: list[Entry] = field(default_factory=list)
    todo: list[str] = field(default_factory=list)
    dataset: dict[str, Any] | None = None
    paths: Paths = field(default_factory=Paths)
    _open: set[str] = field(default_factory=set)

    def extend(self, keys: Mapping[str, Any], prefix: str = "") -> None:
        """Add the keys of another part of the source; tables are flattened to dotted names."""
        found = dict(flatten(keys, prefix))
        self.source |= found
        self._open |= found.keys()

    def has(self, key: str) -> bool:
        """Whether the source has this key and it is not settled yet."""
        return key in self._open

    def open_keys(self, prefix: str = "") -> list[str]:
        """The keys that begin with `prefix` and are not settled."""
        return [key for key in self.source if key in self._open and key.startswith(prefix)]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key of the source, settled or not; `UserError` for a table."""
        tables = (f"{key}.", f"{key}[")
        if key not in self.source and any(name.startswith(tables) for name in self.source):
            raise UserError(f"{key}: expected one value, got a table or a list of them")
        return self.source.get(key, default)

    def on(self, key: str) -> bool:
        """Whether the source sets a key to something else than off."""
        return not is_off(self.get(key))

    def number(self, key: str, default: float = 0.0) -> float:
        """The value of a key as a number; `UserError` for anything else."""
        value = self.get(key)
        if value is None or value == "":
            return default
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or isinstance(value, bool):
            raise UserError(f"{key}: expected a number, got {show(value)!r}")
        return number

    def whole(self, key: str, default: int = 0) -> int:
        """The value of a key as a whole number."""
        return int(self.number(key, default))

    def text(self, key: str, default: str = "") -> str:
        """The value of a key as text; nothing and an empty text give the default."""
        return str(self.get(key) or default)

    def take(
        self, key: str, option: str, value: Any = None, why: str = "", default: str = ""
    ) -> None:
        """The key becomes an option, with its own value unless one is given; paths are resolved.

        Args:
            why: the reason, when something changes on the way.
            default: the reason to add the option where the source does not set the key, if any.
        """
        if default and self.source.get(key) is None:
            self.add(option, value, default)
        value = self.source.get(key) if value is None else value
        if not self.has(key) or value is None:
            return
        if option in PATHS:
            value, moved = self.paths.resolve_all(value)
            why = "; ".join(filter(None, (why, moved)))
        self.options[option] = value
        self._settle(key, self.changed if why else self.taken, option, value, why)

    def place(self, key: str, where: str) -> None:
        """The key is taken over into another file or option, which `where` names."""
        self._settle(key, self.taken, where)

    def explain(self, key: str, why: str) -> None:
        """The key is taken over in another form, which `why` explains."""
        self._settle(key, self.changed, why=why)

    def drop(self, key: str, why: str) -> None:
        """The key has no counterpart here."""
        self._settle(key, self.dropped, why=why)

    def add(self, option: str, value: Any, why: str) -> None:
        """Add an option that the source leaves out; what is in the options already stays."""
        if option not in self.options:
            self.put(option, value, why)

    def put(self, option: str, value: Any, why: str) -> None:
        """Set an option that follows from several keys together, over what is there."""
        self.options[option] = value
        before = [e for e in self.added if e.option == option]
        self.added = [e for e in self.added if e.option != option]
        self.note(option, value, "; ".join(dict.fromkeys([*(e.why for e in before), why])))

    def note(self, key: str, value: Any, why: str) -> None:
        """List something that was added, here or to the dataset file."""
        self.added.append(Entry("", "", key, show(value), why))

    def close(self, reasons: Mapping[str, str] | None = None, prefix: str = "") -> None:
        """Drop the open keys that begin with `prefix`.

        Args:
            reasons: why a key has no counterpart, by the beginning of its name without `prefix`,
                the longest one first. The rest is off, not set or has no counterpart.
        """
        starts = sorted(reasons or {}, key=len, reverse=True)
        for key in self.open_keys(prefix):
            name, value = key.removeprefix(prefix), self.source[key]
            start = next((s for s in starts if name.startswith(s)), "")
            why = reasons[start] if reasons and start else UNKNOWN
            self.drop(key, NOT_SET if value in (None, "") else OFF if is_off(value) else why)

    def _settle(
        self, key: str, entries: list[Entry], option: str | None = None, value: Any = None,
        why: str = "",
    ) -> None:  # fmt: skip
        if not self.has(key):
            return
        self._open.remove(key)
        secret = SECRET.search(key)
        shown = HIDDEN if secret else show(self.source[key])
        new = None if value is None else HIDDEN if secret else show(value)
        entries.append(Entry(key, shown, option, new, why))


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys with dots and indices: `adapter.rank`, `directory[0].path`. Empty tables are keys too.

    A list is one value unless it holds tables.
    """
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{name}.")
        elif is_rows(value):
            for i, row in enumerate(value):
                yield from flatten(row, f"{name}[{i}].") if row else [(f"{name}[{i}]", {})]
        else:
            yield name, value


def is_rows(value: Any) -> TypeGuard[list[Mapping[str, Any]]]:
    """Whether a value is a list of tables."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) for v in value)


def is_off(value: Any) -> bool:
    """Whether a value turns its option off."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "false", "no", "none", "off", "0")
    return not value


def show(value: Any) -> str:
    """A value for the lists: one short line, without anything that looks like a password."""
    if isinstance(value, (list, tuple)):
        text = "[" + ", ".join(show(v) for v in value) + "]"
    else:
        text = str(value).lower() if isinstance(value, bool) else str(value)
    text = "".join(c if c.isprintable() else " " for c in SECRET_VALUE.sub(HIDDEN, text))
    text = " ".join(text.split()) or "(empty)"
    return text if len(text) <= 120 else text[:117] + "..."
