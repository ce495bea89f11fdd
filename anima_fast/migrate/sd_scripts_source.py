"""Where sd-scripts' options come from: words of a command line, a `--config_file`, the GUI's JSON.

A value of the command line beats the file's; of an option given twice there the last one counts.
"""

from __future__ import annotations

from typing import Any

from anima_fast.migrate import kohya_gui
from anima_fast.migrate.command import Launch, read_arguments
from anima_fast.migrate.easy_training import easy_dataset, easy_items, is_easy
from anima_fast.migrate.ledger import Ledger, flatten
from anima_fast.migrate.lora_scripts import join_fields
from anima_fast.migrate.paths import Paths
from anima_fast.migrate.sd_scripts import PATHS, Item, convert_options
from anima_fast.migrate.sd_scripts_data import convert_dataset_file
from anima_fast.migrate.sd_scripts_tables import SCRIPTS
from anima_fast.migrate.source import Source, check_model, find_config, parse_file
from anima_fast.options.declare import specs
from anima_fast.options.run import FinetuneOptions, TrainOptions


def convert(source: Source, ledger: Ledger) -> str:
    """Fill the ledger from a command line, a `--config_file`, or both; returns the command."""
    items = _items_of_launch(source.launch, ledger) if source.launch else []
    config, name = source.config, source.file.name if source.file else "the command line"
    given = {item.name: item for item in items}
    if source.launch and "config_file" in given:
        file = find_config(str(given["config_file"].value), source.folders)
        config, name = parse_file(file), file.name
    easy = is_easy(config)
    items += easy_items(config, ledger) if easy else _items_of_config(config, given, ledger, name)
    items = join_fields(items, ledger)
    values = {item.name: item.value for item in items}
    check_model(values | ({"qwen3": True} if source.launch else {}), name)
    if source.launch:
        command = SCRIPTS[source.launch.name]
    else:
        lora = any(key.startswith("network_") for key in values)
        command = (
            "train"
            if lora and "finetune" not in str(values.get("model_train_type"))
            else "finetune"
        )
    paths = Paths.find(_path_texts(items), source.folders)
    convert_options(items, ledger, paths, command)
    if easy:
        easy_dataset(config, ledger, source.folders)
    convert_dataset_file(ledger, source.folders)
    return command


def _items_of_launch(launch: Launch, ledger: Ledger) -> list[Item]:
    known = {**specs(TrainOptions), **specs(FinetuneOptions)}
    given, stray = read_arguments(launch.arguments, known)
    items = []
    for option in given:
        spec = known.get(option.name)
        value = list(option.words) if spec is not None and spec.is_list else option.value
        ledger.extend({option.label: value})
        if option.name:
            items.append(Item(option.label, option.name, value))
        else:
            ledger.drop(option.label, "given again further on: the last one counts")
    for i, word in enumerate(stray):
        ledger.extend({f"word {i + 1}": word})
        ledger.drop(f"word {i + 1}", "it belongs to no option")
    return items


def _items_of_config(
    config: dict[str, Any], given: dict[str, Item], ledger: Ledger, name: str
) -> list[Item]:  # fmt: skip
    """The keys of a `--config_file`, whose sections mean nothing."""
    ledger.extend(config)
    items: dict[str, Item] = {}
    for key, _ in flatten(config):
        option = key.rsplit(".", 1)[-1].replace("-", "_")
        if option in given:
            ledger.drop(key, f"the command line's --{option} beats {name}")
        elif option in items:
            ledger.drop(key, "it stands in two sections: the first one is taken")
        else:
            items[option] = Item(key, option, ledger.get(key))
    return list(items.values())


def convert_gui(source: Source, ledger: Ledger) -> str:
    """The same for a file that kohya_ss' GUI saved."""
    command, items = kohya_gui.items(source.config, ledger)
    paths = Paths.find(_path_texts(items), source.folders)
    convert_options(items, ledger, paths, command)
    convert_dataset_file(ledger, source.folders)
    return command


def _path_texts(items: list[Item]) -> list[str]:
    values = [item.value for item in items if item.name in PATHS]
    return [
        text for value in values for text in ([value] if isinstance(value, str) else value or [])
    ]
