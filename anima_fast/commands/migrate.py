"""`anima-fast import-kohya`: configurations of other trainers as ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from anima_fast.commands.app import PREPARE, app

# Options that take a word of their own.
_WITH_VALUE = ("--out", "--cwd")


class _TakesCommandLines(TyperCommand):
    """Everything after the first word is the source when that word begins a command line.

    So `import-kohya accelerate launch x.py --a=b` works without quotes around the command.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        at = 0
        while at < len(args) and args[at].startswith("--"):
            at += 2 if args[at] in _WITH_VALUE else 1
        rest = args[at:]
        if len(rest) > 1 and " " not in rest[0] and any(w.endswith(".py") for w in rest):
            ctx.meta["words"] = tuple(rest)
            args = [*args[:at], "words"]
        return super().parse_args(ctx, args)


@app.command("import", cls=_TakesCommandLines, hidden=True, rich_help_panel=PREPARE)
@app.command("import-kohya", cls=_TakesCommandLines, rich_help_panel=PREPARE)
def _import(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A training command in quotes, a file with one (.sh, .bat, .ps1), a config file "
            "(.toml, .json), or - for standard input.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="TOML file to write, or a folder (default: here).")
    ] = None,
    cwd: Annotated[
        Path | None,
        typer.Option(help="Folder that the other trainer was started in, for relative paths."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files.")] = False,
) -> None:
    """Turn a command or config of sd-scripts, kohya_ss, diffusion-pipe or OneTrainer into ours.

    Says what was taken over, what was changed and why, and what was dropped.
    """
    from anima_fast.errors import UserError
    from anima_fast.migrate.importer import import_config

    if cwd is not None and not cwd.is_dir():
        raise UserError(f"--cwd {cwd} is not a folder: give the one that the trainer is started in")
    words = context.meta.get("words")
    import_config(words or source, out, folder=cwd, force=force, say=typer.echo)
