"""What a source is: a command line, a script with one, or a configuration of a known trainer.

The kind is found in the content, not in the file's name, and configurations for other models are
refused by name here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from anima_fast.errors import UserError
from anima_fast.files import parse_config
from anima_fast.migrate.command import EXAMPLE, Launch, find_launch
from anima_fast.migrate.sd_scripts_tables import (
    OTHER_MODEL_KEYS,
    OTHER_MODULES,
    OTHER_SCRIPTS,
    SCRIPTS,
)
from anima_fast.migrate.words import Command, option_names, split_commands, variable_names
from anima_fast.options.declare import specs
from anima_fast.options.other_names import ALIASES, IGNORED, REFUSED
from anima_fast.options.run import FinetuneOptions, TrainOptions

TRAINERS = "sd-scripts, kohya_ss' GUI, diffusion-pipe and OneTrainer"
CONFIGS, TEXTS = (".toml", ".json"), (".sh", ".bash", ".bat", ".cmd", ".ps1", ".txt", ".command")
_OTHER_FILES = {
    ".yaml": "YAML files are ai-toolkit's or SimpleTuner's",
    ".yml": "YAML files are ai-toolkit's or SimpleTuner's",
    ".safetensors": "a model file: `anima-fast inspect` reads it",
}
_ONLY_MODELS = "anima_fast trains the Anima image model only"


@dataclass(frozen=True)
class Source:
    """What was found.

    Attributes:
        trainer: sd-scripts, kohya-gui, diffusion-pipe or onetrainer.
        config: the parsed file; empty for a command line alone.
        launch: the command line, if there is one.
        file: the configuration or the script file; None for a text.
        folders: where relative paths may be meant from, the most likely first.
        unset: shell variables in the text that it does not set.
        outside: names of options in the text that are not in the command itself.
    """

    trainer: str
    config: dict[str, Any] = field(default_factory=dict)
    launch: Launch | None = None
    file: Path | None = None
    folders: tuple[Path, ...] = ()
    unset: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()


def open_source(text: str | tuple[str, ...], folder: Path | None = None) -> Source:
    """Read a source.

    Args:
        text: a path, a command line as text or as words, or `-` for one on standard input.
        folder: where the other trainer was started; None when it is not known.
    Raises:
        UserError: no such file, nothing that is known, a configuration for another model.
    """
    here = (folder,) if folder else (Path.cwd(),)
    if isinstance(text, tuple):
        return _launched(find_launch([Command(text)]), None, here, ())
    if not text.strip():
        raise UserError(f"the source is empty: expected a file, or something like {EXAMPLE}")
    if text == "-":
        return _commands(sys.stdin.read(), None, here)
    path = Path(text.strip().strip("\"'")).expanduser()
    if _is_path(path, text):
        suffix = path.suffix.lower()
        if suffix in _OTHER_FILES:
            raise UserError(f"{path.name}: {_OTHER_FILES[suffix]}; importing reads {TRAINERS}")
        content = _read(path)
        # Configurations lie in a folder of the trainer, or a folder in it.
        folders = here if folder else (*here, *path.resolve().parents[:3])
        if suffix in CONFIGS or _looks_like_json(content):
            return _config(path, content, folders)
        return _commands(content, path, folders)
    return _commands(text, None, here)


def _is_path(path: Path, text: str) -> bool:
    if "\n" in text or len(text) > 4000:
        return False
    try:
        if path.is_file():
            return True
    except OSError:
        return False
    if path.is_dir():
        raise UserError(f"{text} is a folder: give the configuration file in it")
    suffix = path.suffix.lower()
    named = suffix in (*CONFIGS, *TEXTS, *_OTHER_FILES) and "--" not in text
    if named and not re.search(r"\.py\b", text):
        raise UserError(f"{text} does not exist: check the path")
    return False


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        # Windows' own editors write UTF-16, and PowerShell does.
        try:
            return path.read_text(encoding="utf-16")
        except (UnicodeError, OSError):
            raise UserError(f"{path} is no text in UTF-8: save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _looks_like_json(content: str) -> bool:
    return content.lstrip().startswith(("{", "["))


def parse_file(path: Path, content: str | None = None) -> Any:
    """A TOML or JSON file as Python values; `UserError` when it is neither."""
    content = _read(path) if content is None else content
    as_json = path.suffix.lower() == ".json" or _looks_like_json(content)
    kind = "JSON" if as_json and path.suffix.lower() != ".toml" else "TOML"
    return parse_config(content, path.name, kind)


def _commands(text: str, file: Path | None, folders: tuple[Path, ...]) -> Source:
    if not text.strip():
        raise UserError(f"the source is empty: expected a file, or something like {EXAMPLE}")
    launch = find_launch(split_commands(text, file.resolve().parent if file else None))
    unset = tuple(dict.fromkeys(variable_names(" ".join(launch.arguments))))
    # Options that a script puts together in variables and lists, mostly under conditions.
    given = option_names(" ".join([*launch.arguments, *launch.launcher]))
    known = {*specs(TrainOptions), *specs(FinetuneOptions), *ALIASES, *IGNORED, *REFUSED}
    outside = [name for name in option_names(text) if name in known and name not in given]
    source = _launched(launch, file, folders, unset)
    return replace(source, outside=tuple(dict.fromkeys(outside)))


def _launched(
    launch: Launch, file: Path | None, folders: tuple[Path, ...], unset: tuple[str, ...]
) -> Source:
    if launch.folder:
        # A script changes to the trainer's folder from its own, or from the current one.
        folders = (*(folder / launch.folder for folder in folders[::-1]), *folders)
    if launch.name in SCRIPTS:
        return Source("sd-scripts", {}, launch, file, folders, unset)
    if (config := _config_of(launch)) is not None:
        found = _find(config, folders)
        inner = _config(found, _read(found), folders)
        if inner.trainer not in ("diffusion-pipe", "onetrainer"):
            raise UserError(
                f"{launch.script} is unknown, though {config} is one of {inner.trainer}"
            )
        return Source(inner.trainer, inner.config, launch, found, folders, unset)
    raise UserError(_unknown_script(launch.name))


def _config_of(launch: Launch) -> str | None:
    """The file that diffusion-pipe's and OneTrainer's train.py are given."""
    if launch.name != "train.py":
        return None
    words = [part for word in launch.arguments for part in word.split("=", 1)]
    for option in ("--config", "--config-path", "--config_path"):
        if option in words[:-1]:
            return words[words.index(option) + 1]
    return None


def _find(text: str, folders: tuple[Path, ...]) -> Path:
    for folder in folders:
        if (folder / text).is_file():
            return folder / text
    raise UserError(
        f"{text} of the command line does not exist in {folders[0]}: give --cwd FOLDER, the folder "
        "that the command is run in"
    )


def find_config(text: str, folders: tuple[Path, ...]) -> Path:
    """The file of sd-scripts' `--config_file`, to which it appends `.toml` when missing."""
    return _find(text if text.endswith(".toml") else f"{text}.toml", folders)


def _unknown_script(name: str) -> str:
    if "control" in name or "lllite" in name:
        return f"{name} trains a ControlNet, which is not supported for Anima"
    if "textual_inversion" in name:
        return f"{name} is textual inversion, which is not supported for Anima"
    for start, model in OTHER_SCRIPTS.items():
        if name.startswith(start):
            return f"{name} trains {model}: {_ONLY_MODELS}"
    known = ", ".join(SCRIPTS)
    return f"{name} is no training script that importing knows: {known}, or train.py with a config"


def _config(path: Path, content: str, folders: tuple[Path, ...]) -> Source:
    parsed = parse_file(path, content)
    if isinstance(parsed, list) and parsed and isinstance(parsed[0], Mapping):
        if "prompt" in parsed[0]:
            raise UserError(f"{path.name} holds OneTrainer's samples: give the training config")
        raise UserError(f"{path.name} holds OneTrainer's concepts: give the config that names it")
    if not isinstance(parsed, dict) or not parsed:
        raise UserError(f"{path.name} holds no settings: expected a configuration of {TRAINERS}")
    return Source(_trainer(parsed, path.name), parsed, None, path, folders)


def _trainer(config: Mapping[str, Any], name: str) -> str:
    """The trainer whose configuration this is; `UserError` for all others."""
    model = config.get("model")
    if "training_method" in config or ("model_type" in config and "concept_file_name" in config):
        return "onetrainer"
    if isinstance(model, Mapping) and "type" in model:
        return "diffusion-pipe"
    if "directory" in config and isinstance(config["directory"], list):
        raise UserError(f"{name} is a dataset of diffusion-pipe: give the config that names it")
    if isinstance(config.get("datasets"), list):
        raise UserError(
            f"{name} is a dataset of sd-scripts, which is read as it is: "
            f"anima-fast train --dataset_config {name} ..."
        )
    if "LoRA_type" in config or "anima_checkbox" in config or "epoch" in config:
        return "kohya-gui"
    if "job" in config and "config" in config:
        raise UserError(f"{name} is a job of ai-toolkit: importing reads {TRAINERS}")
    keys = flat_names(config)
    known = {*specs(TrainOptions), *specs(FinetuneOptions), *ALIASES, *IGNORED, *REFUSED}
    if not keys & known:
        raise UserError(f"{name}: nothing in it is known: importing reads {TRAINERS}")
    return "sd-scripts"


def flat_names(config: Mapping[str, Any]) -> set[str]:
    """The keys of a configuration without their sections, with underscores."""
    names = set()
    for key, value in config.items():
        names |= flat_names(value) if isinstance(value, Mapping) else {key.replace("-", "_")}
    return names


def check_model(values: Mapping[str, Any], name: str) -> None:
    """Refuse options of sd-scripts that are for another model.

    Raises:
        UserError: with the model's name, or because nothing says that it is Anima.
    """
    module = str(values.get("network_module") or "")
    kind = str(values.get("model_train_type") or "")
    if kind and not kind.startswith("anima"):
        raise UserError(f"{name} is for {kind}: {_ONLY_MODELS}")
    if module in OTHER_MODULES:
        raise UserError(f"{name} trains {OTHER_MODULES[module]} ({module}): {_ONLY_MODELS}")
    if module == "networks.lora_anima" or kind or any(
        values.get(key) for key in ("qwen3", "qwen3_path", "qwen", "llm_adapter_path")
    ):  # fmt: skip
        return
    for key, model in OTHER_MODEL_KEYS.items():
        if values.get(key):
            raise UserError(f"{name} is for {model} ({key} is set): {_ONLY_MODELS}")
    raise UserError(
        f"{name} does not name the text encoder (qwen3), as every configuration for Anima does: "
        "add it, or give the whole command line"
    )
