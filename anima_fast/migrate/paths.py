"""Relative paths of a source: which folder they start from, and what they are here.

sd-scripts and diffusion-pipe read them from the folder that they are started in, which no
configuration names. So the folder is looked for: the one that has the most of the named files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

# Our options that are paths.
PATHS = frozenset({
    "pretrained_model_name_or_path", "qwen3", "vae", "llm_adapter_path", "t5_tokenizer_path",
    "qwen3_tokenizer_path", "models_dir", "dataset_config", "train_data_dir", "reg_data_dir",
    "in_json", "conditioning_data_dir", "network_weights", "base_weights", "output_dir",
    "logging_dir", "log_tracker_config", "console_log_file", "cache_dir", "sample_prompts",
})  # fmt: skip


def is_relative(text: str) -> bool:
    """Whether a path depends on a folder, on any system: `C:\\x`, `/x`, `~/x` and `$X` do not."""
    windows = PureWindowsPath(text)
    elsewhere = windows.drive or windows.root or text.startswith(("~", "$", "%"))
    return bool(text) and not (PurePosixPath(text).is_absolute() or elsewhere)


def find_base(texts: Iterable[str], candidates: Sequence[Path]) -> Path | None:
    """The candidate that has the most of the relative paths; None where nothing is found."""
    relative = [text for text in texts if is_relative(text)]
    counts = [sum(os.path.exists(_join(base, t)) for t in relative) for base in candidates]
    return candidates[counts.index(max(counts))] if any(counts) else None


def resolve(text: str, base: Path | None) -> tuple[str, str]:
    """A path as it is written here, and why it was changed ("" when it was not)."""
    if text.startswith("~"):
        return os.path.expanduser(text), "~ is your home folder"
    if base is None or not is_relative(text):
        return text, ""
    return _join(base, text), f"relative paths are read from {base}"


def _join(base: Path, text: str) -> str:
    if os.name != "nt":
        # A backslash is part of a file name here, and was a separator where the text was written.
        text = text.replace("\\", "/")
    return os.path.normpath(os.path.join(os.path.abspath(base), text))
