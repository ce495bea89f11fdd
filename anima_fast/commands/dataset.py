"""`anima-fast dataset`."""

from __future__ import annotations

from typing import Any

import typer

from anima_fast.commands.app import option_command
from anima_fast.errors import UserError
from anima_fast.options.data import (
    CaptionOptions,
    DatasetOptions,
    ImageOptions,
    MaskOptions,
)
from anima_fast.options.declare import Spec, convert, specs
from anima_fast.options.run import TrainOptions


def _spec(name: str, kind: str, text: str, **limits: Any) -> Spec:
    defaults = {"choices": (), "low": None, "high": None, "optional": True, "secret": False}
    return Spec(name, kind, None, text, "This command", **{**defaults, **limits})


# Options of the command that are no part of a run.
_OWN = {
    spec.name: spec
    for spec in (
        _spec("config_file", "str", "TOML file with options of `train`."),
        _spec("html", "str", "Also write a page with thumbnails and crops to this file."),
        _spec("html_images", "int", "Thumbnails on the page, at most (default 400).", low=0),
        _spec("json", "bool", "Print everything as JSON instead of tables."),
        _spec("masks", "str", "Draw the loss masks over the images, into this folder."),
        _spec("headers_only", "bool", "Decode no image: no search for damage and duplicates."),
        _spec("strict", "bool", "End with status 1 when there is a problem."),
    )
}
_GROUPS = (DatasetOptions, CaptionOptions, ImageOptions, MaskOptions)
# Options of `train` that say what is trained; the others are accepted and change nothing here.
_SHOWN = frozenset(
    {name for group in _GROUPS for name in specs(group)}
    - {"max_data_loader_n_workers", "cache_info", "debug_dataset", "prior_loss_weight"}
    | {
        "qwen3", "qwen3_tokenizer_path", "t5_tokenizer_path", "models_dir",
        "qwen3_max_token_length", "t5_max_token_length", "cache_latents", "validation_split",
        "validation_seed", "max_train_steps", "max_train_epochs", "gradient_accumulation_steps",
    }
)  # fmt: skip


def _other_names() -> frozenset[str]:
    from anima_fast.options.files import OTHER_NAMES

    return OTHER_NAMES


@option_command(
    "dataset",
    TrainOptions,
    _OWN,
    _other_names,
    word=("dataset_config", "DATA.toml"),
    shown=_SHOWN,
)
def _dataset(values: dict[str, Any]) -> None:
    """Show what would be trained: buckets, crops, captions, and what is wrong with the data.

    No model is loaded. Takes the options of `train`, so a whole training command may be pasted.
    """
    from anima_fast.options.files import resolve_train_options
    from anima_fast.reports.dataset.run import report_dataset

    own = {
        name: convert(_OWN[name], values.pop(name), f"--{name}", text=True)
        for name in list(values)
        if name in _OWN
    }
    for name in ("html", "masks"):
        if name in own and not own[name]:
            raise UserError(f"--{name} needs a name after it")
    config_file = own.pop("config_file", None)
    options, _ = resolve_train_options(values, config_file, complete=False, cls=TrainOptions)
    is_clean = report_dataset(options, **{n: v for n, v in own.items() if n != "strict"})
    if own.get("strict") and not is_clean:
        raise typer.Exit(1)
