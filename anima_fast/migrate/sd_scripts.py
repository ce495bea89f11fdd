"""sd-scripts' options as ours: they have the same names, so this is about what differs.

Values are checked as ours are. An option without a counterpart is dropped with its reason, another
trainer's default that is not ours is written down, and what belongs to `accelerate` is explained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from anima_fast.errors import UserError
from anima_fast.migrate.ledger import SECRET, Ledger
from anima_fast.migrate.paths import Paths
from anima_fast.migrate.sd_scripts_tables import (
    DEEPSPEED,
    DEFAULTS,
    DROPPED,
    LIMITS,
    OTHER_NAMES,
    OTHER_NETWORKS,
    OTHER_VALUES,
    WHY_DEFAULT,
)
from anima_fast.migrate.values import is_nothing, is_off, plain, same
from anima_fast.migrate.words import variable_names
from anima_fast.options.declare import convert, specs
from anima_fast.options.files import refused
from anima_fast.options.network_args import LYCORIS, parse_network_args
from anima_fast.options.other_names import ALIASES, IGNORED
from anima_fast.options.run import FinetuneOptions, TrainOptions

CLASSES = {"train": TrainOptions, "finetune": FinetuneOptions}
PATHS = frozenset({
    "pretrained_model_name_or_path", "qwen3", "vae", "llm_adapter_path", "t5_tokenizer_path",
    "qwen3_tokenizer_path", "models_dir", "dataset_config", "train_data_dir", "reg_data_dir",
    "in_json", "conditioning_data_dir", "network_weights", "base_weights", "output_dir",
    "logging_dir", "log_tracker_config", "console_log_file", "cache_dir", "sample_prompts",
})  # fmt: skip
WARMUP = "a warm-up is given, which constant does not have: sd-scripts stops at that"
# Packages whose classes are here; an optimizer without a dot has a name of its own.
HERE = ("torch", "bitsandbytes", "transformers")
PREVIEW_TIMES = ("sample_at_first", "sample_every_n_steps", "sample_every_n_epochs")
PREVIEWS = "a prompt without size and guidance gets 1024x1024 and 4 here, 512x512 and 7.5 there"


@dataclass(frozen=True)
class Item:
    """One option of the source: `key` is its name in the ledger, `name` the option's."""

    key: str
    name: str
    value: Any


def convert_options(items: list[Item], ledger: Ledger, paths: Paths, command: str) -> None:
    """Settle sd-scripts' options in the ledger.

    Args:
        items: the options, each name once.
        command: `train` or `finetune`, whose options they become.
    Raises:
        UserError: a value that sd-scripts would refuse too, or a network that does not exist here.
    """
    _Converter(ledger, paths, command).convert(items)


class _Converter:
    def __init__(self, ledger: Ledger, paths: Paths, command: str) -> None:
        self.ledger, self.paths = ledger, paths
        self.cls = CLASSES[command]
        self.known, self.refused = specs(self.cls), refused(self.cls)
        self.special: dict[str, Callable[[Item], None]] = {
            "network_args": self._network_args,
            "torch_compile": self._torch_compile,
            "save_model_as": self._save_model_as,
            "lr_scheduler": self._lr_scheduler,
            "output_name": self._output_name,
            **dict.fromkeys(PREVIEW_TIMES, self._preview_time),
        }
        self.folder = ""

    def convert(self, items: list[Item]) -> None:
        self.given = {OTHER_NAMES.get(item.name, item.name): item for item in items}
        for item in items:
            self._one(item)
        self._after()

    def value(self, name: str) -> Any:
        """What the source gives an option; None when it is not given."""
        return self.given[name].value if name in self.given else None

    def _one(self, item: Item) -> None:
        name = OTHER_NAMES.get(item.name, item.name)
        if name in DROPPED and not (name == "resume" and item.value == "auto"):
            self.ledger.drop(item.key, DROPPED[name])
        elif name in self.special and name not in self.refused.keys() - {"torch_compile"}:
            self.special[name](item)
        elif name in self.known:
            self._option(item, name)
        elif name in ALIASES:
            self._alias(item, name)
        else:
            self._without_counterpart(item, name)

    def _without_counterpart(self, item: Item, name: str) -> None:
        if is_off(item.value) and (name in self.refused or name in IGNORED):
            self.ledger.drop(item.key, "it is off")
        elif name in self.refused:
            deepspeed = name.startswith(("deepspeed", "zero", "offload_", "fp16_master"))
            self.ledger.drop(item.key, DEEPSPEED if deepspeed else self.refused[name])
        elif name in IGNORED:
            self.ledger.drop(item.key, IGNORED[name])
        elif SECRET.search(name):
            self.ledger.drop(item.key, "a password")
        else:
            near = get_close_matches(name, [*self.known, *ALIASES], 1, 0.9)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            self.ledger.drop(item.key, f"no such option here{hint}")

    def _alias(self, item: Item, name: str) -> None:
        alias = ALIASES[name]
        if is_off(item.value):
            self.ledger.drop(item.key, "it is off")
        elif self.value(alias.target):
            self.ledger.drop(item.key, f"{alias.target} is given, and beats it")
        else:
            self.ledger.take(item.key, alias.target, alias.value or item.value)

    def _option(self, item: Item, name: str) -> None:
        spec, value = self.known[name], plain(self.known[name], item.value)
        if is_nothing(spec, value):
            self.ledger.drop(item.key, "it is off, as here without it")
            return
        unset = [] if spec.kind == "str" or spec.is_list else variable_names(str(value))
        if unset:
            self.ledger.drop(item.key, f"${unset[0]} is of your shell")
            self.ledger.todo.append(f"write {name} into the file: ${unset[0]} is of your shell")
            return
        if name in ("train_data_dir", "reg_data_dir", "in_json") and self.value("dataset_config"):
            self.ledger.drop(item.key, "dataset_config is given, and beats it there too")
            return
        new, why = OTHER_VALUES.get((name, str(value)), (value, ""))
        if name == "network_module":
            new, why = self._network_module(str(value))
        if spec.choices and new not in spec.choices:
            self.ledger.drop(item.key, f"{new} is not one of {', '.join(spec.choices)}")
            default = f"the default, {spec.default}," if spec.default else "nothing"
            self.ledger.todo.append(
                f"choose {name}: {new} does not exist here, and {default} is set"
            )
            return
        new = convert(spec, new, item.key, text=True)
        if name in PATHS:
            new, why = self._path(new)
        if name in ("optimizer_type", "lr_scheduler_type") and _foreign(new):
            self.ledger.todo.append(f"{name} {new} is of another package: install it here too")
        if name == "optimizer_type" and not _foreign(new) and not _is_optimizer(new):
            self.ledger.todo.append(f"choose optimizer_type: {new} does not exist here")
        if new != LIMITS.get(name, new):
            why = "it had no effect on Anima there, and limits the noise levels here"
        if name == "sample_prompts":
            why = f"{why}; {PREVIEWS}" if why else PREVIEWS
        self._settle(item, name, new, why)

    def _settle(self, item: Item, name: str, value: Any, why: str) -> None:
        value = list(value) if isinstance(value, tuple) else value
        if why:
            self.ledger.change(item.key, name, value, why)
        else:
            self.ledger.take(item.key, name, value)

    def _path(self, value: str | tuple[str, ...]) -> tuple[Any, str]:
        if isinstance(value, str):
            return self.paths.resolve(value)
        found = [self.paths.resolve(text) for text in value]
        return tuple(path for path, _ in found), next((why for _, why in found if why), "")

    def _network_module(self, module: str) -> tuple[str, str]:
        if module in OTHER_NETWORKS:
            return OTHER_NETWORKS[module], "the same network has this name here"
        # Names the modules that exist.
        algorithm = [w for w in self._words() if w.startswith("algo=")] if module == LYCORIS else []
        parse_network_args(algorithm, module)
        return module, ""

    def _words(self) -> list[str]:
        value = self.value("network_args")
        return [value] if isinstance(value, str) else [str(word) for word in value or ()]

    def _network_args(self, item: Item) -> None:
        """Every key=value by itself: one that does not exist here shall not take the rest along."""
        module = OTHER_NETWORKS.get(str(self.value("network_module")), self.value("network_module"))
        module = module or "networks.lora_anima"
        base = [word for word in self._words() if word.startswith("algo=")]
        kept, lost = [], []
        for word in self._words():
            if not word.strip() or word.endswith("="):
                lost.append(f"{word} (empty)")
                continue
            try:
                parse_network_args(dict.fromkeys([*base, word]), module)
                kept.append(word)
            except UserError as error:
                lost.append(f"{word} ({str(error).removeprefix('--network_args ')})")
        if not lost:
            self.ledger.take(item.key, "network_args", kept)
        elif kept:
            self.ledger.change(item.key, "network_args", kept, f"left out: {'; '.join(lost)}")
        else:
            self.ledger.drop(item.key, "; ".join(lost) or "it is empty")

    def _torch_compile(self, item: Item) -> None:
        if is_off(item.value):
            self.ledger.drop(item.key, "it is off")
        else:
            why = "blocks are compiled one by one instead of the whole model"
            self.ledger.change(item.key, "compile", True, why)

    def _save_model_as(self, item: Item) -> None:
        if item.value == "safetensors":
            self.ledger.take(item.key, "save_model_as")
        else:
            why = f"{item.value} files are pickles, which can run code when they are opened"
            self.ledger.change(item.key, "save_model_as", "safetensors", why)

    def _lr_scheduler(self, item: Item) -> None:
        if item.value == "constant" and not is_off(self.value("lr_warmup_steps")):
            self.ledger.change(item.key, "lr_scheduler", "constant_with_warmup", WARMUP)
        else:
            self._option(item, "lr_scheduler")

    def _preview_time(self, item: Item) -> None:
        if is_off(item.value) or self.value("sample_prompts") or self.value("sample_prompt"):
            self._option(item, item.name)
        else:
            self.ledger.drop(item.key, "no prompts are given")

    def _output_name(self, item: Item) -> None:
        folder, _, stem = str(item.value).replace("\\", "/").rpartition("/")
        if folder:
            why = f"the folder {folder} belongs to output_dir"
            self.ledger.change(item.key, "output_name", stem, why)
            self.folder = folder
        else:
            self._option(item, "output_name")

    def _after(self) -> None:
        """What follows from several options together, and sd-scripts' own defaults."""
        found = self.ledger.options
        if found.get("lr_warmup_steps"):
            self.ledger.add("lr_scheduler", "constant_with_warmup", WARMUP)
        if self.folder:
            folder = f"{found.get('output_dir', '.')}/{self.folder}"
            self.ledger.put("output_dir", folder, "the folder in output_name")
        # There only the fused AdaFactor rounds at random.
        if found.get("full_bf16") and not found.get("fused_backward_pass"):
            why = "as there; stochastic loses no small updates, at the same memory"
            if "weight_update" in self.known:
                self.ledger.add("weight_update", "plain", why)
        self._defaults()

    def _defaults(self) -> None:
        found = self.ledger.options
        half = found.get("full_bf16") or found.get("full_fp16")
        for name, value in DEFAULTS.items():
            spec = self.known.get(name)
            unused = name == "mixed_precision" and half
            if spec is not None and not unused and not same(value, spec.default):
                self.ledger.add(name, value, WHY_DEFAULT.get(name, "sd-scripts' default"))


def _foreign(name: str) -> bool:
    package, dot, _ = str(name).partition(".")
    return bool(dot) and package not in HERE


def _is_optimizer(name: str) -> bool:
    from anima_fast.training.optimizers.recipes import BY_LOWER_NAME, torch_optimizer_names

    return name.lower() in {*BY_LOWER_NAME, *map(str.lower, torch_optimizer_names())}
