"""`anima-fast sample`."""

from __future__ import annotations

from typing import Any

from anima_fast.commands.app import USE, option_command
from anima_fast.errors import UserError
from anima_fast.options.declare import convert_all
from anima_fast.options.other_names import OUTSIDE
from anima_fast.options.sample import SampleOptions


@option_command(
    "sample", SampleOptions, allowed={"pretrained_model_name_or_path", *OUTSIDE}, panel=USE
)
def _sample(values: dict[str, Any]) -> None:
    """Render images from prompts, with or without LoRA files; grids, image to image.

    An existing file of the same name is replaced; several pictures are numbered on.
    """
    for name in values.keys() & OUTSIDE.keys():
        raise UserError(f"--{name}: {OUTSIDE[name]}")
    from anima_fast.sampling import run_sample

    if "pretrained_model_name_or_path" in values:
        values.setdefault("dit", values["pretrained_model_name_or_path"])
        del values["pretrained_model_name_or_path"]
    if not values.keys() & {"prompt", "prompts"}:
        raise UserError("--prompt is required: what to show, or a file of prompts with --prompts")
    options = SampleOptions.of(convert_all(SampleOptions, values, "--", text=True))
    for name in ("dit", "qwen3", "vae"):
        if not getattr(options, name):
            raise UserError(f"--{name} is required: give the path of that model file")
    run_sample(options)
