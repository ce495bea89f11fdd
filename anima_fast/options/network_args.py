"""`network_module` and `network_args`: which network, and its key=value settings.

sd-scripts' three networks have the keys of its own files; `lycoris.kohya` has those of the LyCORIS
package, whose `algo` names the network. Keys that concern only convolutions are accepted with a
notice that they have no effect: the DiT has none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from anima_fast.errors import UserError
from anima_fast.models.adapter_kinds import ADAPTER_KINDS, LOKR, LORA, LYCORIS
from anima_fast.options.declare import Spec, check_value, nearest
from anima_fast.options.kinds import FALSE_WORDS
from anima_fast.options.words import literal, split_words

# Networks by the name of their module; that of lycoris.kohya depends on `algo`.
KINDS = {kind.module: kind.word for kind in ADAPTER_KINDS}
ALGORITHMS = {name: kind.word for kind in ADAPTER_KINDS for name in kind.algorithms}

Reader = Callable[[str, str], Any]


def _one(kind: str, **limits: Any) -> Reader:
    """A reader of one value as options have them, from its text and its place."""
    spec = Spec("", kind, None, "", "", **limits)
    return lambda value, where: check_value(spec, value, where, text=True)


def _factor(value: str, where: str) -> int:
    if not re.fullmatch(r"-?\d+", value) or int(value) == 0 or int(value) < -1:
        raise UserError(f"{where}: expected -1 (as square as possible) or 1 and more, got {value}")
    return int(value)


def _indices(value: str, where: str) -> tuple[int, ...] | None:
    """`0-5,10`, or all (None), written as in sd-scripts' networks for other models."""
    if value.lower() == "all":
        return None
    found: set[int] = set()
    for part in filter(None, (part.strip() for part in value.split(","))):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise UserError(f"{where}: expected blocks such as 14-27 or 0-3,8, got {part[:60]!r}")
        # No DiT has this many; a typo must not fill the memory.
        if int(match[2] or match[1]) > 999:
            raise UserError(f"{where}: there is no block {match[2] or match[1]}")
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    if not found:
        raise UserError(f"{where}: expected blocks such as 14-27 or 0-3,8, or all; got none")
    return tuple(sorted(found))


def _patterns(value: str, where: str) -> tuple[str, ...]:
    """A Python list of regular expressions, or one of them."""
    parsed = literal(value)
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
            f"{where}: {pattern!r} is not a regular expression ({error}): correct it"
        ) from None


def _pairs(value: str, where: str) -> dict[str, float]:
    """`pattern=number,pattern=number`, split at commas, then at the first equals sign."""
    found = {}
    for part in filter(None, (part.strip() for part in value.split(","))):
        pattern, equals, number = part.partition("=")
        if not equals:
            raise UserError(f"{where}: expected pattern=number, got {part[:60]!r}")
        _check_pattern(pattern.strip(), where)
        found[pattern.strip()] = _NUMBER(number.strip(), where)
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


_FLAG, _NUMBER, _SHARE = _one("bool"), _one("float", low=0), _one("float", low=0, high=1)


def _rate(value: str, where: str) -> float:
    number: float = _SHARE(value, where)
    if number == 1:
        raise UserError(f"{where}: 1 leaves nothing to train: use a number below 1")
    return number


# Key -> (reader of its value, keyword of add_lora); an empty keyword is handled below.
_KEYS: dict[str, tuple[Reader, str]] = {
    "train_llm_adapter": (_FLAG, ""),
    "verbose": (_FLAG, ""),
    "exclude_patterns": (_patterns, "exclude_patterns"),
    "include_patterns": (_patterns, "include_patterns"),
    "train_block_indices": (_indices, "blocks"),
    "network_reg_dims": (_ranks, "reg_dims"),
    "network_reg_lrs": (_pairs, "reg_lrs"),
    "rank_dropout": (_rate, "rank_dropout"),
    "module_dropout": (_rate, "module_dropout"),
    "loraplus_lr_ratio": (_NUMBER, "loraplus_ratio"),
    "loraplus_unet_lr_ratio": (_NUMBER, "loraplus_unet_ratio"),
    "loraplus_text_encoder_lr_ratio": (_NUMBER, "loraplus_te_ratio"),
    "dora_wd": (_FLAG, ""),
    "wd_on_output": (_FLAG, ""),
}
_LOKR_KEYS: dict[str, tuple[Reader, str]] = {
    "factor": (_factor, ""),
    "decompose_both": (_FLAG, ""),
    "full_matrix": (_FLAG, ""),
}
_OF_CONVOLUTIONS = (
    "conv_dim", "conv_alpha", "use_tucker", "disable_conv_cp", "use_cp", "use_conv_cp",
)  # fmt: skip
# Keys of LyCORIS that would change the result, unless they are off.
_REFUSED = {
    "dropout": "give --network_dropout instead",
    "preset": "choose layers with include_patterns and exclude_patterns instead",
    "use_scalar": "its scalar is not part of the file's maths; remove it",
    "rs_lora": "give --network_alpha multiplied by the root of the rank instead",
    "train_norm": "norms are not trained in a LoRA; remove it",
    "unbalanced_factorization": "no loader can tell it from a file; remove it",
    "network_reg_alphas": "no release of sd-scripts has it; the alpha is the same everywhere",
}
_WITHOUT_EFFECT = {
    "bypass_mode": "adapters are always applied next to the layer",
    "rank_dropout_scale": "what rank dropout leaves is always scaled up",
}


@dataclass(frozen=True)
class NetworkArgs:
    """`network_args` in use.

    Attributes:
        kind: lora, loha or lokr.
        train_llm_adapter, verbose: the flags of these names.
        kwargs: arguments of `add_lora`, `kind` included unless it is a LoRA.
        notices: what was accepted without effect, and why.
    """

    kind: str = "lora"
    train_llm_adapter: bool = False
    verbose: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


def parse_network_args(words: Iterable[str], module: str = LORA.module) -> NetworkArgs:
    """`network_args` of a `network_module`, checked.

    Raises `UserError` for an unknown module or key, a key of another network, or a wrong value.
    """
    given = split_words(words, "--network_args")
    kind = _kind(module, given)
    known = _KEYS | (_LOKR_KEYS if kind == LOKR.word else {})
    parsed: dict[str, Any] = {}
    notices = []
    for key, value in given.items():
        if key in _OF_CONVOLUTIONS:
            notices.append(f"network_args {key}: the DiT has no convolutions; it has no effect")
        elif key in _WITHOUT_EFFECT:
            notices.append(f"network_args {key}: {_WITHOUT_EFFECT[key]}; it has no effect")
        elif key in _REFUSED and value.lower() in FALSE_WORDS:
            continue
        elif key in _REFUSED:
            raise UserError(f"--network_args {key} is not supported: {_REFUSED[key]}")
        elif key in _LOKR_KEYS and kind != LOKR.word:
            raise UserError(f"--network_args {key}: only {LOKR.module} uses it: remove it")
        elif key not in known:
            raise UserError(f"--network_args {key}: unknown key: {nearest(key, known)}")
        else:
            parsed[key] = known[key][0](value, f"--network_args {key}")
    kwargs = {known[key][1]: value for key, value in parsed.items() if known[key][1]}
    if kind != LORA.word:
        kwargs["kind"] = kind
    if lokr := {key: parsed[key] for key in _LOKR_KEYS if key in parsed}:
        kwargs["lokr"] = lokr
    if parsed.get("dora_wd"):
        kwargs["dora"] = "outputs" if parsed.get("wd_on_output", True) else "inputs"
    return NetworkArgs(
        kind,
        parsed.get("train_llm_adapter", False),
        parsed.get("verbose", False),
        kwargs,
        tuple(notices),
    )


def _kind(module: str, given: dict[str, str]) -> str:
    """The network of a module; takes `algo` out of the settings."""
    if module in KINDS:
        if "algo" in given:
            raise UserError(f"--network_args algo: {module} has one algorithm: remove it")
        return KINDS[module]
    if module != LYCORIS:
        names = ", ".join([*KINDS, LYCORIS])
        raise UserError(f"--network_module {module} is unknown: use one of {names}")
    algorithm = given.pop("algo", "lora")
    if algorithm not in ALGORITHMS:
        raise UserError(
            f"--network_args algo={algorithm} is not supported: use {', '.join(ALGORITHMS)}"
        )
    return ALGORITHMS[algorithm]
