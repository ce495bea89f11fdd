"""Commands for runs: `presets`, `train`, `plan`, `finetune` and `watch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from anima_fast.commands.app import PREPARE, app, option_command
from anima_fast.console import configure_console
from anima_fast.errors import stop_status
from anima_fast.options.files import OTHER_NAMES, refused, resolve_train_options, write_config
from anima_fast.options.run import FileOptions, FinetuneOptions, TrainOptions


@app.command("presets", rich_help_panel=PREPARE)
def _presets(
    name: Annotated[
        str | None, typer.Argument(help="Preset, or TOML file, to print with its reasons.")
    ] = None,
) -> None:
    """List the presets of `--preset`, or print one with the reason of every line."""
    from anima_fast.options.presets import load_preset, preset_names

    if name is not None:
        typer.echo(load_preset(name).text.rstrip("\n"))
        return
    for known in preset_names():
        typer.echo(f"{known:10} {load_preset(known).about}")
    typer.echo("\nanima-fast train --preset character,12gb ...    anima-fast presets character")


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
        raise typer.Exit(stop_status(result.interrupted_by))


@app.command("watch", rich_help_panel=PREPARE)
def _watch(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Output folder of the run (--output_dir).")
    ],
    port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Port of the page; 0 takes any free one (default 7860, or the next free one).",
        ),
    ] = None,
    open_browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in the browser.")
    ] = False,
) -> None:
    """Follow a run on a local web page: curves, speed, memory, previews, log and dataset.

    It only reads the folder's files: start and stop it at any time.
    """
    from anima_fast.reports.watch.server import watch

    watch(out, port=port, open_browser=open_browser, say=typer.echo)
