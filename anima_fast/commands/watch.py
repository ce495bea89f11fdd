"""`anima-fast watch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anima_fast.commands.app import PREPARE, app


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
            show_default=False,
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
