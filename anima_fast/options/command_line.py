"""Command-line words as option values: `--name value`, `--name=value`, flags and word lists.

Typer declares the options (help page, completion), but a list option of sd-scripts takes several
words (`--network_args a=1 b=2`), names come with hyphens or underscores, and a flag may carry
`=true` or `=false`. So the words are read here, by the same descriptions, and stay text: the types
are checked in one place for the command line and for TOML files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from anima_fast.errors import UserError
from anima_fast.options.declare import Spec, nearest


def read_words(
    words: list[str],
    known: Mapping[str, Spec],
    *,
    others: Collection[str] = (),
    flags: Collection[str] = (),
    word: str | None = None,
) -> dict[str, Any]:
    """Option name with underscores -> its text, the last one given; for lists all texts, in order.

    Args:
        words: the words after the command's name.
        known: the options by name.
        others: more names that are accepted, with or without a value.
        flags: names among `others` that never take the next word as their value.
        word: the option whose value may also be given alone, without its name.
    Raises:
        UserError: an unknown name (with the nearest one), a missing value, a stray word.
    """
    values: dict[str, Any] = {}
    at = 0
    while at < len(words):
        if word is not None and word not in values and not _is_name(words[at]):
            values[word] = words[at]
            at += 1
            continue
        name, value = _name(words[at])
        at += 1
        spec = known.get(name)
        if spec is None and name not in others:
            raise UserError(f"{words[at - 1]}: unknown option: {nearest(name, [*known, *others])}")
        end = at
        while end < len(words) and not _is_name(words[end]):
            end += 1
        if spec is not None and spec.is_list:
            values[name] = values.get(name, []) + ([] if value is None else [value]) + words[at:end]
            if not values[name]:
                raise UserError(f"--{name} needs at least one value after it")
            at = end
        elif value is not None:
            values[name] = value
        elif name in flags or (spec is not None and spec.kind == "bool"):
            spelt_out = at < end and words[at].lower() in ("true", "false")
            values[name] = words[at] if spelt_out else "true"
            at += spelt_out
        elif spec is None:
            values[name] = words[at] if at < end else "true"
            at = min(at + 1, end)
        elif at == len(words) or (at == end and _name(words[at])[0] in known):
            raise UserError(f"--{name} needs a value after it")
        else:
            values[name] = words[at]
            at += 1
    return values


def _is_name(word: str) -> bool:
    return word.startswith("--") and len(word) > 2


def _name(word: str) -> tuple[str, str | None]:
    """The option's name with underscores, and the text after an equals sign if there is one."""
    if not _is_name(word):
        raise UserError(f"unexpected word {word[:60]!r}: options begin with --")
    name, equals, value = word[2:].partition("=")
    return name.replace("-", "_"), value if equals else None
