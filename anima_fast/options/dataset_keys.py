"""The keys of a dataset file: where each may stand, its type, limits and default.

`KEYS` is the only list. The check is strict, because a mistyped key that is silently ignored costs
a training run: an unknown key stops the program with its place and the nearest known key.
Whole numbers are accepted where fractions are wanted.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from anima_fast.errors import UserError

LEVELS = {"G": "[general]", "D": "[[datasets]]", "S": "[[datasets.subsets]]"}
INTERPOLATIONS = ("lanczos", "box", "nearest", "bilinear", "linear", "bicubic", "cubic", "area")


@dataclass(frozen=True)
class Key:
    """One key: `levels` are letters of `LEVELS`, `option` the name of its command-line default."""

    name: str
    kind: str
    levels: str
    default: object = None
    low: float = 0
    high: float = 1_000_000
    option: str | None = None
    multiple: int = 1
    choices: tuple[str, ...] = ()
    # An empty text is refused where it would have no meaning.
    filled: bool = False


def _key(name: str, kind: str, levels: str, default: object = None, **more: object) -> Key:
    more.setdefault("option", name)
    return Key(name, kind, levels, default, **more)


# Several keys have a command-line option of another name; those with None have no option.
KEYS: dict[str, Key] = {
    key.name: key
    for key in (
        _key("resolution", "size", "GD", low=16, high=16384),
        _key("batch_size", "int", "GD", 1, low=1, high=65536, option="train_batch_size"),
        _key("enable_bucket", "bool", "GD", False),
        _key("min_bucket_reso", "int", "GD", 256, low=1, high=32768),
        _key("max_bucket_reso", "int", "GD", 1024, low=1, high=32768),
        _key("bucket_reso_steps", "int", "GD", 64, low=16, high=4096, multiple=16),
        _key("bucket_no_upscale", "bool", "GD", False),
        _key("network_multiplier", "float", "GD", 1.0, low=-1e6, option=None),
        _key("validation_split", "float", "GDS", 0.0, high=1),
        _key("validation_seed", "int", "GDS", low=-(2**63), high=2**64),
        _key("resize_interpolation", "str", "GDS", choices=INTERPOLATIONS),
        _key("exif_rotation", "bool", "GDS", False),
        _key("image_dir", "str", "S", option=None, filled=True),
        _key("metadata_file", "str", "S", option=None, filled=True),
        _key("conditioning_data_dir", "str", "S", option=None, filled=True),
        _key("is_reg", "bool", "S", False, option=None),
        _key("class_tokens", "str", "GDS", option=None),
        _key("caption_extension", "str", "GDS", filled=True),
        _key("cache_info", "bool", "GDS", False),
        _key("num_repeats", "int", "GDS", 1, high=100_000, option="dataset_repeats"),
        _key("shuffle_caption", "bool", "GDS", False),
        _key("caption_separator", "str", "GDS", ",", filled=True),
        _key("keep_tokens", "int", "GDS", 0),
        _key("keep_tokens_separator", "str", "GDS", ""),
        _key("secondary_separator", "str", "GDS"),
        _key("enable_wildcard", "bool", "GDS", False),
        _key("caption_prefix", "str", "GDS"),
        _key("caption_suffix", "str", "GDS"),
        _key("caption_dropout_rate", "float", "GDS", 0.0, high=1),
        _key("caption_dropout_every_n_epochs", "int", "GDS", 0),
        _key("caption_tag_dropout_rate", "float", "GDS", 0.0, high=1),
        _key("token_warmup_min", "int", "GDS", 1),
        _key("token_warmup_step", "float", "GDS", 0.0, high=1e9),
        _key("flip_aug", "bool", "GDS", False),
        _key("color_aug", "bool", "GDS", False),
        _key("random_crop", "bool", "GDS", False),
        _key("face_crop_aug_range", "range", "GDS", low=0.01, high=1000),
        _key("alpha_mask", "bool", "S", False),
        _key("custom_attributes", "table", "GDS", option=None),
    )
}

# Names that users of the command line expect here, whose spelling is too far for a guess.
OPTION_NAMES = {key.option: key.name for key in KEYS.values() if key.option} | {
    "caption_extention": "caption_extension",
    "repeats": "num_repeats",
}

_EXPECTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a text in quotes",
    "size": "a whole number or [width, height]",
    "range": "two numbers [smallest, largest]",
    "table": "a table",
}


def check_config(config: object, source: str) -> dict:
    """Check a whole dataset file and return it with normal types.

    Args:
        config: the parsed TOML or JSON.
        source: the file's name, for messages.
    Returns:
        {"general": {...}, "datasets": [{..., "subsets": [{...}, ...]}, ...]}; sizes as (w, h).
    Raises:
        UserError: an unknown key, a wrong type or a value out of range, with its path.
    """
    root = _table(config, source)
    for name in root:
        if name not in ("general", "datasets"):
            raise UserError(f"{source}: {_unknown(name, ('general', 'datasets'), 'G')}")
    general = _check_level(root.get("general", {}), "G", f"{source}: general")
    datasets = []
    for i, dataset in enumerate(_tables(root.get("datasets"), f"{source}: datasets")):
        where = f"{source}: datasets[{i}]"
        subsets = _tables(dataset.get("subsets"), f"{where}.subsets")
        own = _check_level({k: v for k, v in dataset.items() if k != "subsets"}, "D", where)
        own["subsets"] = [
            _check_level(subset, "S", f"{where}.subsets[{j}]") for j, subset in enumerate(subsets)
        ]
        datasets.append(own)
    return {"general": general, "datasets": datasets}


def check_value(key: Key, value: object, where: str) -> object:
    """The value of one key in its normal type (float, (w, h), tuple), or `UserError`."""
    check = {"bool": _bool, "int": _number, "float": _number, "str": _str}.get(key.kind)
    if check is not None:
        return check(key, value, where)
    return {"size": _size, "range": _range, "table": _free_table}[key.kind](key, value, where)


def _check_level(table: object, level: str, where: str) -> dict:
    checked = {}
    for name, value in _table(table, where).items():
        key = KEYS.get(name)
        if key is None:
            known = [k.name for k in KEYS.values() if level in k.levels]
            raise UserError(f"{where}: {_unknown(name, known, level)}")
        if level not in key.levels:
            right = " or ".join(LEVELS[letter] for letter in key.levels)
            raise UserError(
                f"{where}.{name}: this key does not belong in {LEVELS[level]}: move it to {right}"
            )
        checked[name] = check_value(key, value, f"{where}.{name}")
    return checked


def _unknown(name: object, known: object, level: str) -> str:
    name = _show(name, quote=False)
    if name in OPTION_NAMES and OPTION_NAMES[name] in known:
        near = [OPTION_NAMES[name]]
    else:
        near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    if near:
        return f"unknown key '{name}': did you mean '{near[0]}'?"
    place = "at the top" if set(known) == {"general", "datasets"} else f"in {LEVELS[level]}"
    return f"unknown key '{name}': remove it; the keys {place} are {', '.join(sorted(known))}"


def _tables(value: object, where: str) -> list:
    if value is None or value == []:
        raise UserError(
            f"{where} is missing: add at least one [[datasets]] with one [[datasets.subsets]] "
            "that names an image_dir"
        )
    if not isinstance(value, list):
        raise UserError(
            f"{where}: expected a list of tables, got {_show(value)}: write the header in double "
            "brackets, [[datasets]] or [[datasets.subsets]]"
        )
    return [_table(item, f"{where}[{i}]") for i, item in enumerate(value)]


def _table(value: object, where: str) -> Mapping:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected a table of keys and values, got {_show(value)}")
    return value


def _show(value: object, quote: bool = True) -> str:
    try:
        text = repr(value) if quote or not isinstance(value, str) else value
    # Python refuses to print numbers of thousands of digits.
    except ValueError:
        text = "a huge number"
    text = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    return text if len(text) <= 60 else text[:57] + "..."


def _wrong(key: Key, value: object, where: str) -> UserError:
    kind = {bool: "a boolean", str: "a text", dict: "a table"}.get(type(value), "")
    found = f"{_show(value)}, {kind}" if kind else _show(value)
    return UserError(f"{where}: expected {_EXPECTED[key.kind]}, got {found}")


def _bool(key: Key, value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(key, value, where)
    return value


def _number(key: Key, value: object, where: str) -> int | float:
    allowed = (int,) if key.kind == "int" else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise _wrong(key, value, where)
    if (isinstance(value, float) and not math.isfinite(value)) or not key.low <= value <= key.high:
        raise UserError(
            f"{where}: {_show(value)} is out of range: use a number from {key.low:g} to "
            f"{key.high:g}"
        )
    if key.multiple > 1 and value % key.multiple:
        raise UserError(
            f"{where}: {value} does not suit this model: use a multiple of {key.multiple}, "
            "such as 64"
        )
    return float(value) if key.kind == "float" else value


def _str(key: Key, value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(key, value, where)
    if key.filled and not value.strip("\n"):
        raise UserError(f"{where}: the text is empty: give it a value or remove the key")
    if key.choices and value not in key.choices:
        near = difflib.get_close_matches(value, key.choices, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"use one of {', '.join(key.choices)}"
        raise UserError(f"{where}: unknown value {_show(value)}: {hint}")
    return value


def _pair(value: object) -> list | None:
    """Two entries of a list, or of the command line's "a,b"; None for anything else."""
    if isinstance(value, str):
        value = re.split(r"[,x]", value)
        try:
            value = [float(part) if "." in part else int(part) for part in value]
        except ValueError:
            return None
        value = value * 2 if len(value) == 1 else value
    return list(value) if isinstance(value, (list, tuple)) and len(value) == 2 else None


def _size(key: Key, value: object, where: str) -> tuple[int, int]:
    is_single = isinstance(value, int) and not isinstance(value, bool)
    pair = [value, value] if is_single else _pair(value)
    if pair is None or any(isinstance(v, bool) or not isinstance(v, int) for v in pair):
        raise _wrong(key, value, where)
    if not all(key.low <= v <= key.high for v in pair):
        raise UserError(
            f"{where}: {_show(value)} is out of range: sides are {key.low} to {key.high} pixels"
        )
    return pair[0], pair[1]


def _range(key: Key, value: object, where: str) -> tuple[float, float]:
    pair = _pair(value)
    if pair is None or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in pair):
        raise _wrong(key, value, where)
    if not key.low <= pair[0] <= pair[1] <= key.high:
        raise UserError(
            f"{where}: {_show(value)} is not a range: give two numbers, the smaller first, "
            f"from {key.low:g} to {key.high:g}"
        )
    return float(pair[0]), float(pair[1])


def _free_table(key: Key, value: object, where: str) -> dict:
    if not isinstance(value, Mapping):
        raise _wrong(key, value, where)
    return dict(value)
