"""A training command: what launches it, which script it runs, and the script's options.

CUDA_VISIBLE_DEVICES=0 accelerate launch --mixed_precision bf16 anima_train_network.py --a=b
^ environment          ^ launcher                               ^ script               ^ options
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PureWindowsPath
from typing import Any, NamedTuple

from anima_fast.errors import UserError
from anima_fast.migrate.ledger import Ledger
from anima_fast.migrate.rows import OPTIONS
from anima_fast.migrate.shell import Command

EXAMPLE = "`accelerate launch anima_train_network.py --pretrained_model_name_or_path=...`"
# What may stand behind a flag.
WORDS = ("true", "false")
# Programs that start others; what stands between them and the script belongs to them.
_STARTERS = re.compile(
    r"(?i)(.*[/\\])?(accelerate(-launch)?|python[0-9.]*|py|torchrun|deepspeed|uv|poetry|pipenv|conda|"
    r"mamba|env|nohup|time|call|start|sudo)(\.exe|\.bat|\.cmd)?"
    r"|launch|run|exec|-m|--|accelerate\.commands\.\w+|torch\.distributed\.run"
)


@dataclass(frozen=True)
class Launch:
    """A training command in its parts; `folder` is where the text changed to before."""

    script: str
    arguments: tuple[str, ...]
    starter: str = ""
    launcher: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    folder: str | None = None

    @property
    def name(self) -> str:
        """The script's file name in small letters, from a path of any system."""
        return PureWindowsPath(self.script).name.lower()

    def settle(self, ledger: Ledger) -> None:
        """Settle what stands before the script: the launcher's options and the environment."""
        for name, value in self.launcher.items():
            key, plain = f"{self.starter} {name}", name.lstrip("-").replace("-", "_")
            ledger.extend({key: value})
            if plain == "cpu":
                ledger.take(key, "device", "cpu", "the device is an option here")
            elif plain == "gpu_ids" and value.isdigit():
                ledger.take(key, "device", f"cuda:{value}", "the device is an option here")
            ledger.drop("one device is used here, without a launcher", key)
        several = self.launcher.get("--num_processes", "1")
        if several.isdigit() and int(several) > 1:
            ledger.todo.append(
                f"{several} devices saw {several} batches a step there: for the same, multiply "
                f"gradient_accumulation_steps by {several}"
            )
        for name, value in self.environment.items():
            ledger.extend({f"environment {name}": value})
            ledger.drop("set it before the command here, in the same way", f"environment {name}")


def find_launch(commands: list[Command]) -> Launch:
    """The one training command among the commands of a text.

    Raises:
        UserError: no command that runs a training script, or several.
    """
    found = [launch for command in commands if (launch := _launch(command)) is not None]
    training = [launch for launch in found if "train" in launch.name] or found[:1]
    if not training:
        raise UserError(f"no training command in the text: expected something like {EXAMPLE}")
    if len(training) > 1:
        names = ", ".join(launch.name for launch in training[:4])
        raise UserError(
            f"{len(training)} training commands in the text ({names}): import them one at a time"
        )
    return training[0]


def _launch(command: Command) -> Launch | None:
    words, environment = list(command.words), dict(command.exported)
    while words and re.match(r"[A-Za-z_]\w*=", words[0]):
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    at = next((i for i, w in enumerate(words) if w.lower().endswith(".py")), None)
    if at is None:
        return None
    starters = [w for w in words[:at] if (match := _STARTERS.fullmatch(w)) and match[2]]
    options = [w for w in words[:at] if not _STARTERS.fullmatch(w)]
    launcher = {}
    while options:
        name, equals, value = options.pop(0).partition("=")
        if not equals:
            has_value = name.startswith("-") and options and not options[0].startswith("-")
            value = options.pop(0) if has_value else "true"
        launcher[name] = value
    starter = PureWindowsPath(starters[-1]).stem.lower() if starters else ""
    if any("accelerate" in w for w in words[:at]):
        starter = "accelerate"
    arguments = tuple(words[at + 1 :])
    return Launch(words[at], arguments, starter, launcher, environment, command.folder)


class Item(NamedTuple):
    """An option of a script: its key in the ledger and its value."""

    key: str
    value: Any


# By the option's name.
Items = dict[str, Item]


def join(
    items: Items, ledger: Ledger, names: Iterable[str], option: str, value: Any, key: str
) -> None:
    """The items of these names that there are become one option, which the ledger calls `key`."""
    for name in filter(items.__contains__, names):
        ledger.place(option, items.pop(name).key)
    ledger.extend({key: value})
    items[option] = Item(key, value)


def read_arguments(words: tuple[str, ...], ledger: Ledger, prefix: str = "") -> Items:
    """The options of a script as argparse reads them; all words become keys of the ledger.

    Abbreviations are completed where only one known name fits. Of an option given twice the last
    one counts. Words that belong to no option are dropped here.
    """
    groups: list[tuple[str, list[str]]] = []
    stray: list[str] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            groups.append((name, [value] if equals else []))
        else:
            (groups[-1][1] if groups else stray).append(word)
    names = [_full_name(name) for name, _ in groups]
    items: Items = {}
    for i, ((spelt, values), name) in enumerate(zip(groups, names, strict=True)):
        spec = OPTIONS.get(name)
        given: Any = " ".join(values) or "true"
        if spec is not None and spec.is_list:
            given = values
        elif spec is not None:
            is_flag = spec.kind == "bool" and "".join(values[:1]).lower() not in WORDS
            if not values and not is_flag:
                raise UserError(f"--{spelt} needs a value after it")
            given = "true" if is_flag else values[0]
            stray += values[0 if is_flag else 1 :]
        key = f"{prefix}--{spelt}"
        if name in names[i + 1 :]:
            key += f" (given {names[:i].count(name) + 1}. of {names.count(name)})"
            ledger.extend({key: given})
            ledger.drop("given again further on: the last one counts", key)
        else:
            ledger.extend({key: given})
            items[name] = Item(key, given)
    for i, word in enumerate(stray, 1):
        ledger.extend({f"word {i}": word})
        ledger.drop("it belongs to no option", f"word {i}")
    return items


def _full_name(spelt: str) -> str:
    name = spelt.replace("-", "_")
    if name in OPTIONS:
        return name
    longer = [full for full in OPTIONS if full.startswith(name)]
    return longer[0] if len(longer) == 1 else name
