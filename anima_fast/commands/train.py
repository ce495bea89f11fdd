"""`anima-fast train`, `anima-fast plan` and `anima-fast finetune`."""

from __future__ import annotations

from typing import Any

import typer

from anima_fast.commands.app import PREPARE, option_command
from anima_fast.console import configure_console
from anima_fast.options.files import OTHER_NAMES, refused, resolve_train_options, write_config
from anima_fast.options.run import FileOptions, FinetuneOptions, TrainOptions


@option_command("train", FileOptions, TrainOptions, allowed=OTHER_NAMES, panel=PREPARE)
def _train(values: dict[str, Any]) -> None:
    """Train a LoRA. Names may be written with hyphens, and be keys of a TOML file too."""
    _run(TrainOptions, values)


@option_command("plan", FileOptions, TrainOptions, allowed=OTHER_NAMES, panel=PREPARE)
def _plan(values: dict[str, Any]) -> None:
    """Print the memory that `train` with the same options would take, and train nothing."""
    _run(TrainOptions, values, plan=True)


@option_command(
    "finetune",
    FileOptions,
    FinetuneOptions,
    allowed={*OTHER_NAMES, *refused(FinetuneOptions)},
    panel=PREPARE,
)
def _finetune(values: dict[str, Any]) -> None:
    """Train all weights of the model, not a LoRA. Options as those of `train`."""
    _run(FinetuneOptions, values)


def _run(cls: type[Any], values: dict[str, Any], *, plan: bool = False) -> None:
    config_file = values.pop("config_file", None)
    if values.pop("output_config", "false").lower() == "true":
        options, _ = resolve_train_options(values, None, complete=False, cls=cls)
        typer.echo(f"wrote {write_config(options, config_file)}")
        return
    options, notices = resolve_train_options(values, config_file, cls=cls)
    log = configure_console(
        options.console_log_level, options.console_log_file, simple=options.console_log_simple
    )
    for notice in notices:
        # What a preset sets was asked for; everything else may come as a surprise.
        (log.info if notice.startswith("preset ") else log.warning)(notice)
    if plan or options.plan_memory:
        from anima_fast.training.planning import show_memory

        show_memory(options, say=typer.echo)
        return
    from anima_fast.training.loop import train

    result = train(options)
    if result is not None and result.interrupted_by is not None:
        raise typer.Exit(128 + result.interrupted_by)
