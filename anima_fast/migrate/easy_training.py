"""The TOML of LoRA_Easy_Training_Scripts: sd-scripts' options by the window's panels.

    [[subsets]]                      [optimizer_args.args]            [bucket_args.dataset_args]
    image_dir = "..."                optimizer_type = "..."           enable_bucket = true

`args` are options, `dataset_args` are keys of the dataset file, and a table inside `args` is a list
of key=value words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anima_fast.migrate.ledger import Ledger, flatten
from anima_fast.migrate.paths import Paths
from anima_fast.migrate.sd_scripts import Item
from anima_fast.migrate.sd_scripts_data import FOLDERS
from anima_fast.options.dataset_keys import KEYS
from anima_fast.options.network_args import LYCORIS

# A fraction of all steps has the same name here.
RENAMED = {"warmup_ratio": "lr_warmup_steps"}
LISTS = ("optimizer_args", "network_args", "lr_scheduler_args")


def is_easy(config: Mapping[str, Any]) -> bool:
    """Whether a file has this form."""
    panels = [value for value in config.values() if isinstance(value, Mapping)]
    return any("args" in panel or "dataset_args" in panel for panel in panels)


def easy_items(config: Mapping[str, Any], ledger: Ledger) -> list[Item]:
    """The options of all panels; settles what is no option."""
    ledger.extend(config)
    items: dict[str, Item] = {}
    for panel, tables in config.items():
        if not isinstance(tables, Mapping) or not isinstance(tables.get("args"), Mapping):
            continue
        for key, value in tables["args"].items():
            name = f"{panel}.args.{key}"
            if key in LISTS and isinstance(value, Mapping):
                words = [f"{k}={_word(v)}" for k, v in value.items()]
                for leaf, _ in flatten(value, f"{name}."):
                    ledger.take_elsewhere(leaf, key)
                if words:
                    ledger.extend({f"{name} (table)": words})
                    items[key] = Item(f"{name} (table)", key, words)
            elif ledger.has(name) and key not in items:
                items[key] = Item(name, RENAMED.get(key, key), value)
    if "network_module" not in items and "algo" in _network_words(config):
        # The window's backend does so too.
        module = "module of this algo"
        ledger.extend({module: LYCORIS})
        items["network_module"] = Item(module, "network_module", LYCORIS)
    return list(items.values())


def _network_words(config: Mapping[str, Any]) -> Mapping[str, Any]:
    args = config.get("network_args", {}).get("args", {})
    words = args.get("network_args") if isinstance(args, Mapping) else None
    return words if isinstance(words, Mapping) else {}


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def easy_dataset(config: Mapping[str, Any], ledger: Ledger, folders: tuple) -> None:
    """The subsets and all `dataset_args` as a dataset file; settles their keys."""
    rows = config.get("subsets")
    if not isinstance(rows, list):
        return
    texts = [str(row.get(key, "")) for row in rows for key in FOLDERS]
    paths = Paths.find(texts, folders)
    general: dict[str, Any] = {}
    for panel, tables in config.items():
        own = tables.get("dataset_args") if isinstance(tables, Mapping) else None
        if isinstance(own, Mapping):
            general |= _keys(own, f"{panel}.dataset_args.", "G", ledger, paths)
    subsets = [
        _keys(row, f"subsets[{i}].", "S", ledger, paths)
        for i, row in enumerate(rows)
        if isinstance(row, Mapping)
    ]
    ledger.dataset = {"general": general, "datasets": [{"subsets": subsets}]}


def _keys(
    table: Mapping[str, Any], prefix: str, level: str, ledger: Ledger, paths: Paths
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        if not ledger.has(name):
            continue
        if key not in KEYS or level not in KEYS[key].levels:
            why = "a label of the window" if key == "name" else "no such key of a dataset here"
            ledger.drop(name, why)
            continue
        found[key], why = paths.resolve(value) if key in FOLDERS else (value, "")
        if why:
            ledger.change(name, None, None, f"{found[key]}: {why}")
        else:
            ledger.take_elsewhere(name, f"{key} of the dataset")
    return found
