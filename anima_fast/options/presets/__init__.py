"""Presets: small TOML files of options, each with its reason in the comment above it.

    --preset character --preset 12gb        or        preset = ["character", "12gb"]

Options at the top or in any section are for both commands, those in `[train]` and `[finetune]` for
one. What is given by hand wins over all presets, and a later preset over an earlier one. An option
of a preset that contradicts one given by hand is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anima_fast.errors import UserError
from anima_fast.files import parse_config, read_text
from anima_fast.options.dataset_keys import KEYS
from anima_fast.options.declare import convert, nearest, specs
from anima_fast.options.rules import CHANGING_PIXELS
from anima_fast.options.run import FinetuneOptions, RunOptions, TrainOptions

FOLDER = Path(__file__).parent
COMMANDS: dict[str, type[RunOptions]] = {
    cls.command: cls for cls in (TrainOptions, FinetuneOptions)
}
# Option of a preset -> options that rule it out when given by hand.
RIVALS = {
    "gradient_checkpointing": ("recompute", "cpu_offload_checkpointing"),
    "recompute": (
        "gradient_checkpointing", "cpu_offload_checkpointing", "unsloth_offload_checkpointing",
    ),
    "blocks_to_swap": ("cpu_offload_checkpointing", "unsloth_offload_checkpointing"),
    "cpu_offload_checkpointing": ("blocks_to_swap", "unsloth_offload_checkpointing", "recompute"),
    "unsloth_offload_checkpointing": ("blocks_to_swap", "cpu_offload_checkpointing", "recompute"),
    "max_train_steps": ("max_train_epochs",),
    "max_train_epochs": ("max_train_steps",),
    "save_every_n_steps": ("save_every_n_epochs", "save_n_epoch_ratio"),
    "save_every_n_epochs": ("save_every_n_steps", "save_n_epoch_ratio"),
    "lr_scheduler": ("lr_scheduler_type",),
    "lr_warmup_steps": ("lr_scheduler", "lr_scheduler_type"),
    "optimizer_args": ("optimizer_type",),
    "sigmoid_scale": ("timestep_sampling",),
    "discrete_flow_shift": ("timestep_sampling",),
    "cache_latents": CHANGING_PIXELS,
    "cache_latents_to_disk": (*CHANGING_PIXELS, "cache_latents"),
    "cache_text_encoder_outputs": ("network_train_text_encoder_only", "token_warmup_step"),
    "cache_text_encoder_outputs_to_disk": (
        "network_train_text_encoder_only", "token_warmup_step", "cache_text_encoder_outputs",
        "text_encoder_lr",
    ),
    "network_train_unet_only": ("network_train_text_encoder_only", "text_encoder_lr"),
    "mixed_precision": ("full_bf16", "full_fp16"),
    "full_bf16": ("mixed_precision", "full_fp16", "weight_update"),
    "fused_backward_pass": (
        "gradient_accumulation_steps", "optimizer_type", "mixed_precision", "full_fp16",
    ),
    "keep_tokens": ("keep_tokens_separator",),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """An option of a preset; `command` is train, finetune, or "" for both."""

    name: str
    value: Any
    reason: str
    command: str = ""


@dataclass(frozen=True)
class Preset:
    """A preset: its name, the first comment of its file, its settings, and the file's text."""

    name: str
    about: str
    settings: tuple[Setting, ...]
    text: str


def preset_names() -> list[str]:
    """The presets of the package: purposes first, then cards by their memory."""
    names = [path.stem for path in FOLDER.glob("*.toml")]
    return sorted(names, key=lambda n: (n[0].isdigit(), int(re.sub(r"\D", "", n) or 0), n))


def load_preset(name: str) -> Preset:
    """Read a preset of the package, or a TOML file of the user by its path."""
    path = FOLDER / f"{name.lower()}.toml"
    if not re.fullmatch(r"\w+", name) or not path.is_file():
        path = Path(name)
        if path.suffix != ".toml":
            hint = nearest(name.lower(), preset_names())
            hint = f"{hint} " if hint.startswith("did") else ""
            known = ", ".join(preset_names())
            raise UserError(
                f"--preset {name} is unknown: {hint}use one of {known}, or the path of a .toml file"
            )
    text = read_text(path, "--preset")
    tables = parse_config(text, f"--preset {name}")
    reasons, about = _comments(text)
    settings = tuple(_settings(tables, "", reasons, path.name))
    return Preset(path.stem if path.parent == FOLDER else name, about, settings, text)


def _settings(
    table: Mapping[str, Any], section: str, reasons: Mapping[tuple[str, str], str], file: str
) -> Iterable[Setting]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{section}.{key}".lstrip("."), reasons, file)
            continue
        name = key.replace("-", "_")
        command = section if section in COMMANDS else ""
        classes = [COMMANDS[command]] if command else [*COMMANDS.values()]
        spec = next((specs(cls)[name] for cls in classes if name in specs(cls)), None)
        if spec is None or name == "preset":
            known = [n for cls in classes for n in specs(cls)]
            raise UserError(f"{file}: {key} is not an option of a run: {nearest(name, known)}")
        converted = convert(spec, value, f"{file}: {name}")
        yield Setting(name, converted, reasons.get((section, key), ""), command)


def _comments(text: str) -> tuple[dict[tuple[str, str], str], str]:
    """The comment above each key, by section and key, and the first comment of the file."""
    reasons: dict[tuple[str, str], str] = {}
    section, block, about, reason = "", [], "", ""
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("#"):
            block.append(line.lstrip("# ").strip())
            continue
        if header := re.fullmatch(r"\[\s*([\w.-]+)\s*\](\s*#.*)?", line):
            section, reason = header[1], ""
        elif key := re.match(r"([\w-]+)\s*=", line):
            # A key without a comment of its own belongs to the one above it.
            reason = " ".join(block) or reason
            reasons[section, key[1]] = reason
        elif not line:
            about = about or " ".join(block[: block.index("")] if "" in block else block)
            reason = ""
        block = []
    return reasons, about


def split_names(words: Iterable[str]) -> list[str]:
    """`["character,12gb"]` as names; a path with a comma in it is not split."""
    names = []
    for word in words:
        whole = word.lower().endswith(".toml") and Path(word).exists()
        names += [word] if whole else [part.strip() for part in word.split(",") if part.strip()]
    return names


def apply_presets(
    words: Iterable[str], by_hand: Mapping[str, Any], cls: type[RunOptions]
) -> tuple[dict[str, Any], list[str]]:
    """The options that presets set, to go below those given by hand, and a line about each.

    Args:
        words: the values of `--preset`.
        by_hand: the options of the command line and the configuration file, converted.
        cls: `TrainOptions` or `FinetuneOptions`.
    """
    chosen: dict[str, tuple[Any, str]] = {}
    lines = []
    for name in split_names(words):
        preset = load_preset(name)
        lines += _apply(preset, chosen, by_hand, cls)
    return {name: value for name, (value, _) in chosen.items()}, lines


def _apply(
    preset: Preset,
    chosen: dict[str, tuple[Any, str]],
    by_hand: Mapping[str, Any],
    cls: type[RunOptions],
) -> list[str]:
    lines, foreign = [], []
    for setting in preset.settings:
        name, value = setting.name, _for_this_machine(setting, by_hand)
        if setting.command not in ("", cls.command):
            continue
        if name not in specs(cls):
            foreign.append(name)
            continue
        rivals = [n for n in RIVALS.get(name, ()) if n in by_hand]
        if name in by_hand:
            if not _same(name, value, by_hand):
                lines.append(f"{name} = {shown(by_hand[name])} as given, instead of {shown(value)}")
        elif rivals:
            lines.append(f"{name} is left out, as {rivals[0]} is given")
        else:
            over = _replace(name, value, preset.name, chosen)
            over += _below_the_dataset_file(name, by_hand)
            reason = f" ({setting.reason})" if setting.reason else ""
            lines.append(f"{name} = {shown(value)}{over}{reason}")
    if foreign:
        lines.append(f"{', '.join(foreign)}: not options of {cls.command}, left out")
    return [f"preset {preset.name}: {line}" for line in lines or ["nothing is left to set"]]


def _same(name: str, value: Any, by_hand: Mapping[str, Any]) -> bool:
    """Whether an option given by hand is what the preset says; an alpha of 0 is the rank."""
    given = by_hand[name]
    rank = name == "network_alpha" and not value
    return given == value or (rank and given == by_hand.get("network_dim"))


def _replace(name: str, value: Any, preset: str, chosen: dict[str, tuple[Any, str]]) -> str:
    """Set an option; returns what it replaces of earlier presets, for the line about it."""
    beaten = [n for n in chosen if name in RIVALS.get(n, ()) and chosen[n][1] != preset]
    if name in chosen and chosen[name][0] != value:
        beaten.insert(0, name)
    over = [f"{n} = {shown(chosen[n][0])} of {chosen[n][1]}" for n in beaten]
    for other in beaten:
        del chosen[other]
    chosen[name] = value, preset
    return f", instead of {', '.join(over)}" if over else ""


def _below_the_dataset_file(name: str, by_hand: Mapping[str, Any]) -> str:
    """A dataset file is given by hand too, and its keys beat options."""
    key = next((key for key in KEYS.values() if key.option == name), None)
    if key is None or not by_hand.get("dataset_config"):
        return ""
    return f", unless the dataset file has {key.spec.name}"


def _for_this_machine(setting: Setting, by_hand: Mapping[str, Any]) -> Any:
    """`mlp` is a policy of the fused kernels: without them a preset means `block`."""
    if setting.name != "recompute" or setting.value != "mlp":
        return setting.value
    return "mlp" if _fused_blocks_run(by_hand) else "block"


def _fused_blocks_run(by_hand: Mapping[str, Any]) -> bool:
    kernels = by_hand.get("kernels", "auto")
    if kernels != "auto":
        # The run itself refuses kernels that this machine does not have.
        return kernels == "triton"
    import torch

    from anima_fast.device import uses_fused_blocks

    asked = str(by_hand.get("device") or "cuda")
    card = asked.startswith("cuda") and torch.cuda.is_available()
    device = torch.device("cuda" if card else "cpu")
    return uses_fused_blocks(kernels, device, compiled=by_hand.get("compile", False))


def shown(value: Any) -> str:
    """A value as it is written in a TOML file."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(shown(part) for part in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
