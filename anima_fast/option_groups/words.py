"""The key=value lists inside options, such as `optimizer_args` and `lr_scheduler_args`."""

from __future__ import annotations

import ast
from collections.abc import Iterable
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

    A value that is no literal stays text; true and false may be written in small letters.
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
