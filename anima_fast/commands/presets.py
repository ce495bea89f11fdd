"""`anima-fast presets`: what `--preset` offers."""

from __future__ import annotations

from typing import Annotated

import typer

from anima_fast.commands.app import PREPARE, app


@app.command("presets", rich_help_panel=PREPARE)
def _presets(
    name: Annotated[
        str | None,
        typer.Argument(help="Preset, or TOML file, to print with its reasons.", show_default=False),
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
