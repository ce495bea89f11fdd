"""How one option is declared, described and read from text or TOML.

An option is a dataclass field made by `option(...)`: its annotation gives the type, its metadata
the help sentence, the help group and the limits. Everything else that knows options (flags, TOML
keys, checks, the table in the documentation) is made from `specs(cls)`, so nothing is listed twice.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from anima_fast.errors import UserError

# What each kind expects, for messages, and what the help page shows as its value.
KINDS = {
    "bool": ("true or false", ""),
    "int": ("a whole number", "INT"),
    "float": ("a number", "NUMBER"),
    "str": ("a text", "TEXT"),
    "size": ("a whole number or two, such as 1024 or 832,1216", "W,H"),
    "steps": ("a number of steps, a fraction below 1 or a percentage", "STEPS"),
    "words": ("a list of words", "WORD..."),
    "numbers": ("a list of numbers", "NUMBER..."),
}
TRUE_WORDS, FALSE_WORDS = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def option(
    group: str,
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    kind: str | None = None,
    secret: bool = False,
) -> Any:
    """A dataclass field that is an option.

    Args:
        group: the panel of the help page.
        default: the value when it is not given; None means off or "decided by the program".
        help: one sentence, with the unit where there is one.
        choices: the only values allowed, if not empty.
        low, high: the allowed range of a number, both ends included.
        kind: a key of `KINDS` where the annotation does not say enough.
        secret: never written into the files of a run.
    """
    metadata = {
        "group": group, "help": help, "choices": choices, "low": low, "high": high, "kind": kind,
        "secret": secret,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Spec:
    """The description of one option (see `option`); `optional` says whether None is a value."""

    name: str
    kind: str
    default: Any
    help: str
    group: str
    choices: tuple[str, ...]
    low: float | None
    high: float | None
    optional: bool
    secret: bool

    @property
    def is_list(self) -> bool:
        """Takes one or more words."""
        return self.kind in ("words", "numbers")

    @property
    def metavar(self) -> str:
        """What the help page shows in the place of the value."""
        return "|".join(self.choices) or KINDS[self.kind][1]


@functools.cache
def specs(cls: type) -> Mapping[str, Spec]:
    """The options of a dataclass by name, in the order of declaration."""
    hints = typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        meta = dict(field.metadata)
        if "help" not in meta:
            continue
        kind, optional = _kind(hints[field.name])
        meta["kind"] = meta["kind"] or kind
        found[field.name] = Spec(name=field.name, default=field.default, optional=optional, **meta)
    return types.MappingProxyType(found)


def _kind(hint: Any) -> tuple[str, bool]:
    plain = {
        bool: "bool", int: "int", float: "float", str: "str",
        tuple[str, ...]: "words", tuple[float, ...]: "numbers",
    }  # fmt: skip
    if hint in plain:
        return plain[hint], False
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    optional = len(members) < len(typing.get_args(hint))
    return ("steps" if len(members) > 1 else plain[members[0]]), optional


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, if there is one."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else "remove it, or see --help for the known ones"


def convert(spec: Spec, value: Any, where: str, *, text: bool = False) -> Any:
    """One value in the type of its option.

    Args:
        spec: the option.
        value: what was given: a value of the right type or, with `text`, words to be read.
        where: how messages call the place, such as `--network_dim`.
        text: whether numbers and booleans may be spelt as text (the command line).
    Raises:
        UserError: a wrong type, a value out of range or not among the choices.
    """
    if value is None or (value == "" and spec.optional):
        if spec.optional or value == spec.default:
            return None
        raise UserError(f"{where}: expected {KINDS[spec.kind][0]}, got nothing")
    try:
        converted = _READERS[spec.kind](value, text)
    except (ValueError, TypeError):
        expected = KINDS[spec.kind][0]
        raise UserError(f"{where}: expected {expected}, got {_show(value)}") from None
    for part in converted if spec.is_list else (converted,):
        _check_range(spec, part, where)
    if spec.choices and converted not in spec.choices:
        choices = ", ".join(spec.choices)
        raise UserError(f"{where}: {_show(value)} is not one of {choices}: use one of these")
    return converted


def _check_range(spec: Spec, value: Any, where: str) -> None:
    below = spec.low is not None and value < spec.low
    above = spec.high is not None and value > spec.high
    if not (below or above):
        return
    if spec.high is None:
        wanted = f"at least {spec.low:g}"
    else:
        wanted = f"from {spec.low:g} to {spec.high:g}"
    raise UserError(f"{where}: {value:g} is out of range: use a value {wanted}")


def _show(value: Any) -> str:
    shown = " ".join(str(value).split()) if isinstance(value, str) else repr(value)
    return repr(shown[:60]) if isinstance(value, str) else shown[:60]


def _bool(value: Any, text: bool) -> bool:
    if text and isinstance(value, str):
        word = value.lower()
        if word not in TRUE_WORDS + FALSE_WORDS:
            raise ValueError
        return word in TRUE_WORDS
    if not isinstance(value, bool):
        raise TypeError
    return value


def _int(value: Any, text: bool) -> int:
    if text and isinstance(value, str):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value


def _float(value: Any, text: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError
    if isinstance(value, str) and not text:
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _str(value: Any, text: bool) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _size(value: Any, text: bool) -> str:
    """`1024`, `[832, 1216]` or text: always text afterwards; the dataset code reads the numbers."""
    parts = value if isinstance(value, (list, tuple)) else str(value).split(",")
    if isinstance(value, bool) or not 1 <= len(parts) <= 2:
        raise TypeError
    for part in parts:
        _float(part, True)
    return ",".join(str(part).strip() for part in parts)


def _steps(value: Any, text: bool) -> int | float:
    if isinstance(value, str) and value.strip().endswith("%"):
        value = float(value.strip()[:-1]) / 100
    number = _float(value, text)
    if number >= 1 and number != int(number):
        raise ValueError
    return int(number) if number >= 1 or number == 0 else number


def _words(value: Any, text: bool) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else tuple(value)
    return tuple(_str(part, text) for part in values)


def _numbers(value: Any, text: bool) -> tuple[float, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return tuple(_float(part, text) for part in values)


_READERS = {
    "bool": _bool,
    "int": _int,
    "float": _float,
    "str": _str,
    "size": _size,
    "steps": _steps,
    "words": _words,
    "numbers": _numbers,
}
