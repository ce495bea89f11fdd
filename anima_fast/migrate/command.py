"""A training command: what launches it, which script it runs, and the script's options.

CUDA_VISIBLE_DEVICES=0 accelerate launch --mixed_precision bf16 anima_train_network.py --a=b
^ environment          ^ launcher                               ^ script               ^ options
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath

from anima_fast.errors import UserError
from anima_fast.migrate.ledger import Ledger
from anima_fast.migrate.rows import OPTIONS, reasons
from anima_fast.migrate.shell import Command

EXAMPLE = "`accelerate launch anima_train_network.py --pretrained_model_name_or_path=...`"
DEEPSPEED = "DeepSpeed is for several devices, and one is used here"
_ENVIRONMENT = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<value>.*)", re.DOTALL)
# Programs that start others; what stands between them and the script belongs to them.
_STARTERS = re.compile(
    r"(?i)(.*[/\\])?(accelerate(-launch)?|python[0-9.]*|py|torchrun|deepspeed|uv|poetry|pipenv|conda|"
    r"mamba|env|nohup|time|call|start|sudo)(\.exe|\.bat|\.cmd)?"
)
_STARTER_WORDS = frozenset({
    "launch", "run", "exec", "-m", "accelerate.commands.launch", "torch.distributed.run", "--",
    "accelerate.commands.accelerate_cli",
})  # fmt: skip
_LAUNCHER = reasons({
    "it had no effect there either: the script's own --mixed_precision counts": "mixed_precision",
    "a file of accelerate: precision and devices are options of the training here": "config_file",
    "--compile and --compile_mode are the options here": "dynamo_backend dynamo_mode",
    DEEPSPEED: "use_deepspeed deepspeed_config_file zero_stage use_fsdp",
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
        return (PureWindowsPath(self.script).name or PurePosixPath(self.script).name).lower()

    def settle(self, ledger: Ledger) -> None:
        """Settle what stands before the script: the launcher's options and the environment."""
        for name, value in self.launcher.items():
            key, plain = f"{self.starter} {name}", name.lstrip("-").replace("-", "_")
            ledger.extend({key: value})
            if (plain == "gpu_ids" and value.isdigit()) or plain == "cpu":
                device = "cpu" if plain == "cpu" else f"cuda:{value}"
                ledger.take(key, "device", device, "the device is an option here")
            ledger.drop(
                key, _LAUNCHER.get(plain, "the launcher is not used here, nor several devices")
            )
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
    while words and (match := _ENVIRONMENT.fullmatch(words[0])):
        environment[match["name"]] = match["value"]
        words.pop(0)
    at = next((i for i, w in enumerate(words) if w.lower().endswith(".py")), None)
    if at is None:
        return None
    starters = [w for w in words[:at] if _STARTERS.fullmatch(w)]
    options = [w for w in words[:at] if not _STARTERS.fullmatch(w) and w not in _STARTER_WORDS]
    launcher = {}
    while options:
        name, equals, value = options.pop(0).partition("=")
        if not equals:
            has_value = options and not options[0].startswith("-")
            value = options.pop(0) if name.startswith("-") and has_value else "true"
        launcher[name] = value
    starter = "accelerate" if any("accelerate" in w for w in words[:at]) else ""
    starter = starter or (PureWindowsPath(starters[-1]).stem.lower() if starters else "")
    arguments = tuple(words[at + 1 :])
    return Launch(words[at], arguments, starter, launcher, environment, command.folder)


@dataclass(frozen=True)
class Given:
    """An option as it was given: `label` is its name for the lists, `words` what followed it.

    `name` is empty where the same option is given again further on.
    """

    name: str
    label: str
    words: tuple[str, ...]

    @property
    def value(self) -> str | list[str]:
        """The words of a list; of any other option one text, `true` for a flag."""
        if self.name in OPTIONS and OPTIONS[self.name].is_list:
            return list(self.words)
        return " ".join(self.words) if self.words else "true"


def read_arguments(words: tuple[str, ...]) -> tuple[list[Given], list[str]]:
    """The options of a script as argparse reads them, and the words that belong to none.

    Abbreviations are completed where only one known name fits. Of an option given twice the last
    one counts; the earlier ones come first and have labels of their own.
    """
    groups: list[tuple[str, list[str]]] = []
    stray: list[str] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            groups.append((name, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            stray.append(word)
    given = []
    names = [_full_name(name) for name, _ in groups]
    for i, ((spelt, values), name) in enumerate(zip(groups, names, strict=True)):
        spec = OPTIONS.get(name)
        if spec is not None and not spec.is_list:
            spelt_out = values and values[0].lower() in ("true", "false")
            keep = 0 if spec.kind == "bool" and not spelt_out else 1
            stray += values[keep:]
            values = values[:keep]
            if not values and spec.kind != "bool":
                raise UserError(f"--{spelt} needs a value after it")
        again = names[:i].count(name)
        last = name not in names[i + 1 :]
        label = f"--{spelt}" if last else f"--{spelt} (given {again + 1}. of {names.count(name)})"
        given.append(Given(name if last else "", label, tuple(values)))
    return given, stray


def _full_name(spelt: str) -> str:
    name = spelt.replace("-", "_")
    if name in OPTIONS:
        return name
    longer = [full for full in OPTIONS if full.startswith(name)]
    return longer[0] if len(longer) == 1 else name


def settle_arguments(launch: Launch, ledger: Ledger) -> None:
    """Settle the arguments of diffusion-pipe's and OneTrainer's train.py."""
    for item in read_arguments(launch.arguments)[0]:
        ledger.extend({item.label: item.value})
        read = item.name in ("config", "config_path")
        ledger.drop(item.label, "read, and its keys are listed" if read else "not needed here")
