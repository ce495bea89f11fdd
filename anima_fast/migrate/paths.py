"""Relative paths of a source: which folder they are meant from, and what they are here.

sd-scripts and diffusion-pipe read them from the folder they are started in, which a configuration
does not name. So the folder is looked for: the first of some candidates below which the most of the
named files exist. Paths become absolute from there; where nothing is found they stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath


def is_relative(text: str) -> bool:
    """Whether a path depends on a folder, on any system: `C:\\x`, `/x`, `~/x` and `$X` do not."""
    windows = PureWindowsPath(text)
    elsewhere = windows.drive or windows.root or text.startswith(("~", "$", "%"))
    return not (PurePosixPath(text).is_absolute() or elsewhere)


@dataclass(frozen=True)
class Paths:
    """The folder that relative paths are meant from; None leaves them as they are."""

    base: Path | None = None

    @classmethod
    def find(cls, texts: Iterable[str], candidates: Sequence[Path]) -> Paths:
        """The candidate below which the most of the relative paths exist."""
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


def _join(base: Path, text: str) -> str:
    if os.name != "nt":
        # A backslash is part of a file name here, and was a separator where the text was written.
        text = text.replace("\\", "/")
    return os.path.normpath(os.path.join(os.path.abspath(base), text))
