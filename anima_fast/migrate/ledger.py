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
from pathlib import Path
from typing import Any, TypeGuard

from anima_fast.errors import UserError
from anima_fast.migrate.paths import PATHS, resolve

# Values of keys with such names are neither written nor shown.
SECRET = re.compile(r"(?i)(api_?key|(^|[._-])token$|password|secret|credential)")
SECRET_VALUE = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|[0-9a-f]{40})\b")
HIDDEN = "(hidden)"
TAKEN, CHANGED, DROPPED = "taken", "changed", "dropped"
# Reasons that many keys share.
OFF, UNKNOWN = "off or not set", "it has no counterpart here, or belongs to what is off"
DEFAULT = "the default there"
EPOCH = "a batch that is not full ends an epoch here, and is left out there"
KERNELS = "the blocks run through kernels of their own, which --compile would turn off"
WEIGHTS = (
    "weights have the type of mixed_precision; 8-bit base weights are not supported: "
    "blocks_to_swap saves memory"
)
# One key, or several that become the same.
Keys = str | tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """A settled key of the source: `shown` is its value; `option` and `new` are ours, or `option`
    is the place where it went."""

    key: str
    verdict: str
    shown: str
    option: str = ""
    new: str = ""
    why: str = ""


@dataclass
class Ledger:
    """The source's keys, what became of them, and the settings that came out.

    Attributes:
        source: every key of the source by its full name, with its value.
        settled: what became of them so far.
        options: our options so far.
        added: options that the source does not have -> their value and the reason.
        todo: what the user has to do by hand before training.
        dataset: a dataset file to write beside the options; None when there is nothing to write.
        base: where relative paths of the source start.
    """

    source: dict[str, Any] = field(default_factory=dict)
    settled: dict[str, Entry] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    added: dict[str, tuple[str, str]] = field(default_factory=dict)
    todo: list[str] = field(default_factory=list)
    dataset: dict[str, Any] | None = None
    base: Path | None = None

    def extend(self, keys: Mapping[str, Any], prefix: str = "") -> None:
        """Add the keys of another part of the source; tables are flattened to dotted names."""
        self.source |= dict(flatten(keys, prefix))

    def has(self, key: str) -> bool:
        """Whether the source has this key and it is not settled yet."""
        return key in self.source and key not in self.settled

    def open_keys(self, prefix: str = "") -> tuple[str, ...]:
        """The keys that begin with `prefix` and are not settled."""
        return tuple(key for key in self.source if key.startswith(prefix) and self.has(key))

    def listed(self, verdict: str) -> list[Entry]:
        """The keys that were taken, changed or dropped."""
        return [entry for entry in self.settled.values() if entry.verdict == verdict]

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
        self, keys: Keys, option: str, value: Any = None, why: str = "", default: str = ""
    ) -> None:
        """The keys become an option: with the key's own value unless one is given, paths resolved.

        Args:
            why: the reason, when something changes on the way.
            default: the reason to add the option where the source sets none of the keys, if any.
        """
        keys = (keys,) if isinstance(keys, str) else keys
        if default and all(self.source.get(key) is None for key in keys):
            self.add(default, **{option: value})
        for key in filter(self.has, keys):
            new, moved = self.source[key] if value is None else value, ""
            if new is None:
                continue
            if option in PATHS and isinstance(new, (list, tuple)):
                found = [resolve(str(text), self.base) for text in new]
                new, moved = [path for path, _ in found], max((m for _, m in found), default="")
            elif option in PATHS:
                new, moved = resolve(str(new), self.base)
            self.options[option] = new
            self.place(option, key, why="; ".join(filter(None, (why, moved))), new=new)

    def place(self, where: str, *keys: str, why: str = "", new: Any = None) -> None:
        """The keys are taken over into another file or option; changed, if there is a reason."""
        for key in keys:
            self._settle(key, CHANGED if why else TAKEN, where, new, why)

    def drop(self, why: str, *keys: str) -> None:
        """The keys have no counterpart here."""
        for key in keys:
            self._settle(key, DROPPED, why=why)

    def add(self, why: str, **options: Any) -> None:
        """Add options that the source leaves out; what is in the options already stays."""
        self.put(why, **{name: v for name, v in options.items() if name not in self.options})

    def put(self, why: str, **options: Any) -> None:
        """Set options that follow from several keys together, over what is there."""
        self.options |= options
        self.added |= {name: (show(value), why) for name, value in options.items()}

    def close(self, reasons: Mapping[str, str] | None = None, prefix: str = "") -> None:
        """Drop the open keys that begin with `prefix`.

        Args:
            reasons: why a key has no counterpart, by the beginning of its name without `prefix`,
                the longest one first.
        """
        reasons = reasons or {}
        starts = sorted(reasons, key=len, reverse=True)
        for key in self.open_keys(prefix):
            start = next((s for s in starts if key[len(prefix) :].startswith(s)), "")
            self.drop(OFF if is_off(self.source[key]) else reasons.get(start, UNKNOWN), key)

    def _settle(
        self, key: str, verdict: str, option: str = "", new: Any = None, why: str = ""
    ) -> None:
        if not self.has(key):
            return
        shown, new = show(self.source[key]), "" if new is None else show(new)
        if SECRET.search(key):
            shown, new = HIDDEN, new and HIDDEN
        self.settled[key] = Entry(key, verdict, shown, option, new, why)


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
