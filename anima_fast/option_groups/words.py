"""The key=value lists inside options: `network_args`, `optimizer_args`, `lr_scheduler_args`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from anima_fast.errors import UserError
from anima_fast.option_groups.base import FALSE_WORDS, TRUE_WORDS, nearest

# Key of network_args -> (kind, keyword of add_lora); an empty keyword is handled elsewhere.
_NETWORK_KEYS = {
    "train_llm_adapter": ("flag", ""),
    "verbose": ("flag", ""),
    "exclude_patterns": ("patterns", "exclude_patterns"),
    "include_patterns": ("patterns", "include_patterns"),
    "network_reg_dims": ("ranks", "reg_dims"),
    "network_reg_lrs": ("rates", "reg_lrs"),
    "rank_dropout": ("rate", "rank_dropout"),
    "module_dropout": ("rate", "module_dropout"),
    "loraplus_lr_ratio": ("ratio", "loraplus_ratio"),
    "loraplus_unet_lr_ratio": ("ratio", "loraplus_unet_ratio"),
    "loraplus_text_encoder_lr_ratio": ("ratio", "loraplus_te_ratio"),
}
_OTHER_NETWORKS = ("conv_dim", "conv_alpha", "use_tucker", "factor", "network_reg_alphas")


@dataclass(frozen=True)
class NetworkArgs:
    """`network_args` in use: what is trained beside the DiT, and arguments of `add_lora`."""

    train_llm_adapter: bool = False
    verbose: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)


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
    return {key: _literal(value) for key, value in split_words(words, where).items()}


def _literal(value: str) -> Any:
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value


def parse_network_args(words: Iterable[str]) -> NetworkArgs:
    """Parse and check `network_args`.

    Raises:
        UserError: an unknown key (with the nearest known one), or a value that cannot be read.
    """
    flags, kwargs = {"train_llm_adapter": False, "verbose": False}, {}
    for key, value in split_words(words, "--network_args").items():
        if key in _OTHER_NETWORKS:
            raise UserError(f"--network_args {key}: not used by networks.lora_anima: remove it")
        if key not in _NETWORK_KEYS:
            raise UserError(f"--network_args {key}: unknown key: {nearest(key, _NETWORK_KEYS)}")
        kind, keyword = _NETWORK_KEYS[key]
        parsed = _PARSERS[kind](value, f"--network_args {key}")
        if keyword:
            kwargs[keyword] = parsed
        else:
            flags[key] = parsed
    return NetworkArgs(**flags, kwargs=kwargs)


def _flag(value: str, where: str) -> bool:
    if value.lower() not in TRUE_WORDS + FALSE_WORDS:
        raise UserError(f"{where}: expected True or False, got {value[:60]!r}")
    return value.lower() in TRUE_WORDS


def _number(value: str, where: str, high: float = float("inf")) -> float:
    try:
        number = float(value)
    except ValueError:
        raise UserError(f"{where}: expected a number, got {value[:60]!r}") from None
    # Written so that a NaN is refused too.
    if not 0 <= number <= high or number == float("inf"):
        limits = f"from 0 to {high:g}" if high < float("inf") else "of at least 0"
        raise UserError(f"{where}: {value} is out of range: use a number {limits}")
    return number


def _rate(value: str, where: str) -> float:
    return _number(value, where, 1.0)


def _patterns(value: str, where: str) -> tuple[str, ...]:
    """A Python list of regular expressions, or one of them."""
    parsed = _literal(value)
    patterns = tuple(parsed) if isinstance(parsed, (list, tuple)) else (value,)
    for pattern in patterns:
        _check_pattern(pattern, where)
    return patterns


def _check_pattern(pattern: Any, where: str) -> None:
    if not isinstance(pattern, str):
        raise UserError(f"{where}: expected regular expressions, got {pattern!r}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"{where}: {pattern!r} is no regular expression ({error}): correct it"
        ) from None


def _pairs(value: str, where: str) -> dict[str, float]:
    """`pattern=number,pattern=number`, split at commas, then at the first equals sign."""
    found = {}
    for part in filter(None, (part.strip() for part in value.split(","))):
        pattern, equals, number = part.partition("=")
        if not equals:
            raise UserError(f"{where}: expected pattern=number, got {part[:60]!r}")
        _check_pattern(pattern.strip(), where)
        found[pattern.strip()] = _number(number.strip(), where)
    return found


def _ranks(value: str, where: str) -> dict[str, int]:
    ranks = _pairs(value, where)
    for pattern, rank in ranks.items():
        if rank < 1 or rank != int(rank):
            raise UserError(
                f"{where}: rank {rank:g} of {pattern!r}: use a whole number of at least 1, or "
                "exclude_patterns to leave modules out"
            )
    return {pattern: int(rank) for pattern, rank in ranks.items()}


_PARSERS = {
    "flag": _flag,
    "patterns": _patterns,
    "ranks": _ranks,
    "rates": _pairs,
    "rate": _rate,
    "ratio": _number,
}
