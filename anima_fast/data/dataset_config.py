"""Dataset files and the settings they resolve to.

A dataset file (TOML, or JSON of the same structure) has defaults in `[general]`, one
`[[datasets]]` for each resolution and batch size, and in it one `[[datasets.subsets]]` for each
folder or metadata file. A value is looked up in the order subset, dataset, general, command line,
built-in default. `options/dataset_keys.py` says which keys exist.

Without a file the same settings come from `train_data_dir` / `reg_data_dir` (folders named
"N_class") or `in_json` (one metadata file).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anima_fast.data import layouts
from anima_fast.data.buckets import TOKEN_PIXELS, adjust_limits, fit_defaults
from anima_fast.data.subset import Dataset, Subset
from anima_fast.errors import UserError
from anima_fast.files import parse_config, read_text
from anima_fast.options.data import CacheOptions
from anima_fast.options.dataset_keys import (
    KEYS,
    DatasetKeys,
    Key,
    SubsetKeys,
    check_config,
    check_value,
)
from anima_fast.options.declare import specs
from anima_fast.options.rules import check_cacheable
from anima_fast.options.run import AnyRun


def load_dataset_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A dataset file as {"general": {...}, "datasets": [{..., "subsets": [...]}]}.

    Values are checked and normal. Raises `UserError` for a file, a key or a value that is wrong.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(
            f"{path} is a folder, expected a dataset configuration (.toml or .json); folders named "
            "like '10_name' are read with --train_data_dir"
        )
    kind = {".toml": "TOML", ".json": "JSON"}.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path}: a dataset configuration is a .toml or a .json file: rename it")
    config = parse_config(read_text(path, "dataset configuration"), path, kind)
    return check_config(config, path.name)


def resolve_datasets(options: AnyRun) -> tuple[list[Dataset], list[str]]:
    """The datasets that the options ask for, with notices for the user.

    Raises `UserError` when no data is named or a setting cannot work.
    """
    notices: list[str] = []
    if options.dataset_config:
        config = load_dataset_config(options.dataset_config)
    else:
        config = _config_of_folders(options, notices)
    datasets = [
        _resolve_dataset(i, entry, config["general"], options, notices)
        for i, entry in enumerate(config["datasets"])
    ]
    return datasets, notices


def _config_of_folders(options: AnyRun, notices: list[str]) -> dict[str, Any]:
    """The folder options as a configuration."""
    masks = options.conditioning_data_dir
    shared = {"conditioning_data_dir": masks} if masks else {}
    if options.in_json:
        subsets = [{"metadata_file": options.in_json}]
        if options.train_data_dir:
            subsets[0]["image_dir"] = options.train_data_dir
    elif options.train_data_dir:
        subsets = layouts.class_folders(Path(options.train_data_dir), notices)
    else:
        raise UserError(
            "no training data: give --dataset_config FILE.toml, or --train_data_dir with folders "
            "named like '10_name'"
        )
    subsets = [subset | shared for subset in subsets]
    if options.reg_data_dir and options.in_json:
        notices.append("reg_data_dir ignored: in_json is given")
    elif options.reg_data_dir:
        reg = layouts.class_folders(Path(options.reg_data_dir), notices)
        subsets += [subset | {"is_reg": True} for subset in reg]
    return {"general": {}, "datasets": [{"subsets": subsets}]}


def _lookup(cls: type, levels: Sequence[Mapping[str, Any]], options: AnyRun) -> dict[str, Any]:
    """The value of each key: from the first level that has it, else the option's or the default."""
    values = {}
    for name, spec in specs(cls).items():
        level = next((level for level in levels if name in level), None)
        given = getattr(options, KEYS[name].option) if KEYS[name].option else None
        if level is not None:
            values[name] = level[name]
        # An option that is switched off or left empty is the same as one not given.
        elif given is None or given == "" or given is False:
            values[name] = spec.default
        else:
            values[name] = check_value(KEYS[name], given, f"--{KEYS[name].option}")
    return values


def _resolve_dataset(
    index: int,
    entry: Mapping[str, Any],
    general: Mapping[str, Any],
    options: AnyRun,
    notices: list[str],
) -> Dataset:
    where = f"datasets[{index}]"
    values = _lookup(DatasetKeys, [entry, general], options)
    if values["resolution"] is None:
        raise UserError(
            f"{where}: resolution is missing: add `resolution = 1024` to [general] or "
            "[[datasets]], or give --resolution=1024"
        )
    if values["enable_bucket"]:
        given = {n for n in values if n in entry or n in general or _is_set(KEYS[n], options)}
        notices += fit_defaults(values, given, where)
        notices += adjust_limits(values, where)
    elif any(side % TOKEN_PIXELS for side in values["resolution"]):
        raise UserError(
            f"{where}: resolution {values['resolution']} is not a multiple of {TOKEN_PIXELS} on "
            "both sides: change it or set enable_bucket = true"
        )
    subsets = [
        _resolve_subset(index, j, [subset, entry, general], options)
        for j, subset in enumerate(entry["subsets"])
    ]
    if len({subset.metadata_file is None for subset in subsets}) > 1:
        raise UserError(
            f"{where}: subsets with metadata_file and subsets with caption files are mixed: put "
            "them into two [[datasets]]"
        )
    kept = _without_duplicates(subsets, where, notices)
    return Dataset(index=index, subsets=tuple(kept), **values)


def _is_set(key: Key, options: AnyRun) -> bool:
    """Whether the command line gives a key a value other than its default."""
    return bool(key.option) and getattr(options, key.option) != key.spec.default


def _resolve_subset(
    dataset_index: int, index: int, levels: Sequence[Mapping[str, Any]], options: AnyRun
) -> Subset:
    """Refuses settings that contradict the caches or each other."""
    values = _lookup(SubsetKeys, levels, options)
    subset = Subset(index=index, dataset_index=dataset_index, **values)
    if subset.image_dir is None and subset.metadata_file is None:
        raise UserError(
            f"{subset.where}: image_dir is missing: name the folder with the images "
            "(or a metadata_file)"
        )
    extension = subset.caption_extension or ""
    if any(c in extension for c in '/\\\0:*?"<>|'):
        raise UserError(
            f"{subset.where}: caption_extension {extension!r} is not the end of a file name: use "
            "'.txt' or '.caption'"
        )
    check_cacheable(
        vars(subset),
        latents=caches_latents(options),
        text=caches_text(options),
        place=f"{subset.where}: ",
    )
    return subset


def caches_latents(options: CacheOptions) -> bool:
    """Whether either latent cache is asked for."""
    return options.cache_latents or options.cache_latents_to_disk


def caches_text(options: CacheOptions) -> bool:
    """Whether either text cache is asked for."""
    return options.cache_text_encoder_outputs or options.cache_text_encoder_outputs_to_disk


def _without_duplicates(subsets: list[Subset], where: str, notices: list[str]) -> list[Subset]:
    """Drop subsets whose folder or metadata file came before, and those of 0 repeats."""
    seen, kept = set(), []
    for subset in subsets:
        source = subset.metadata_file or subset.image_dir or ""
        name = os.path.normcase(os.path.abspath(source.replace("\0", "?")))
        if name in seen:
            notices.append(f"{where}: {source} is named twice: its second subset is ignored")
        elif subset.num_repeats == 0:
            notices.append(f"{subset.where}: {source} is ignored: num_repeats is 0")
        else:
            seen.add(name)
            kept.append(subset)
    return kept
