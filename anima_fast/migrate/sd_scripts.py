"""sd-scripts' options as ours: they have the same names, so this is about what differs.

They come from the words of a command line, a `--config_file` or a file of a window, and a value of
the command line beats the file's. Values are checked as ours are. An option without a counterpart
is dropped with its reason, and another trainer's default that is not ours is written down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from anima_fast.errors import UserError
from anima_fast.migrate import kohya_gui
from anima_fast.migrate import sd_scripts_tables as tables
from anima_fast.migrate.command import read_arguments
from anima_fast.migrate.easy_training import easy_dataset, easy_items, is_easy
from anima_fast.migrate.ledger import Ledger, flatten, is_off
from anima_fast.migrate.lora_scripts import PREVIEW_TIMES, join_fields
from anima_fast.migrate.paths import PATHS, Paths
from anima_fast.migrate.rows import CLASSES, Item, given
from anima_fast.migrate.sd_scripts_data import convert_dataset_file
from anima_fast.migrate.shell import variable_names
from anima_fast.migrate.source import ONLY, SCRIPTS, Source, find_file, other_model, parse_file
from anima_fast.options.declare import convert as checked
from anima_fast.options.declare import specs
from anima_fast.options.files import refused
from anima_fast.options.network_args import LYCORIS, parse_network_args
from anima_fast.options.other_names import ALIASES, IGNORED

WARMUP = "a warm-up is given, which constant does not have: sd-scripts stops at that"
# Packages whose classes are here; an optimizer without a dot has a name of its own.
HERE = ("torch", "bitsandbytes", "transformers")
PREVIEWS = "a prompt without size and guidance gets 1024x1024 and 4 here, 512x512 and 7.5 there"


def convert(source: Source, ledger: Ledger) -> str:
    """Fill the ledger from a command line, a file of options, or both.

    Returns:
        the command here, `train` or `finetune`.
    Raises:
        UserError: another model, a value that sd-scripts would refuse too, or a network that does
            not exist here.
    """
    config: Mapping[str, Any] = source.config
    if source.trainer == "kohya-gui":
        command, items = kohya_gui.items(config, ledger)
    else:
        config, items = _items(source, ledger)
        command = SCRIPTS[source.launch.name] if source.launch else _command(items)
    ledger.paths = Paths.find(_path_texts(items), source.folders)
    _Converter(items, ledger, command).convert()
    if is_easy(config):
        easy_dataset(config, ledger, source.folders)
    convert_dataset_file(ledger, source.folders)
    return command


def _items(source: Source, ledger: Ledger) -> tuple[Mapping[str, Any], list[Item]]:
    """The options, and the file that they come from beside the command line."""
    items = read_arguments(source.launch.arguments, ledger) if source.launch else []
    config, name = source.config, source.file.name if source.file else "the command line"
    by_name = {item.name: item for item in items}
    if source.launch and "config_file" in by_name:
        text = str(by_name["config_file"].value)
        # sd-scripts appends the ending where it is missing.
        file = find_file(text if text.endswith(".toml") else f"{text}.toml", source.folders)
        config, name = parse_file(file), file.name
    if is_easy(config):
        items += easy_items(config, ledger)
    else:
        items += _items_of_config(config, by_name, ledger, name)
    items = join_fields(items, ledger)
    # A script says that it is for Anima by its name.
    values = {"qwen3": source.launch, **{item.name: item.value for item in items}}
    _check_model(values, name)
    return config, items


def _items_of_config(
    config: Mapping[str, Any], by_name: Mapping[str, Item], ledger: Ledger, name: str
) -> list[Item]:
    """The keys of a `--config_file`, whose sections mean nothing."""
    ledger.extend(config)
    items: dict[str, Item] = {}
    for key, value in flatten(config):
        option = key.rsplit(".", 1)[-1].replace("-", "_")
        if option in by_name:
            ledger.drop(key, f"the command line's --{option} beats {name}")
        elif option in items:
            ledger.drop(key, "it stands in two sections: the first one is taken")
        else:
            items[option] = Item(key, option, value)
    return list(items.values())


def _command(items: list[Item]) -> str:
    lora = any(item.name.startswith("network_") for item in items)
    whole = any(i.name == "model_train_type" and "finetune" in str(i.value) for i in items)
    return "train" if lora and not whole else "finetune"


def _check_model(values: Mapping[str, Any], name: str) -> None:
    """Refuse a file for another model by that model's name, or because nothing says Anima."""
    module = str(values.get("network_module") or "")
    kind = str(values.get("model_train_type") or "")
    if kind and not kind.startswith("anima"):
        raise UserError(f"{name} is for {kind}: {ONLY}")
    if model := _model_of(module):
        raise UserError(f"{name} trains {model} ({module}): {ONLY}")
    encoders = ("qwen3", "qwen3_path", "qwen", "llm_adapter_path")
    if module == "networks.lora_anima" or kind or any(values.get(key) for key in encoders):
        return
    for key, model in tables.OTHER_MODEL_KEYS.items():
        if values.get(key):
            raise UserError(f"{name} is for {model} ({key} is set): {ONLY}")
    raise UserError(
        f"{name} does not name the text encoder (qwen3), as every configuration for Anima does: "
        "add it, or give the whole command line"
    )


def _model_of(module: str) -> str:
    """The other model that a network module is for; "" for none."""
    lora, _, name = module.partition("networks.lora_")
    return tables.OTHER_MODULES.get(module) or ("" if lora or not name else other_model(name))


def _path_texts(items: list[Item]) -> list[str]:
    values = [item.value for item in items if item.name in PATHS]
    return [
        text for value in values for text in ([value] if isinstance(value, str) else value or [])
    ]


class _Converter:
    """Settles the options of a source, each of which may depend on the others."""

    def __init__(self, items: list[Item], ledger: Ledger, command: str) -> None:
        self.items, self.ledger = items, ledger
        self.known, self.refused = specs(CLASSES[command]), refused(CLASSES[command])
        self.given = {tables.OTHER_NAMES.get(item.name, item.name): item for item in items}
        self.special: dict[str, Callable[[Item], None]] = {
            "network_args": self._network_args,
            "lr_scheduler": self._lr_scheduler,
            "output_name": self._output_name,
            **dict.fromkeys(PREVIEW_TIMES, self._preview_time),
        }
        self.folder = ""

    def convert(self) -> None:
        for item in self.items:
            self._one(item, tables.OTHER_NAMES.get(item.name, item.name))
        self._after()
        self._defaults()

    def value(self, name: str) -> Any:
        """What the source gives an option; None when it is not given."""
        return self.given[name].value if name in self.given else None

    def _one(self, item: Item, name: str) -> None:
        if name in tables.DROPPED and not (name == "resume" and item.value == "auto"):
            self.ledger.drop(item.key, tables.DROPPED[name])
        elif name == "torch_compile" and not is_off(item.value):
            why = "blocks are compiled one by one instead of the whole model"
            self.ledger.take(item.key, "compile", True, why)
        elif name in self.special and name not in self.refused:
            self.special[name](item)
        elif name in self.known:
            self._option(item, name)
        elif is_off(item.value):
            return
        elif name in ALIASES:
            self._alias(item, name)
        elif reason := self.refused.get(name) or IGNORED.get(name):
            self.ledger.drop(item.key, reason)
        else:
            near = get_close_matches(name, [*self.known, *ALIASES], 1, 0.9)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            self.ledger.drop(item.key, f"no such option here{hint}")

    def _alias(self, item: Item, name: str) -> None:
        alias = ALIASES[name]
        if self.value(alias.target):
            self.ledger.drop(item.key, f"{alias.target} is given, and beats it")
        else:
            self.ledger.take(item.key, alias.target, alias.value or item.value)

    def _option(self, item: Item, name: str) -> None:
        """An option of the same name; what says nothing stays open, and is off."""
        spec = self.known[name]
        value = given(spec, item.value)
        if value is None:
            return
        unset = [] if spec.kind == "str" or spec.is_list else variable_names(str(value))
        if unset:
            self.ledger.drop(item.key, f"${unset[0]} is of your shell")
            self.ledger.todo.append(f"write {name} into the file: ${unset[0]} is of your shell")
            return
        if name in ("train_data_dir", "reg_data_dir", "in_json") and self.value("dataset_config"):
            self.ledger.drop(item.key, "dataset_config is given, and beats it there too")
            return
        new, why = tables.OTHER_VALUES.get((item.name, str(value)), (value, ""))
        if name == "network_module":
            new, why = self._network_module(str(value))
        if spec.choices and new not in spec.choices:
            self.ledger.drop(item.key, f"{new} is not one of {', '.join(spec.choices)}")
            default = f"the default, {spec.default}," if spec.default else "nothing"
            self.ledger.todo.append(
                f"choose {name}: {new} does not exist here, and {default} is set"
            )
            return
        new = checked(spec, new, item.key, text=True)
        self._check_class(name, new)
        if new != tables.LIMITS.get(name, new):
            why = "it had no effect on Anima there, and limits the noise levels here"
        if name == "sample_prompts":
            why = PREVIEWS
        self.ledger.take(item.key, name, list(new) if isinstance(new, tuple) else new, why)

    def _check_class(self, name: str, value: Any) -> None:
        """To do for an optimizer or a schedule that is not here."""
        if name not in ("optimizer_type", "lr_scheduler_type"):
            return
        package, dot, _ = str(value).partition(".")
        if dot and package not in HERE:
            self.ledger.todo.append(f"{name} {value} is of another package: install it here too")
        elif name == "optimizer_type" and not _is_optimizer(str(value)):
            self.ledger.todo.append(f"choose optimizer_type: {value} does not exist here")

    def _network_module(self, module: str) -> tuple[str, str]:
        if module in tables.OTHER_NETWORKS:
            return tables.OTHER_NETWORKS[module], "the same network has this name here"
        # Names the modules that exist.
        algorithm = [w for w in self._words() if w.startswith("algo=")] if module == LYCORIS else []
        parse_network_args(algorithm, module)
        return module, ""

    def _words(self) -> list[str]:
        value = self.value("network_args")
        return [value] if isinstance(value, str) else [str(word) for word in value or ()]

    def _network_args(self, item: Item) -> None:
        """Every key=value by itself: one that does not exist here must not take the rest along."""
        module = self.value("network_module")
        module = tables.OTHER_NETWORKS.get(str(module), module)
        base = [word for word in self._words() if word.startswith("algo=")]
        kept, lost = [], []
        for word in self._words():
            if not word.strip() or word.endswith("="):
                lost.append(f"{word} (empty)")
                continue
            try:
                parse_network_args(dict.fromkeys([*base, word]), module or "networks.lora_anima")
                kept.append(word)
            except UserError as error:
                lost.append(f"{word} ({str(error).removeprefix('--network_args ')})")
        if kept or not lost:
            left_out = f"left out: {'; '.join(lost)}" if lost else ""
            self.ledger.take(item.key, "network_args", kept, left_out)
        else:
            self.ledger.drop(item.key, "; ".join(lost))

    def _lr_scheduler(self, item: Item) -> None:
        if item.value == "constant" and not is_off(self.value("lr_warmup_steps")):
            self.ledger.take(item.key, "lr_scheduler", "constant_with_warmup", WARMUP)
        else:
            self._option(item, "lr_scheduler")

    def _preview_time(self, item: Item) -> None:
        if is_off(item.value) or self.value("sample_prompts") or self.value("sample_prompt"):
            self._option(item, item.name)
        else:
            self.ledger.drop(item.key, "no prompts are given")

    def _output_name(self, item: Item) -> None:
        self.folder, _, stem = str(item.value).replace("\\", "/").rpartition("/")
        if self.folder:
            why = f"the folder {self.folder} belongs to output_dir"
            self.ledger.take(item.key, "output_name", stem, why)
        else:
            self._option(item, "output_name")

    def _after(self) -> None:
        """What follows from several options together."""
        found = self.ledger.options
        if found.get("lr_warmup_steps"):
            self.ledger.add("lr_scheduler", "constant_with_warmup", WARMUP)
        if self.folder:
            folder = f"{found.get('output_dir', '.')}/{self.folder}"
            self.ledger.put("output_dir", folder, "the folder in output_name")
        # There only the fused AdaFactor rounds at random.
        fused = found.get("fused_backward_pass")
        if found.get("full_bf16") and not fused and "weight_update" in self.known:
            why = "as there; stochastic loses no small updates, at the same memory"
            self.ledger.add("weight_update", "plain", why)

    def _defaults(self) -> None:
        """sd-scripts' own defaults, where ours are others."""
        half = self.ledger.options.get("full_bf16") or self.ledger.options.get("full_fp16")
        for name, value in tables.DEFAULTS.items():
            spec = self.known.get(name)
            if spec is None or (name == "mixed_precision" and half):
                continue
            if value != spec.default and (value or spec.default):
                self.ledger.add(name, value, tables.WHY_DEFAULT.get(name, "sd-scripts' default"))


def _is_optimizer(name: str) -> bool:
    # Imported here because it loads torch, which most sources do not need.
    from anima_fast.training.optimizers.recipes import BY_LOWER_NAME, torch_optimizer_names

    return name.lower() in {*BY_LOWER_NAME, *map(str.lower, torch_optimizer_names())}
