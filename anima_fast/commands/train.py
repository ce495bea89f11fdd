"""`anima-fast train` and `anima-fast finetune`."""

from __future__ import annotations

from typing import Any

import typer

from anima_fast.commands.app import option_command
from anima_fast.options.declare import Spec
from anima_fast.options.run import FinetuneOptions, TrainOptions

# Options of the commands that are no part of a run.
_FILE_SPECS = {
    name: Spec(name, kind, None, text, "Configuration file", (), None, None, True, False)
    for name, kind, text in (
        ("config_file", "str", "TOML file with options; the command line beats it."),
        ("output_config", "bool", "Write the options to --config_file and stop."),
    )
}


def _other_names(cls: type) -> frozenset[str]:
    from anima_fast.options.files import OTHER_NAMES, refused

    return OTHER_NAMES | frozenset(refused(cls))


@option_command("train", TrainOptions, _FILE_SPECS, lambda: _other_names(TrainOptions))
def _train(values: dict[str, Any]) -> None:
    """Train a LoRA. Names may be written with hyphens, and stand in a TOML file too."""
    _run(TrainOptions, values)


@option_command("plan", TrainOptions, _FILE_SPECS, lambda: _other_names(TrainOptions))
def _plan(values: dict[str, Any]) -> None:
    """Print the memory that `train` with the same options would take, and train nothing."""
    _run(TrainOptions, values | {"plan_memory": "true"})


@option_command("finetune", FinetuneOptions, _FILE_SPECS, lambda: _other_names(FinetuneOptions))
def _finetune(values: dict[str, Any]) -> None:
    """Train all weights of the model, not a LoRA. Options as those of `train`."""
    _run(FinetuneOptions, values)


def _run(cls: type, values: dict[str, Any]) -> None:
    from anima_fast.console import configure_console
    from anima_fast.options.files import resolve_train_options, write_config

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
    if options.plan_memory:
        from anima_fast.training.planning import show_memory

        show_memory(options, say=typer.echo)
        return
    from anima_fast.training.loop import train

    result = train(options)
    if result is not None and result.interrupted_by is not None:
        raise typer.Exit(128 + result.interrupted_by)
