"""`anima-fast sample`."""

from __future__ import annotations

from typing import Any

from anima_fast.commands.app import option_command
from anima_fast.errors import UserError
from anima_fast.option_groups.base import specs
from anima_fast.options import SampleOptions


@option_command("sample", SampleOptions, {}, lambda: frozenset({"pretrained_model_name_or_path"}))
def _sample(values: dict[str, Any]) -> None:
    """Render an image from a prompt, with or without LoRA files."""
    from anima_fast.option_groups.base import convert
    from anima_fast.sampling import run_sample

    if "pretrained_model_name_or_path" in values:
        values.setdefault("dit", values["pretrained_model_name_or_path"])
        del values["pretrained_model_name_or_path"]
    known = specs(SampleOptions)
    options = SampleOptions(
        **{name: convert(known[name], v, f"--{name}", text=True) for name, v in values.items()}
    )
    for name in ("dit", "qwen3", "vae"):
        if not getattr(options, name):
            raise UserError(f"--{name} is required: give the path of that model file")
    run_sample(options)
