"""Commands for files: `convert` and `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anima_fast.adapters.names import DIALECTS
from anima_fast.commands.app import USE, app
from anima_fast.errors import UserError


def check_dialect(to: str) -> None:
    """Refuse a --to that is none of the dialects."""
    if to not in DIALECTS:
        raise UserError(f"--to {to}: use {', '.join(DIALECTS[:-1])} or {DIALECTS[-1]}")


@app.command("convert", rich_help_panel=USE)
def _convert(
    src: Annotated[Path | None, typer.Argument(help="Network file to read.")] = None,
    dst: Annotated[Path | None, typer.Argument(help="Network file to write.")] = None,
    input: Annotated[Path | None, typer.Option(help="The same as SRC.")] = None,
    output: Annotated[Path | None, typer.Option(help="The same as DST.")] = None,
    to: Annotated[
        str | None, typer.Option(help="kohya, comfyui or diffusers.", show_default=False)
    ] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="ComfyUI to kohya names.")] = False,
    fold_alpha: Annotated[
        bool,
        typer.Option("--fold_alpha", "--fold-alpha", help="Multiply alpha / rank into weights."),
    ] = False,
) -> None:
    """Convert a LoRA, LoHa, LoKr or DoRA file between kohya, ComfyUI and diffusers names."""
    from anima_fast.tools.convert import convert_file

    if to is not None:
        check_dialect(to)
    if reverse and to not in (None, "kohya"):
        raise UserError(f"--reverse means --to kohya: give it or --to {to}")
    words = [path for path in (input, src, output, dst) if path is not None]
    source = input or src
    # `convert --input A B` and `convert A --output B` both leave one positional word.
    target = output or (src if input and dst is None else dst)
    if source is None or target is None or len(words) != 2:
        raise UserError("convert needs two files: convert SRC DST, or --input SRC --output DST")
    dialect = convert_file(source, target, to=to, reverse=reverse, fold_alpha=fold_alpha)
    typer.echo(f"wrote {target} ({dialect} names)")


@app.command("inspect", rich_help_panel=USE)
def _inspect(
    file: Annotated[Path, typer.Argument(help="Any checkpoint, LoRA or cache file.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a model, LoRA or cache file holds and which programs load it."""
    from json import dumps

    from anima_fast.inspection.description import inspection_text
    from anima_fast.inspection.file import inspect_file

    found = inspect_file(file)
    as_json = dumps(found, indent=1, ensure_ascii=False, default=str)
    typer.echo(as_json if json else inspection_text(found))
