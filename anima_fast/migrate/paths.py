"""Relative paths of a source: which folder they start from, and what they are here.

sd-scripts and diffusion-pipe read them from the folder that they are started in, which no
configuration names. So it is looked for: the first of some candidates that has the most of the
named files. Paths become absolute from there; where nothing is found they stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

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
    return not (PurePosixPath(text).is_absolute() or elsewhere)


@dataclass(frozen=True)
class Paths:
    """The folder that relative paths start from; None leaves them as they are."""

    base: Path | None = None

    @classmethod
    def find(cls, texts: Iterable[str], candidates: Sequence[Path]) -> Paths:
        """The candidate that has the most of the relative paths."""
        relative = [text for text in texts if text and is_relative(text)]
        counts = [sum(os.path.exists(_join(base, t)) for t in relative) for base in candidates]
        best = max(counts, default=0)
        return cls(candidates[counts.index(best)] if best else None)

    def resolve(self, text: str) -> tuple[str, str]:
        """A path as it is written here, and why it was changed ("" when it was not)."""
        if text.startswith("~"):
            return os.path.expanduser(text), "~ is your home folder"
        if self.base is None or not text or not is_relative(text):
            return text, ""
        return _join(self.base, text), f"relative paths are read from {self.base}"

    def resolve_all(self, value: Any) -> tuple[Any, str]:
        """The same for a path, or for a list of them."""
        if not isinstance(value, (list, tuple)):
            return self.resolve(str(value))
        found = [self.resolve(str(text)) for text in value]
        return [path for path, _ in found], next((why for _, why in found if why), "")


def _join(base: Path, text: str) -> str:
    if os.name != "nt":
        # A backslash is part of a file name here, and was a separator where the text was written.
        text = text.replace("\\", "/")
    return os.path.normpath(os.path.join(os.path.abspath(base), text))
