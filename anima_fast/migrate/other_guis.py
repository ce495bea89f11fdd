"""Files of other GUIs of sd-scripts: LoRA_Easy_Training_Scripts' panels, lora-scripts' fields.

    [[subsets]]                      [optimizer_args.args]            [bucket_args.dataset_args]
    image_dir = "..."                optimizer_type = "..."           enable_bucket = true

`args` are options, `dataset_args` are keys of the dataset file, and a table inside `args` is a list
of key=value words. lora-scripts has options of its own for LyCORIS and for one preview.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from anima_fast.migrate.command import Item, Items, join
from anima_fast.migrate.datasets import FOLDERS, keep_keys
from anima_fast.migrate.ledger import OFF, Ledger, is_off, is_rows
from anima_fast.migrate.paths import find_base
from anima_fast.options.network_args import LYCORIS

# A fraction of all steps has the same name here.
RENAMED = {"warmup_ratio": "lr_warmup_steps"}
LISTS = ("optimizer_args", "network_args", "lr_scheduler_args")

PREVIEW_TIMES = ("sample_at_first", "sample_every_n_steps", "sample_every_n_epochs")
# lora-scripts' fields -> words of network_args, and marks of a preview's prompt.
LYCORIS_WORDS = {"lycoris_algo": "algo", "lokr_factor": "factor", "full_matrix": "full_matrix"}
PREVIEW_WORDS = {
    "negative_prompts": "--n", "sample_width": "--w", "sample_height": "--h", "sample_cfg": "--l",
    "sample_steps": "--s", "sample_seed": "--d",
}  # fmt: skip


def is_easy(config: Mapping[str, Any]) -> bool:
    """Whether a file has LoRA_Easy_Training_Scripts' form."""
    panels = [value for value in config.values() if isinstance(value, Mapping)]
    return any("args" in panel or "dataset_args" in panel for panel in panels)


def easy_items(config: Mapping[str, Any], ledger: Ledger) -> Items:
    """The options of all panels; settles what is not an option."""
    ledger.extend(config)
    items: Items = {}
    for panel, args in _panels(config, "args"):
        for key, value in args.items():
            name = f"{panel}.args.{key}"
            if key in LISTS and isinstance(value, Mapping):
                ledger.place(key, *ledger.open_keys(f"{name}."))
                value, name = [f"{k}={_word(v)}" for k, v in value.items()], f"{name} (table)"
                ledger.extend({name: value} if value else {})
            if ledger.has(name):
                items.setdefault(RENAMED.get(key, key), Item(name, value))
    words = items["network_args"].value if "network_args" in items else []
    if "network_module" not in items and any(str(word).startswith("algo=") for word in words):
        # The window's backend does so too.
        join(items, ledger, (), "network_module", LYCORIS, "module of this algo")
    return items


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
    base = find_base([str(row.get(key, "")) for row in rows for key in FOLDERS], folders)
    general: dict[str, Any] = {}
    for panel, own in _panels(config, "dataset_args"):
        general |= keep_keys(own, f"{panel}.dataset_args.", ledger, base, "G")
    subsets = [keep_keys(row, f"subsets[{i}].", ledger, base, "S") for i, row in enumerate(rows)]
    ledger.dataset = {"general": general, "datasets": [{"subsets": subsets}]}


def join_fields(items: Items, ledger: Ledger) -> None:
    """Put lora-scripts' fields together into options; files without them stay as they are."""
    fields = [n for n in LYCORIS_WORDS if n in items and not is_off(items[n].value)]
    if fields and "network_module" in items and items["network_module"].value == LYCORIS:
        words = [f"{LYCORIS_WORDS[name]}={items[name].value}" for name in fields]
        if "network_args" in items:
            args = items["network_args"].value or []
            words += [args] if isinstance(args, str) else args
        join(items, ledger, [*fields, "network_args"], "network_args", words, "fields of LyCORIS")
    marks = [name for name in PREVIEW_WORDS if name in items]
    switch, prompt = items.get("enable_preview"), items.get("positive_prompts")
    if switch is not None and is_off(switch.value):
        for name in filter(items.__contains__, (*marks, "positive_prompts", *PREVIEW_TIMES)):
            ledger.drop(OFF, items.pop(name).key)
    elif prompt is not None and prompt.value:
        words = [
            f"{PREVIEW_WORDS[name]} {items[name].value}"
            for name in marks
            if items[name].value not in ("", 0)
        ]
        fields = [*marks, "positive_prompts", "enable_preview"]
        text = " ".join([str(prompt.value), *words])
        join(items, ledger, fields, "sample_prompt", [text], "fields of the preview")
