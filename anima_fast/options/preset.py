"""Presets: options by the name of what is trained, or of the card (see `anima_fast/presets`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from anima_fast.options.declare import option

_preset = partial(option, "Configuration file")


@dataclass(frozen=True)
class PresetOptions:
    """Which presets a run has; their settings are options like any other."""

    preset: tuple[str, ...] = _preset(
        (),
        "Presets, several with commas or spaces: style, character or concept; 8gb, 12gb, 16gb or "
        "24gb; or a TOML file of your own. What is given by hand wins.",
    )
