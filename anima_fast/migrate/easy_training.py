"""The TOML of LoRA_Easy_Training_Scripts: sd-scripts' options by the window's panels.

    [[subsets]]                      [optimizer_args.args]            [bucket_args.dataset_args]
    image_dir = "..."                optimizer_type = "..."           enable_bucket = true

`args` are options, `dataset_args` are keys of the dataset file, and a table inside `args` is a list
of key=value words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from anima_fast.migrate.ledger import Ledger, is_rows
from anima_fast.migrate.paths import Paths
from anima_fast.migrate.rows import Item
from anima_fast.migrate.sd_scripts_data import FOLDERS, keep_key
from anima_fast.options.network_args import LYCORIS

# A fraction of all steps has the same name here.
RENAMED = {"warmup_ratio": "lr_warmup_steps"}
LISTS = ("optimizer_args", "network_args", "lr_scheduler_args")


def is_easy(config: Mapping[str, Any]) -> bool:
    """Whether a file has this form."""
    panels = [value for value in config.values() if isinstance(value, Mapping)]
    return any("args" in panel or "dataset_args" in panel for panel in panels)


def easy_items(config: Mapping[str, Any], ledger: Ledger) -> list[Item]:
    """The options of all panels; settles what is not an option."""
    ledger.extend(config)
    items: dict[str, Item] = {}
    for panel, args in _panels(config, "args"):
        for key, value in args.items():
            name = f"{panel}.args.{key}"
            if key in LISTS and isinstance(value, Mapping):
                for leaf in ledger.open_keys(f"{name}."):
                    ledger.place(leaf, key)
                value, name = [f"{k}={_word(v)}" for k, v in value.items()], f"{name} (table)"
                ledger.extend({name: value} if value else {})
            if ledger.has(name) and key not in items:
                items[key] = Item(name, RENAMED.get(key, key), value)
    words = items["network_args"].value if "network_args" in items else []
    if "network_module" not in items and any(str(word).startswith("algo=") for word in words):
        # The window's backend does so too.
        module = "module of this algo"
        ledger.extend({module: LYCORIS})
        items["network_module"] = Item(module, "network_module", LYCORIS)
    return list(items.values())


def _panels(config: Mapping[str, Any], part: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for panel, tables in config.items():
        if isinstance(tables, Mapping) and isinstance(tables.get(part), Mapping):
            yield panel, tables[part]


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def easy_dataset(config: Mapping[str, Any], ledger: Ledger, folders: tuple[Path, ...]) -> None:
    """The subsets and all `dataset_args` as a dataset file; settles their keys."""
    rows = config.get("subsets")
    if not is_rows(rows):
        return
    paths = Paths.find([str(row.get(key, "")) for row in rows for key in FOLDERS], folders)
    general: dict[str, Any] = {}
    for panel, own in _panels(config, "dataset_args"):
        for key, value in own.items():
            general |= keep_key(f"{panel}.dataset_args.{key}", key, value, ledger, paths, "G")
    subsets: list[dict[str, Any]] = [{} for _ in rows]
    for i, row in enumerate(rows):
        for key, value in row.items():
            subsets[i] |= keep_key(f"subsets[{i}].{key}", key, value, ledger, paths, "S")
    ledger.dataset = {"general": general, "datasets": [{"subsets": subsets}]}
