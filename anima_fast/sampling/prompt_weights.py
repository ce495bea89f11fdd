r"""Prompt weights as ComfyUI reads them: (words), (words:1.3), nesting, and \( \) as they are.

A group in parentheses weighs 1.1 times what surrounds it; with `:number` at its end it weighs
exactly that number. An item is a group when it begins with "(" and ends with ")", wherever
parentheses are not balanced; everything else is text. Source: `token_weights` and
`parse_parentheses` of ComfyUI's comfy/sd1_clip.py. Training captions are never read this way.
"""

from __future__ import annotations

import math

from anima_fast.errors import UserError

EMPHASIS = 1.1
# Stand for escaped parentheses while a prompt is taken apart.
OPEN, CLOSE = "\x00\x02", "\x00\x01"


def weighted_segments(prompt: str) -> list[tuple[str, float]]:
    """A prompt as texts with their weights, in order; at least one.

    Raises `UserError` for hundreds of parentheses in each other.
    """
    text = prompt.replace(r"\)", CLOSE).replace(r"\(", OPEN)
    try:
        segments = _segments(text, 1.0)
    except RecursionError:
        raise UserError(
            f"the prompt {prompt[:40]!r} nests its parentheses too deeply: write (words:1.3)"
        ) from None
    found = [(text.replace(CLOSE, ")").replace(OPEN, "("), weight) for text, weight in segments]
    return found or [("", 1.0)]


def _segments(text: str, weight: float) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for item in _items(text):
        if len(item) < 2 or item[0] != "(" or item[-1] != ")":
            found.append((item, weight))
            continue
        inner, own = item[1:-1], weight * EMPHASIS
        colon = inner.rfind(":")
        number = _number(inner[colon + 1 :]) if colon > 0 else None
        if number is not None:
            inner, own = inner[:colon], number
        found += _segments(inner, own)
    return found


def _number(text: str) -> float | None:
    """A finite number; None for a colon that belongs to the text."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _items(text: str) -> list[str]:
    """Groups and the texts between them; parentheses inside a group stay in it."""
    items, current, depth = [], "", 0
    for character in text:
        if character == "(":
            if depth == 0:
                if current:
                    items.append(current)
                current = ""
            current += character
            depth += 1
        elif character == ")":
            depth -= 1
            current += character
            if depth == 0:
                items.append(current)
                current = ""
        else:
            current += character
    return [*items, current] if current else items
