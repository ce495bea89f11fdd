"""A dataset file of sd-scripts: our own form, so it is copied only where something must change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anima_fast.errors import UserError
from anima_fast.migrate.ledger import Ledger, flatten
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
    if any(
        _reason(key, value) or _moved(key, value, paths)[1] or "custom_attributes." in key
        for key, value in leaves.items()
    ):
        prefix = f"{path.name}: "
        ledger.extend(config, prefix)
        ledger.dataset = _table(config, "", prefix, ledger, paths)


def _table(
    table: Mapping[str, Any], where: str, prefix: str, ledger: Ledger, paths: Paths
) -> dict[str, Any]:
    """A level of the file without what is unknown, its keys settled."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{where}{key}"
        if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            rows = enumerate(value)
            found[key] = [_table(v, f"{name}[{i}].", prefix, ledger, paths) for i, v in rows]
        elif isinstance(value, Mapping) and value and key not in KEYS:
            found[key] = _table(value, f"{name}.", prefix, ledger, paths)
        elif isinstance(value, Mapping) and value:
            found[key] = dict(value)
            for leaf, _ in flatten(value, f"{prefix}{name}."):
                ledger.change(leaf, None, None, ATTRIBUTES)
        elif reason := _reason(name, value):
            ledger.drop(f"{prefix}{name}", reason)
        else:
            found[key], why = _moved(name, value, paths)
            if why:
                ledger.change(f"{prefix}{name}", None, None, f"{found[key]}: {why}")
            else:
                ledger.take_elsewhere(f"{prefix}{name}", "the dataset file")
    return found


def _last(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _moved(key: str, value: Any, paths: Paths) -> tuple[Any, str]:
    if _last(key) in FOLDERS and isinstance(value, str):
        return paths.resolve(value)
    return value, ""


def _reason(key: str, value: Any) -> str:
    """Why a key cannot stay; "" when it can."""
    name = _last(key)
    if "custom_attributes" in key or value == {}:
        return ""
    if name not in KEYS:
        return "no such key of a dataset here"
    try:
        check_value(KEYS[name], value, name)
    except UserError as error:
        return str(error).removeprefix(f"{name}: ")
    return ""
