"""What became of every key of a source: taken over, changed or dropped, and nothing else.

A converter looks at the source's keys through a `Ledger` and settles each of them once. What it
forgets is dropped as unknown when the ledger is closed, so that no key can get lost in silence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from anima_fast.errors import UserError

# Values of keys with such names are neither written nor shown.
SECRET = re.compile(r"(?i)(api_?key|(^|[._-])token$|password|secret|credential)")
SECRET_VALUE = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|[0-9a-f]{40})\b")
HIDDEN = "(hidden)"


@dataclass(frozen=True)
class Entry:
    """A key of the source that is settled: `shown` is its value, `option` and `new` ours."""

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
    """

    source: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    taken: list[Entry] = field(default_factory=list)
    changed: list[Entry] = field(default_factory=list)
    dropped: list[Entry] = field(default_factory=list)
    added: list[Entry] = field(default_factory=list)
    todo: list[str] = field(default_factory=list)
    dataset: dict[str, Any] | None = None
    _open: dict[str, None] = field(default_factory=dict)

    def extend(self, keys: Mapping[str, Any], prefix: str = "") -> None:
        """Add the keys of another part of the source; tables are flattened to dotted names."""
        for key, value in flatten(keys, prefix):
            self.source[key] = value
            self._open[key] = None

    def has(self, key: str) -> bool:
        """Whether the source has this key and nothing has become of it yet."""
        return key in self._open

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key of the source, settled or not."""
        return self.source.get(key, default)

    def number(self, key: str, default: float = 0.0) -> float:
        """The value of a key as a number; `UserError` for anything else."""
        value = self.source.get(key)
        if value is None or value == "":
            return default
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or isinstance(value, bool):
            raise UserError(f"{key}: expected a number, got {show(value)!r}")
        return number

    def table(self, key: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """A table of a source that may leave it out; `UserError` for anything else."""
        value = config.get(key) or {}
        if not isinstance(value, Mapping):
            raise UserError(f"{key}: expected a table of settings, got {show(value)!r}")
        return value

    def open_keys(self, prefix: str = "") -> list[str]:
        """The keys that begin with `prefix` and are not settled."""
        return [key for key in self._open if key.startswith(prefix)]

    def take(self, key: str, option: str | None = None, value: Any = None) -> None:
        """The key means the same here, as `option` (its own name when None)."""
        option = option or key
        value = self.source[key] if value is None else value
        if value is None:
            self.drop(key, "it is not set")
            return
        self.options[option] = value
        self._settle(key, self.taken, option, value)

    def take_elsewhere(self, key: str, where: str) -> None:
        """The key is taken over into another file or place, which `where` names."""
        self._settle(key, self.taken, where, None)

    def change(self, key: str, option: str | None, value: Any, why: str) -> None:
        """The key becomes another value, for a reason; without an option it is only explained."""
        if option is not None:
            self.options[option] = value
        self._settle(key, self.changed, option, value if option else None, why)

    def drop(self, key: str, why: str) -> None:
        """The key has no counterpart here."""
        self._settle(key, self.dropped, why=why)

    def add(self, option: str, value: Any, why: str) -> None:
        """An option that the source leaves out and that must be written all the same.

        What is in the options already stays.
        """
        if option not in self.options:
            self.put(option, value, why)

    def put(self, option: str, value: Any, why: str) -> None:
        """Set an option that follows from several keys together; what was put there goes."""
        self.options[option] = value
        before = [e for e in self.added if e.option == option]
        self.added = [e for e in self.added if e.option != option]
        why = "; ".join(dict.fromkeys([*(e.why for e in before), why]))
        self.added.append(Entry("", "", option, show(value), why))

    def note(self, key: str, value: str, why: str) -> None:
        """Something added to another file than that of the options."""
        self.added.append(Entry("", "", key, value, why))

    def close(self, why: str) -> None:
        """Drop whatever is left."""
        for key in list(self._open):
            self.drop(key, why)

    def _settle(
        self, key: str, entries: list[Entry], option: str | None = None, value: Any = None,
        why: str = "",
    ) -> None:  # fmt: skip
        if key not in self.source:
            raise UserError(f"{key}: expected one value, got a table or a list of them")
        if key not in self._open:
            raise AssertionError(f"{key} is settled twice")
        del self._open[key]
        secret = bool(SECRET.search(key))
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
        elif isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            for i, item in enumerate(value):
                if item:
                    yield from flatten(item, f"{name}[{i}].")
                else:
                    yield f"{name}[{i}]", {}
        else:
            yield name, value


def show(value: Any) -> str:
    """A value for the lists: one short line, without anything that looks like a password."""
    if isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(show(v) for v in value) + "]"
    else:
        text = str(value)
    text = "".join(c if c.isprintable() else " " for c in SECRET_VALUE.sub(HIDDEN, text))
    text = " ".join(text.split()) or "(empty)"
    return text if len(text) <= 120 else text[:117] + "..."
