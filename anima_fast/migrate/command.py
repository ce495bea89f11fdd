"""A training command: what launches it, which script it runs, and the script's options.

CUDA_VISIBLE_DEVICES=0 accelerate launch --mixed_precision bf16 anima_train_network.py --a=b
^ environment          ^ launcher                               ^ script               ^ options
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import PureWindowsPath

from anima_fast.errors import UserError
from anima_fast.migrate.ledger import Ledger
from anima_fast.migrate.rows import OPTIONS, Item, reasons
from anima_fast.migrate.shell import Command

EXAMPLE = "`accelerate launch anima_train_network.py --pretrained_model_name_or_path=...`"
# Programs that start others; what stands between them and the script belongs to them.
_STARTERS = re.compile(
    r"(?i)(.*[/\\])?(accelerate(-launch)?|python[0-9.]*|py|torchrun|deepspeed|uv|poetry|pipenv|conda|"
    r"mamba|env|nohup|time|call|start|sudo)(\.exe|\.bat|\.cmd)?"
    r"|launch|run|exec|-m|--|accelerate\.commands\.\w+|torch\.distributed\.run"
)
_LAUNCHER = reasons({
    "it had no effect there either: the script's own --mixed_precision counts": "mixed_precision",
    "a file of accelerate: precision and devices are options of the training here": "config_file",
    "--compile and --compile_mode are the options here": "dynamo_backend dynamo_mode",
})  # fmt: skip


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
            if plain == "cpu" or (plain == "gpu_ids" and value.isdigit()):
                device = "cpu" if plain == "cpu" else f"cuda:{value}"
                ledger.take(key, "device", device, "the device is an option here")
            why = "one device is used here, without the launcher"
            ledger.drop(key, _LAUNCHER.get(plain, why))
        several = self.launcher.get("--num_processes", "1")
        if several.isdigit() and int(several) > 1:
            ledger.todo.append(
                f"{several} devices saw {several} batches a step there: for the same, multiply "
                f"gradient_accumulation_steps by {several}"
            )
        for name, value in self.environment.items():
            ledger.extend({f"environment {name}": value})
            ledger.drop(f"environment {name}", "set it before the command here, in the same way")


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
    words = list(command.words)
    environment = dict(command.exported)
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
            has_value = options and not options[0].startswith("-")
            value = options.pop(0) if name.startswith("-") and has_value else "true"
        launcher[name] = value
    starter = PureWindowsPath(starters[-1]).stem.lower() if starters else ""
    if any("accelerate" in w for w in words[:at]):
        starter = "accelerate"
    arguments = tuple(words[at + 1 :])
    return Launch(words[at], arguments, starter, launcher, environment, command.folder)


def read_arguments(words: tuple[str, ...], ledger: Ledger, prefix: str = "") -> list[Item]:
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
    items = []
    for i, ((spelt, values), name) in enumerate(zip(groups, names, strict=True)):
        spec = OPTIONS.get(name)
        if spec is not None and not spec.is_list:
            spelt_out = values and values[0].lower() in ("true", "false")
            keep = 0 if spec.kind == "bool" and not spelt_out else 1
            stray += values[keep:]
            values = values[:keep]
            if not values and spec.kind != "bool":
                raise UserError(f"--{spelt} needs a value after it")
        is_list = spec is not None and spec.is_list
        given = values if is_list else " ".join(values) or "true"
        last = name not in names[i + 1 :]
        again = f" (given {names[:i].count(name) + 1}. of {names.count(name)})"
        key = f"{prefix}--{spelt}" + ("" if last else again)
        ledger.extend({key: given})
        if last:
            items.append(Item(key, name, given))
        else:
            ledger.drop(key, "given again further on: the last one counts")
    for i, word in enumerate(stray):
        ledger.extend({f"word {i + 1}": word})
        ledger.drop(f"word {i + 1}", "it belongs to no option")
    return items


def _full_name(spelt: str) -> str:
    name = spelt.replace("-", "_")
    if name in OPTIONS:
        return name
    longer = [full for full in OPTIONS if full.startswith(name)]
    return longer[0] if len(longer) == 1 else name
