"""sd-scripts' options as ours: they have the same names, so this is about what differs.

They come from the words of a command line, a `--config_file` or a file of a window, and a value of
the command line beats the file's. Values are checked as ours are. An option without a counterpart
is dropped with its reason, and another trainer's default that is not ours is written down.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from anima_fast.errors import UserError
from anima_fast.migrate import kohya_gui
from anima_fast.migrate import sd_scripts_tables as tables
from anima_fast.migrate.command import Item, Items, read_arguments
from anima_fast.migrate.datasets import convert_dataset_file
from anima_fast.migrate.ledger import Ledger, flatten, is_off
from anima_fast.migrate.other_guis import (
    PREVIEW_TIMES,
    easy_dataset,
    easy_items,
    is_easy,
    join_fields,
)
from anima_fast.migrate.paths import PATHS, find_base
from anima_fast.migrate.rows import CLASSES, given
from anima_fast.migrate.shell import variable_names
from anima_fast.migrate.source import ONLY, SCRIPTS, Source, named_file, other_model, parse_file
from anima_fast.options.declare import convert as checked
from anima_fast.options.declare import specs
from anima_fast.options.files import refused
from anima_fast.options.network_args import LYCORIS, parse_network_args
from anima_fast.options.other_names import ALIASES, IGNORED

WARM_STEPS = "lr_warmup_steps"
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
    named = [v for name in PATHS & items.keys() for v in _list(items[name].value)]
    ledger.base = find_base([v for v in named if isinstance(v, str)], source.folders)
    _Converter(items, ledger, command).convert()
    if is_easy(config):
        easy_dataset(config, ledger, source.folders)
    convert_dataset_file(ledger, source.folders)
    return command


def _list(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value or ())


def _items(source: Source, ledger: Ledger) -> tuple[Mapping[str, Any], Items]:
    """The options, and the file that they come from beside the command line."""
    items = read_arguments(source.launch.arguments, ledger) if source.launch else {}
    config, name = source.config, source.file.name if source.file else "the command line"
    if source.launch and "config_file" in items:
        text = str(items["config_file"].value)
        # sd-scripts appends the ending where it is missing.
        file = named_file(text if text.endswith(".toml") else f"{text}.toml", source.folders)
        config, name = parse_file(file), file.name
    if is_easy(config):
        items |= easy_items(config, ledger)
    else:
        items |= _items_of_config(config, items, ledger, name)
    join_fields(items, ledger)
    # A script says that it is for Anima by its name.
    _check_model({"qwen3": source.launch, **{n: item.value for n, item in items.items()}}, name)
    return config, items


def _items_of_config(config: Mapping[str, Any], given: Items, ledger: Ledger, name: str) -> Items:
    """The keys of a `--config_file`, whose sections mean nothing."""
    ledger.extend(config)
    items: Items = {}
    for key, value in flatten(config):
        option = key.rsplit(".", 1)[-1].replace("-", "_")
        if option in given:
            ledger.drop(f"the command line's --{option} beats {name}", key)
        elif option in items:
            ledger.drop("it stands in two sections: the first one is taken", key)
        else:
            items[option] = Item(key, value)
    return items


def _command(items: Items) -> str:
    kind = items.get("model_train_type", Item("", "")).value
    lora = any(name.startswith("network_") for name in items)
    return "train" if lora and "finetune" not in str(kind) else "finetune"


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


class _Converter:
    """Settles the options of a source, each of which may depend on the others."""

    def __init__(self, items: Items, ledger: Ledger, command: str) -> None:
        self.items, self.ledger = items, ledger
        self.known, self.refused = specs(CLASSES[command]), refused(CLASSES[command])
        self.given = {tables.OTHER_NAMES.get(name, name): item for name, item in items.items()}
        self.folder = ""

    def convert(self) -> None:
        """Settle every option, then what follows from several together and from nothing."""
        for name, item in self.items.items():
            self._one(item, tables.OTHER_NAMES.get(name, name))
        self._after()
        self._defaults()

    def value(self, name: str) -> Any:
        """What the source gives an option; None when it is not given."""
        return self.given[name].value if name in self.given else None

    def _one(self, item: Item, name: str) -> None:
        if name in tables.DROPPED and not (name == "resume" and item.value == "auto"):
            self.ledger.drop(tables.DROPPED[name], item.key)
        elif name == "torch_compile" and not is_off(item.value):
            why = "blocks are compiled one by one instead of the whole model"
            self.ledger.take(item.key, "compile", True, why)
        elif name == "anima_checkpoint_mode" and item.value in tables.CHECKPOINTS:
            self.ledger.take(item.key, tables.CHECKPOINTS[item.value], True)
        elif name == "network_args" and name in self.known:
            self._network_args(item)
        elif name in self.known:
            self._option(item, name)
        elif is_off(item.value):
            return
        elif name in ALIASES:
            alias = ALIASES[name]
            if self.value(alias.target):
                self.ledger.drop(f"{alias.target} is given, and beats it", item.key)
            self.ledger.take(item.key, alias.target, alias.value or item.value)
        elif reason := self.refused.get(name) or IGNORED.get(name):
            self.ledger.drop(reason, item.key)
        else:
            near = get_close_matches(name, [*self.known, *ALIASES], 1, 0.9)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            self.ledger.drop(f"no such option here{hint}", item.key)

    def _option(self, item: Item, name: str) -> None:
        """An option of the same name; what says nothing stays open, and is off."""
        spec = self.known[name]
        value = given(spec, item.value)
        if value is None:
            return
        if why := self._beaten(name, value):
            self.ledger.drop(why, item.key)
            return
        unset = [] if spec.kind == "str" or spec.is_list else variable_names(str(value))
        if unset:
            self.ledger.drop(f"${unset[0]} is of your shell", item.key)
            self.ledger.todo.append(f"write {name} into the file: ${unset[0]} is of your shell")
            return
        new, why = self._here(name, value)
        if spec.choices and new not in spec.choices:
            self.ledger.drop(f"{new} is not one of {', '.join(spec.choices)}", item.key)
            default = f"the default, {spec.default}," if spec.default else "nothing"
            self.ledger.todo.append(
                f"choose {name}: {new} does not exist here, and {default} is set"
            )
            return
        new = checked(spec, new, item.key, text=True)
        self._check_class(name, new)
        if new != tables.LIMITS.get(name, new):
            why = "it had no effect on Anima there, and limits the noise levels here"
        self.ledger.take(item.key, name, list(new) if isinstance(new, tuple) else new, why)

    def _beaten(self, name: str, value: Any) -> str:
        """Why an option has no effect beside the others; "" where it has one."""
        if name in ("train_data_dir", "reg_data_dir", "in_json") and self.value("dataset_config"):
            return "dataset_config is given, and beats it there too"
        prompts = self.value("sample_prompts") or self.value("sample_prompt")
        if name in PREVIEW_TIMES and not is_off(value) and not prompts:
            return "no prompts are given"
        return ""

    def _here(self, name: str, value: Any) -> tuple[Any, str]:
        """A value as it is written here, and why it was changed ("" when it was not)."""
        if name == "sample_prompts":
            return value, PREVIEWS
        if name == "lr_scheduler" and value == "constant" and not is_off(self.value(WARM_STEPS)):
            return "constant_with_warmup", WARMUP
        if name == "output_name":
            self.folder, _, stem = str(value).replace("\\", "/").rpartition("/")
            why = f"the folder {self.folder} belongs to output_dir" if self.folder else ""
            return stem if self.folder else value, why
        if name == "network_module" and value in tables.OTHER_NETWORKS:
            return tables.OTHER_NETWORKS[value], "the same network has this name here"
        if name == "network_module":
            # Names the modules that exist.
            words = map(str, _list(self.value("network_args")) if value == LYCORIS else [])
            parse_network_args([word for word in words if word.startswith("algo=")], value)
        return tables.OTHER_VALUES.get((name, str(value)), (value, ""))

    def _check_class(self, name: str, value: Any) -> None:
        """To do for an optimizer or a schedule that is not here."""
        if name not in ("optimizer_type", "lr_scheduler_type"):
            return
        package, dot, _ = str(value).partition(".")
        if dot and package not in HERE:
            self.ledger.todo.append(f"{name} {value} is of another package: install it here too")
        elif name == "optimizer_type" and not _is_optimizer(str(value)):
            self.ledger.todo.append(f"choose optimizer_type: {value} does not exist here")

    def _network_args(self, item: Item) -> None:
        """Every key=value by itself: one that does not exist here must not take the rest along."""
        module = self.value("network_module") or "networks.lora_anima"
        module = tables.OTHER_NETWORKS.get(str(module), module)
        words = [str(word) for word in _list(item.value)]
        base = [word for word in words if word.startswith("algo=")]
        kept, lost = [], []
        for word in words:
            if not word.strip() or word.endswith("="):
                lost.append(f"{word} (empty)")
                continue
            try:
                parse_network_args(dict.fromkeys([*base, word]), module)
                kept.append(word)
            except UserError as error:
                lost.append(f"{word} ({str(error).removeprefix('--network_args ')})")
        if lost and not kept:
            self.ledger.drop("; ".join(lost), item.key)
        left_out = f"left out: {'; '.join(lost)}" if lost else ""
        self.ledger.take(item.key, "network_args", kept, left_out)

    def _after(self) -> None:
        """What follows from several options together."""
        found = self.ledger.options
        if found.get(WARM_STEPS):
            self.ledger.add(WARMUP, lr_scheduler="constant_with_warmup")
        if self.folder:
            folder = f"{found.get('output_dir', '.')}/{self.folder}"
            self.ledger.put("the folder in output_name", output_dir=folder)
        # There only the fused AdaFactor rounds at random.
        fused = found.get("fused_backward_pass")
        if found.get("full_bf16") and not fused and "weight_update" in self.known:
            why = "as there; stochastic loses no small updates, at the same memory"
            self.ledger.add(why, weight_update="plain")

    def _defaults(self) -> None:
        """sd-scripts' own defaults, where ours are others."""
        half = self.ledger.options.get("full_bf16") or self.ledger.options.get("full_fp16")
        for name, value in tables.DEFAULTS.items():
            spec = self.known.get(name)
            if spec is None or (name == "mixed_precision" and half):
                continue
            if value != spec.default and (value or spec.default):
                why = tables.WHY_DEFAULT.get(name, "sd-scripts' default")
                self.ledger.add(why, **{name: value})


def _is_optimizer(name: str) -> bool:
    # Imported here because it loads torch, which most sources do not need.
    from anima_fast.training.optimizers.recipes import BY_LOWER_NAME, torch_optimizer_names

    return name.lower() in {*BY_LOWER_NAME, *map(str.lower, torch_optimizer_names())}
