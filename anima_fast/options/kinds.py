"""The kinds of value that options and dataset keys take, and how each is read.

A reader gets a value and whether numbers and booleans may be spelled as text, as on the command
line. It returns the value in its normal type and raises `ValueError`, `TypeError` or
`OverflowError` for anything else; the message to the user is made in `declare.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

TRUE_WORDS, FALSE_WORDS = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


@dataclass(frozen=True)
class Kind:
    """What messages say is expected, what the help page shows as the value, and the reader."""

    expected: str
    metavar: str
    read: Callable[[Any, bool], Any]


def shown(value: Any) -> str:
    """A value for messages: one line, at most 60 characters."""
    try:
        text = repr(value)
    except ValueError:
        # Python refuses to print numbers of thousands of digits.
        text = "a huge number"
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."


def pair_text(value: Any) -> str:
    """A size or range as the command line writes it: `[832, 1216]` is "832,1216"."""
    return ",".join(str(part).strip() for part in _parts(value))


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
    if isinstance(value, bool) or not isinstance(value, (int, str) if text else int):
        raise TypeError
    return int(value)


def _float(value: Any, text: bool) -> float:
    allowed = (int, float, str) if text else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _str(value: Any, text: bool) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _parts(value: Any) -> list[Any]:
    if isinstance(value, str):
        return re.split(r"[,x]", value)
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _pair(value: Any, number: Callable[[Any, bool], Any]) -> tuple[Any, Any]:
    """`1024`, `[832, 1216]` or "832,1216"; a single number counts for both."""
    parsed = [number(part, isinstance(value, str)) for part in _parts(value)]
    if len(parsed) != 2 and (len(parsed) != 1 or isinstance(value, (list, tuple))):
        raise ValueError
    return parsed[0], parsed[-1]


def _whole(value: Any, text: bool) -> int:
    """A whole number, which may be written as 64.0."""
    number = _float(value, text)
    if number != int(number):
        raise ValueError
    return int(number)


def _size(value: Any, text: bool) -> tuple[int, int]:
    return _pair(value, _whole)


def _range(value: Any, text: bool) -> tuple[float, float]:
    low, high = _pair(value, _float)
    if low > high:
        raise ValueError
    return low, high


def _steps(value: Any, text: bool) -> int | float:
    if isinstance(value, str) and value.strip().endswith("%"):
        value = float(value.strip()[:-1]) / 100
    number = _float(value, text)
    if number >= 1 and number != int(number):
        raise ValueError
    return int(number) if number >= 1 or number == 0 else number


def _words(value: Any, text: bool) -> tuple[str, ...]:
    return tuple(_str(part, text) for part in ((value,) if isinstance(value, str) else value))


def _numbers(value: Any, text: bool) -> tuple[float, ...]:
    values = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(_float(part, text) for part in values)


def _table(value: Any, text: bool) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError
    return dict(value)


KINDS = {
    "bool": Kind("true or false", "", _bool),
    "int": Kind("a whole number", "INT", _int),
    "float": Kind("a number", "NUMBER", _float),
    "str": Kind("a text in quotes", "TEXT", _str),
    "size": Kind("a whole number or two, such as 1024 or 832,1216", "W,H", _size),
    "range": Kind("two numbers, the smaller first, such as 2.0,4.0", "LOW,HIGH", _range),
    "steps": Kind("a number of steps, a fraction below 1 or a percentage", "STEPS", _steps),
    "words": Kind("a list of words", "WORD...", _words),
    "numbers": Kind("a list of numbers", "NUMBER...", _numbers),
    "table": Kind("a table", "", _table),
}
