"""A dataset file of sd-scripts: our own form, so it is copied only where something must change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anima_fast.errors import UserError
from anima_fast.migrate.ledger import Ledger, flatten, is_rows
from anima_fast.migrate.paths import Paths
from anima_fast.migrate.source import parse_file
from anima_fast.options.dataset_keys import KEYS, check_value

ATTRIBUTES = "kept, but nothing reads it here: noise levels are drawn alike for all folders"
FOLDERS = ("image_dir", "metadata_file", "conditioning_data_dir")


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
    leaves = dict(flatten(config))
    named_folders = [v for k, v in leaves.items() if _last(k) in FOLDERS and isinstance(v, str)]
    paths = Paths.find(named_folders, [*folders, path.resolve().parent])
    trial = Ledger()
    trial.extend(config)
    _table(config, "", trial, paths)
    if trial.changed or trial.dropped:
        prefix = f"{path.name}: "
        ledger.extend(config, prefix)
        ledger.dataset = _table(config, prefix, ledger, paths)


def _table(table: Mapping[str, Any], prefix: str, ledger: Ledger, paths: Paths) -> dict[str, Any]:
    """A level of the file without what is unknown, its keys settled."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        if is_rows(value):
            found[key] = [_table(v, f"{name}[{i}].", ledger, paths) for i, v in enumerate(value)]
        elif isinstance(value, Mapping) and value and key not in KEYS:
            found[key] = _table(value, f"{name}.", ledger, paths)
        elif isinstance(value, Mapping):
            found[key] = dict(value)
            for leaf in ledger.open_keys(f"{name}."):
                ledger.explain(leaf, ATTRIBUTES)
            ledger.place(name, "the dataset file")
        else:
            found |= keep_key(name, key, value, ledger, paths)
    return found


def keep_key(
    name: str, key: str, value: Any, ledger: Ledger, paths: Paths, level: str = ""
) -> dict[str, Any]:
    """A key of a dataset, settled as `name`; nothing when it cannot stay.

    Args:
        level: G, D or S where the key must be one of that level of the file.
    """
    why = ""
    if key not in KEYS or level not in KEYS[key].levels:
        why = "a label of the window" if key == "name" else "no such key of a dataset here"
    else:
        try:
            check_value(KEYS[key], value, key)
        except UserError as error:
            why = str(error).removeprefix(f"{key}: ")
    if why:
        ledger.drop(name, why)
        return {}
    moved = ""
    if key in FOLDERS:
        value, moved = paths.resolve(value)
    if moved:
        ledger.explain(name, f"{value}: {moved}")
    ledger.place(name, f"{key} of the dataset")
    return {key: value}


def _last(key: str) -> str:
    return key.rsplit(".", 1)[-1]
