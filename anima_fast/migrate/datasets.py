"""Dataset files: what trainers share, and sd-scripts' own, copied where it must change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from anima_fast.errors import UserError
from anima_fast.migrate.ledger import TAKEN, Ledger, flatten, is_rows
from anima_fast.migrate.paths import find_base, resolve
from anima_fast.migrate.source import parse_file
from anima_fast.options.dataset_keys import KEYS, check_value

ATTRIBUTES = "kept, but nothing reads it here: noise levels are drawn alike for all folders"
FOLDERS = ("image_dir", "metadata_file", "conditioning_data_dir")
STEP = 64


def dataset_entry(size: tuple[float, float], batch: int, ratios: Iterable[float]) -> dict[str, Any]:
    """The keys of a dataset at one resolution.

    Args:
        ratios: aspect ratios of the widest buckets; none where all images get the same shape.
    """
    side, roots = math.sqrt(size[0] * size[1]), [math.sqrt(ratio) for ratio in ratios]
    bucketed = bool(roots)
    if not bucketed:
        size = (max(16, round(size[0] / 16) * 16), max(16, round(size[1] / 16) * 16))
    resolution = size[0] if size[0] == size[1] else [*size]
    entry = {"resolution": resolution, "batch_size": batch, "enable_bucket": bucketed}
    if bucketed:
        sides = [*size, *(side * root for root in roots), *(side / root for root in roots)]
        entry["min_bucket_reso"] = max(STEP, int(min(sides)) // STEP * STEP)
        entry["max_bucket_reso"] = math.ceil(max(sides) / STEP) * STEP
    return entry


def joined(parts: Iterable[tuple[dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
    """Pairs of a dataset and a subset as datasets; those with the same keys become one."""
    datasets: dict[str, dict[str, Any]] = {}
    for entry, subset in parts:
        datasets.setdefault(repr(entry), {**entry, "subsets": []})["subsets"].append(subset)
    return [*datasets.values()]


def convert_dataset_file(ledger: Ledger, folders: tuple[Path, ...]) -> None:
    """Look into the dataset file that the options name, and correct a copy where it needs it.

    A relative path becomes absolute, a key that is unknown here is dropped, and one without effect
    is named. A file that needs none of it stays as it is, and its keys are not in the ledger.
    """
    named = ledger.options.get("dataset_config")
    if not named:
        return
    path = Path(named)
    if not path.is_file():
        ledger.todo.append(f"dataset_config {named} was not found here: see that the path is right")
        return
    config = parse_file(path)
    if not isinstance(config, Mapping) or not isinstance(config.get("datasets"), list):
        ledger.todo.append(f"dataset_config {named} has no [[datasets]]: training will refuse it")
        return
    leaves = [(key.rsplit(".", 1)[-1], value) for key, value in flatten(config)]
    paths = [value for key, value in leaves if key in FOLDERS and isinstance(value, str)]
    base = find_base(paths, [*folders, path.resolve().parent])
    trial = Ledger()
    trial.extend(config)
    keep_keys(config, "", trial, base)
    if any(entry.verdict != TAKEN for entry in trial.settled.values()):
        prefix = f"{path.name}: "
        ledger.extend(config, prefix)
        ledger.dataset = keep_keys(config, prefix, ledger, base)


def keep_keys(
    table: Mapping[str, Any], prefix: str, ledger: Ledger, base: Path | None, level: str = ""
) -> dict[str, Any]:
    """A table of a dataset file without what cannot stay, its keys settled.

    Args:
        prefix: what the keys begin with in the ledger.
        level: G, D or S where the keys must be ones of that level of the file.
    """
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        if is_rows(value):
            found[key] = [keep_keys(v, f"{name}[{i}].", ledger, base) for i, v in enumerate(value)]
        elif isinstance(value, Mapping) and value and key not in KEYS:
            found[key] = keep_keys(value, f"{name}.", ledger, base)
        elif isinstance(value, Mapping):
            found[key] = dict(value)
            ledger.place("the dataset file", *ledger.open_keys(f"{name}."), why=ATTRIBUTES)
            ledger.place("the dataset file", name)
        elif why := _wrong(key, value, level):
            ledger.drop(why, name)
        else:
            found[key], moved = resolve(value, base) if key in FOLDERS else (value, "")
            new = found[key] if moved else None
            ledger.place(f"{key} of the dataset", name, why=moved, new=new)
    return found


def _wrong(key: str, value: Any, level: str) -> str:
    """Why a key of a dataset cannot stay; "" where it can."""
    if key not in KEYS or level not in KEYS[key].levels:
        return "no such key of a dataset here"
    try:
        check_value(KEYS[key], value, key)
    except UserError as error:
        return str(error).removeprefix(f"{key}: ")
    return ""
