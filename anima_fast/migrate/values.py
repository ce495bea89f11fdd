"""Values of other trainers' files in the types of our options."""

from __future__ import annotations

from typing import Any

from anima_fast.options.declare import Spec


def is_off(value: Any) -> bool:
    """Whether a value turns its option off."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "false", "no", "none", "0")
    return not value


def is_nothing(spec: Spec, value: Any) -> bool:
    """Whether a value says "not given" in configuration files of others."""
    if value is None or value == "" or value == [] or value == ():
        return True
    if spec.is_list or spec.kind == "bool":
        return False
    if isinstance(value, str) and value.lower() == "none":
        return spec.optional
    below = spec.low is not None and spec.low > 0
    return below and not isinstance(value, str) and value == 0


def plain(spec: Spec, value: Any) -> Any:
    """A value in the looser types of other files: numbers as text, 10.0 for 10, text for a list."""
    if isinstance(value, str) and spec.kind in ("int", "float", "steps") and not spec.is_list:
        value = value.strip()
        try:
            value = float(value) if spec.kind != "int" or not value.isdigit() else int(value)
        except ValueError:
            return value
    if spec.kind in ("int", "steps") and isinstance(value, float) and value.is_integer():
        return int(value)
    if spec.kind == "str" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if spec.kind == "bool" and isinstance(value, int):
        return bool(value)
    if spec.is_list and isinstance(value, str):
        return value.split()
    if spec.kind == "words" and isinstance(value, (list, tuple)):
        return [str(v) for v in value if str(v)]
    return value


def same(a: Any, b: Any) -> bool:
    """Equal values; false, nothing and an empty text are the same."""
    return a == b or (not a and not b)
