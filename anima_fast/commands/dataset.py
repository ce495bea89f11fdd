"""`anima-fast dataset`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import typer

from anima_fast.commands.app import PREPARE, option_command
from anima_fast.errors import UserError
from anima_fast.options.data import CaptionOptions, DatasetOptions, ImageOptions, MaskOptions
from anima_fast.options.declare import convert_all, option, specs
from anima_fast.options.files import OTHER_NAMES, resolve_train_options
from anima_fast.options.run import TrainOptions

_own = partial(option, "This command")


@dataclass(frozen=True)
class ReportOptions:
    """Options of the command that are not part of a run."""

    config_file: str | None = _own(None, "TOML file with options of `train`.")
    html: str | None = _own(None, "Also write a page with thumbnails and crops to this file.")
    html_images: int | None = _own(None, "Thumbnails on the page, at most (default 400).", low=0)
    json: bool = _own(False, "Print everything as JSON instead of tables.")
    masks: str | None = _own(None, "Draw the loss masks over the images, into this folder.")
    headers_only: bool = _own(False, "Decode no image: no search for damage and duplicates.")
    strict: bool = _own(
        False, "End with status 1 for any problem, not only for what stops training."
    )


# Options of `train` that say what is trained; the others are accepted and change nothing here.
_SHOWN = frozenset(
    {
        name
        for group in (DatasetOptions, CaptionOptions, ImageOptions, MaskOptions)
        for name in specs(group)
    }
    - {
        "max_data_loader_n_workers", "cache_info", "debug_dataset", "strict_data",
        "prior_loss_weight",
    }
    | {
        "qwen3", "qwen3_tokenizer_path", "t5_tokenizer_path", "models_dir",
        "qwen3_max_token_length", "t5_max_token_length", "cache_latents", "validation_split",
        "validation_seed", "masked_loss_normalize", "max_train_steps",
        "max_train_epochs", "gradient_accumulation_steps",
    }
)  # fmt: skip


@option_command(
    "dataset",
    ReportOptions,
    TrainOptions,
    allowed=OTHER_NAMES,
    word=("dataset_config", "DATA.toml"),
    hidden=specs(TrainOptions).keys() - _SHOWN,
    panel=PREPARE,
)
def _dataset(values: dict[str, Any]) -> None:
    """Show what would be trained: buckets, crops, captions, and what is wrong with the data.

    No model is loaded. Takes the options of `train`, so a whole training command may be pasted.
    Ends with status 1 when something would stop training.
    """
    from anima_fast.reports.dataset.run import report_dataset

    own = convert_all(ReportOptions, values, "--", text=True)
    run = {name: value for name, value in values.items() if name not in own}
    for name in ("html", "masks"):
        if name in own and not own[name]:
            raise UserError(f"--{name} needs a name after it")
    config_file = own.pop("config_file", None)
    options, _ = resolve_train_options(run, config_file, complete=False, cls=TrainOptions)
    stopping = report_dataset(options, **{n: v for n, v in own.items() if n != "strict"})
    if any(stopping) or (own.get("strict") and stopping):
        raise typer.Exit(1)
