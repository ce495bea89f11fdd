"""The keys of a dataset file: where each may stand, and the check of a whole file.

`DatasetKeys` and `SubsetKeys` inherit the keys that are options too, so that type, default, limits
and help are declared once. The check is strict, because a mistyped key that is silently ignored
costs a training run: an unknown key stops the program with its place and the nearest known key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from anima_fast.errors import UserError
from anima_fast.options import declare
from anima_fast.options.data import (
    BucketKeys,
    CaptionKeys,
    DatasetOptions,
    ImageOptions,
    MaskOptions,
    PixelKeys,
)
from anima_fast.options.declare import Spec, nearest, specs
from anima_fast.options.kinds import shown
from anima_fast.options.output import ValidationOptions

LEVELS = {"G": "[general]", "D": "[[datasets]]", "S": "[[datasets.subsets]]"}


def _key(default: Any, help: str, **limits: Any) -> Any:
    """A key that is not an option."""
    made = declare.option("Dataset file", default, help, **limits)
    # A table cannot be hashed.
    hashed = False if limits.get("kind") == "table" else None
    return dataclasses.field(default=default, hash=hashed, metadata={**made.metadata, "option": ""})


def _as_option(group: type, option: str, **limits: Any) -> Any:
    """A key with the default, limits and help of an option whose name, type or limits differ."""
    found = next(field for field in dataclasses.fields(group) if field.name == option)
    metadata = {**found.metadata, "kind": None, "option": option, **limits}
    return dataclasses.field(default=found.default, metadata=metadata)


@dataclass(frozen=True)
class DatasetKeys(BucketKeys):
    """Keys of `[general]` and `[[datasets]]`: one resolution and batch size."""

    resolution: tuple[int, int] = _as_option(DatasetOptions, "resolution")
    skip_image_resolution: tuple[int, int] | None = _as_option(
        DatasetOptions, "skip_image_resolution"
    )
    # Files of other trainers have smaller ones, which are rounded up.
    min_bucket_reso: int = _as_option(BucketKeys, "min_bucket_reso", low=1)
    max_bucket_reso: int = _as_option(BucketKeys, "max_bucket_reso", low=1)
    batch_size: int = _as_option(DatasetOptions, "train_batch_size")
    network_multiplier: float = _key(
        1.0, "Strength of the network while it trains on this dataset.", low=-1e6, high=1e6
    )


@dataclass(frozen=True)
class SubsetKeys(PixelKeys, CaptionKeys):
    """Keys of `[[datasets.subsets]]`: one folder or metadata file."""

    image_dir: str | None = _key(None, "Folder with the images.")
    metadata_file: str | None = _key(None, "Metadata file with captions.")
    conditioning_data_dir: str | None = _key(None, "Folder with masks.")
    is_reg: bool = _key(False, "Regularisation images.")
    class_tokens: str | None = _key(None, "Caption of images that have none.")
    cache_info: bool = _as_option(DatasetOptions, "cache_info")
    num_repeats: int = _as_option(DatasetOptions, "dataset_repeats")
    face_crop_aug_range: tuple[float, float] | None = _as_option(
        ImageOptions, "face_crop_aug_range"
    )
    alpha_mask: bool = _as_option(MaskOptions, "alpha_mask")
    validation_split: float = _as_option(ValidationOptions, "validation_split")
    validation_seed: int | None = _as_option(ValidationOptions, "validation_seed")
    custom_attributes: Mapping[str, Any] | None = _key(
        None, "Accepted; has no effect.", kind="table"
    )


# Subset keys that are not inherited from [general] or [[datasets]].
OF_ONE_SUBSET = ("image_dir", "metadata_file", "conditioning_data_dir", "is_reg", "alpha_mask")
# Texts that would have no meaning when empty.
FILLED = (*OF_ONE_SUBSET[:3], "caption_extension", "caption_separator")


@dataclass(frozen=True)
class Key:
    """One key: `levels` are letters of `LEVELS`, `option` the option of its default or ""."""

    spec: Spec
    levels: str
    option: str


def _keys(cls: type, levels: str) -> dict[str, Key]:
    options = {f.name: f.metadata.get("option", f.name) for f in dataclasses.fields(cls)}
    return {
        name: Key(spec, "S" if name in OF_ONE_SUBSET else levels, options[name])
        for name, spec in specs(cls).items()
    }


KEYS = {**_keys(DatasetKeys, "GD"), **_keys(SubsetKeys, "GDS")}

# Names that users of the command line expect here, whose spelling is too far off for a guess.
OPTION_NAMES = {key.option: name for name, key in KEYS.items() if key.option} | {
    "caption_extention": "caption_extension",
    "repeats": "num_repeats",
}


def check_config(config: object, source: str) -> dict[str, Any]:
    """A parsed dataset file, checked and with normal types (sizes as (w, h)).

    Returns {"general": {...}, "datasets": [{..., "subsets": [{...}, ...]}, ...]}. Raises
    `UserError` with the path in `source` of an unknown key, a wrong type or a value out of range.
    """
    root = _table(config, source)
    for name in root:
        if name not in ("general", "datasets"):
            raise UserError(f"{source}: {_unknown(name, ('general', 'datasets'), 'at the top')}")
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


def check_value(key: Key, value: object, where: str) -> Any:
    """The value of one key in its normal type (float, (w, h), tuple), or `UserError`."""
    if key.spec.name in FILLED and isinstance(value, str) and not value.strip("\n"):
        raise UserError(f"{where}: the text is empty: give it a value or remove the key")
    return declare.check_value(key.spec, value, where)


def _check_level(table: object, level: str, where: str) -> dict[str, Any]:
    checked = {}
    for name, value in _table(table, where).items():
        key = KEYS.get(name)
        if key is None:
            known = [name for name, key in KEYS.items() if level in key.levels]
            raise UserError(f"{where}: {_unknown(name, known, f'in {LEVELS[level]}')}")
        if level not in key.levels:
            right = " or ".join(LEVELS[letter] for letter in key.levels)
            raise UserError(
                f"{where}.{name}: this key does not belong in {LEVELS[level]}: move it to {right}"
            )
        checked[name] = check_value(key, value, f"{where}.{name}")
    return checked


def _unknown(name: str, known: Collection[str], place: str) -> str:
    near = nearest(name, known, f"remove it; the keys {place} are {', '.join(sorted(known))}")
    if OPTION_NAMES.get(name) in known:
        near = f"did you mean {OPTION_NAMES[name]!r}?"
    return f"unknown key {shown(name)}: {near}"


def _tables(value: object, where: str) -> list[Mapping[str, Any]]:
    if value is None or value == []:
        raise UserError(
            f"{where} is missing: add at least one [[datasets]] with one [[datasets.subsets]] "
            "that names an image_dir"
        )
    if not isinstance(value, list):
        raise UserError(
            f"{where}: expected a list of tables, got {shown(value)}: write the header in double "
            "brackets, [[datasets]] or [[datasets.subsets]]"
        )
    return [_table(item, f"{where}[{i}]") for i, item in enumerate(value)]


def _table(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected a table of keys and values, got {shown(value)}")
    return value
