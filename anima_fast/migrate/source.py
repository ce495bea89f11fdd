"""What a source is: a command line, a script with one, or a configuration of a known trainer.

The content tells the kind, not the file's name. A configuration for another model is refused by
that model's name.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anima_fast.errors import UserError
from anima_fast.files import parse_config
from anima_fast.migrate.command import EXAMPLE, Launch, find_launch
from anima_fast.migrate.ledger import is_rows
from anima_fast.migrate.rows import OPTIONS
from anima_fast.migrate.shell import Command, split_commands, variable_names
from anima_fast.options.other_names import ALIASES, IGNORED, REFUSED

TRAINERS = "sd-scripts, kohya_ss' GUI, diffusion-pipe and OneTrainer"
CONFIGS, TEXTS = (".toml", ".json"), (".sh", ".bash", ".bat", ".cmd", ".ps1", ".txt", ".command")
_OTHER_FILES = {
    ".yaml": "YAML files are ai-toolkit's or SimpleTuner's",
    ".yml": "YAML files are ai-toolkit's or SimpleTuner's",
    ".safetensors": "a model file: `anima-fast inspect` reads it",
}
ONLY = "anima_fast trains the Anima image model only"
# Script of sd-scripts -> the command here.
SCRIPTS = {"anima_train_network.py": "train", "anima_train.py": "finetune"}
# Other models, by the beginnings of their names in scripts, modules and configurations.
_MODELS = {
    "sdxl": "SDXL", "stable_diffusion_xl": "SDXL", "sd3": "Stable Diffusion 3",
    "stable_diffusion_3": "Stable Diffusion 3", "stable_diffusion": "Stable Diffusion",
    "stable_cascade": "Stable Cascade", "train_network": "Stable Diffusion 1 and 2",
    "train_db": "Stable Diffusion 1 and 2", "fine_tune": "Stable Diffusion 1 and 2",
    "flux_kontext": "FLUX.1 Kontext", "flux_2": "FLUX.2", "flux2": "FLUX.2", "flux": "FLUX.1",
    "lumina": "Lumina Image 2.0", "hunyuan_image": "HunyuanImage", "hunyuan": "HunyuanVideo",
    "hv_": "HunyuanVideo", "chroma": "Chroma", "wan": "Wan", "fpack": "FramePack",
    "qwen": "Qwen-Image", "zimage": "Z-Image", "z_image": "Z-Image", "kandinsky": "Kandinsky",
    "hidream": "HiDream", "hi_dream": "HiDream", "ltx": "LTX-Video", "cosmos": "Cosmos",
    "omnigen": "OmniGen2", "auraflow": "AuraFlow", "krea": "Krea 2", "ernie": "ERNIE-Image",
    "longcat": "LongCat-Video", "ideogram": "Ideogram 4", "minimax": "MiniMax H3",
    "pixart_alpha": "PixArt Alpha", "pixart_sigma": "PixArt Sigma", "sana": "Sana",
    "wuerstchen": "Wuerstchen 2",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """What was found.

    Attributes:
        trainer: sd-scripts, kohya-gui, diffusion-pipe or onetrainer.
        config: the parsed file; empty for a command line alone.
        launch: the command line, if there is one.
        file: the configuration or the script file; None for a text.
        folders: where relative paths may start, the most likely first.
        unset: shell variables in the text that it does not set.
    """

    trainer: str
    config: dict[str, Any] = field(default_factory=dict)
    launch: Launch | None = None
    file: Path | None = None
    folders: tuple[Path, ...] = ()
    unset: tuple[str, ...] = ()


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
        return _launched(find_launch([Command(text)]), None, here)
    path = Path(text.strip().strip("\"'")).expanduser()
    if text == "-" or not _is_path(path, text):
        return _commands(sys.stdin.read() if text == "-" else text, None, here)
    if path.suffix.lower() in _OTHER_FILES:
        what = _OTHER_FILES[path.suffix.lower()]
        raise UserError(f"{path.name}: {what}; importing reads {TRAINERS}")
    content = _read(path)
    # Configurations lie in a folder of the trainer, or a folder in it.
    folders = here if folder else (*here, *path.resolve().parents[:3])
    if path.suffix.lower() in CONFIGS or _looks_like_json(content):
        return _config(path, content, folders)
    return _commands(content, path, folders)


def _is_path(path: Path, text: str) -> bool:
    if "\n" in text or len(text) > 4000 or not text.strip():
        return False
    try:
        if path.is_file():
            return True
    except OSError:
        return False
    if path.is_dir():
        raise UserError(f"{text} is a folder: give the configuration file in it")
    named = path.suffix.lower() in (*CONFIGS, *TEXTS, *_OTHER_FILES) and "--" not in text
    if named and not re.search(r"\.py\b", text):
        raise UserError(f"{text} does not exist: check the path")
    return False


def _read(path: Path) -> str:
    # Windows' own editors write UTF-16, and PowerShell does.
    for encoding in ("utf-8-sig", "utf-16"):
        try:
            return path.read_text(encoding=encoding)
        except UnicodeError:
            continue
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    raise UserError(f"{path} is no text in UTF-8: save it as UTF-8")


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
    commands = split_commands(text, file.resolve().parent if file else None)
    return _launched(find_launch(commands), file, folders)


def _launched(launch: Launch, file: Path | None, folders: tuple[Path, ...]) -> Source:
    unset = tuple(dict.fromkeys(variable_names(" ".join(launch.arguments))))
    if launch.folder:
        # A script changes to the trainer's folder from its own, or from the current one.
        folders = (*(folder / launch.folder for folder in folders[::-1]), *folders)
    if launch.name in SCRIPTS:
        return Source("sd-scripts", {}, launch, file, folders, unset)
    if (config := _config_of(launch)) is not None:
        found = named_file(config, folders)
        inner = _config(found, _read(found), folders)
        if inner.trainer not in ("diffusion-pipe", "onetrainer"):
            raise UserError(
                f"{launch.script} is unknown, though {config} is one of {inner.trainer}"
            )
        return Source(inner.trainer, inner.config, launch, found, folders, unset)
    raise UserError(_unknown_script(launch.name))


def _config_of(launch: Launch) -> str | None:
    """The file that diffusion-pipe's and OneTrainer's train.py are given."""
    words = [part for word in launch.arguments for part in word.split("=", 1)]
    for option in ("--config", "--config-path", "--config_path"):
        if launch.name == "train.py" and option in words[:-1]:
            return words[words.index(option) + 1]
    return None


def find_file(name: str, folders: tuple[Path, ...]) -> Path | None:
    """The first file of this name below the folders, if there is one."""
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def named_file(name: str, folders: tuple[Path, ...]) -> Path:
    """A file that a command line names, or `UserError`."""
    if (found := find_file(name, folders)) is None:
        raise UserError(
            f"{name} of the command line does not exist in {folders[0]}: give --cwd FOLDER, the "
            "folder that the command is run in"
        )
    return found


def _unknown_script(name: str) -> str:
    if "control" in name or "lllite" in name:
        return f"{name} trains a ControlNet, which is not supported for Anima"
    if "textual_inversion" in name:
        return f"{name} is textual inversion, which is not supported for Anima"
    if model := other_model(name):
        return f"{name} trains {model}: {ONLY}"
    known = ", ".join(SCRIPTS)
    return f"{name} is no training script that importing knows: {known}, or train.py with a config"


def other_model(name: str) -> str:
    """The title of another model that a name begins with; "" for none."""
    titles = (title for start, title in _MODELS.items() if name.lower().startswith(start))
    return next(titles, "")


def _config(path: Path, content: str, folders: tuple[Path, ...]) -> Source:
    parsed = parse_file(path, content)
    if is_rows(parsed):
        what = "samples" if "prompt" in parsed[0] else "concepts"
        raise UserError(f"{path.name} holds OneTrainer's {what}: give the config that names it")
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
    if isinstance(config.get("directory"), list):
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
    if not _names(config) & {*OPTIONS, *ALIASES, *IGNORED, *REFUSED}:
        raise UserError(f"{name}: nothing in it is known: importing reads {TRAINERS}")
    return "sd-scripts"


def _names(config: Mapping[str, Any]) -> set[str]:
    """The keys of a configuration without their sections, with underscores."""
    names = set()
    for key, value in config.items():
        names |= _names(value) if isinstance(value, Mapping) else {key.replace("-", "_")}
    return names
