"""Option words that have parts: key=value (`optimizer_args`), path:weight (`lora`)."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from anima_fast.errors import UserError


def split_words(words: Iterable[str], where: str) -> dict[str, str]:
    """`["a=1", "b=2"]` as a dictionary; the last of equal keys wins."""
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{where}: expected key=value, got {word[:60]!r}")
        found[key.strip()] = value.strip()
    return found


def parse_arguments(words: Iterable[str], where: str) -> dict[str, Any]:
    """key=value words with the values as Python literals (`betas=0.9,0.99` is a tuple).

    A value that is not a literal stays text; true and false may be written in small letters.
    """
    return {key: literal(value) for key, value in split_words(words, where).items()}


def literal(value: str) -> Any:
    """A word as a Python literal, or as it is."""
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value


def path_and_weight(text: str, default: float = 1.0) -> tuple[str, float]:
    """A word of --lora, PATH or PATH:WEIGHT; a drive letter's colon does not begin a weight.

    A file of the whole name wins. Raises `UserError` for a weight that is not a finite number.
    """
    path, colon, word = text.rpartition(":")
    if not colon or not path or Path(text).exists():
        return text, default
    try:
        weight = float(word)
    except ValueError:
        if Path(path).exists():
            raise UserError(f"--lora {text}: the weight {word!r} is no number") from None
        return text, default
    if not math.isfinite(weight):
        raise UserError(f"--lora {text}: the weight must be a finite number")
    return path, weight
