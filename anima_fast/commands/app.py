"""The Typer application, and commands whose parameters come from a dataclass of options.

The other modules of this package register one command each theme: they parse, build options and
call, and import nothing heavy before their command runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from anima_fast import __version__
from anima_fast.errors import UserError
from anima_fast.option_groups.base import Spec, specs
from anima_fast.option_groups.tables import BARE_FLAGS
from anima_fast.option_words import read_words


class Commands(TyperGroup):
    """Turns errors of users into one line and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="anima-fast",
    cls=Commands,
    help="Train LoRAs for the Anima image model on one GPU.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _declare(spec: Spec) -> inspect.Parameter:
    """An option as a Typer parameter. It stays text: `option_groups.base.convert` reads it."""
    plain = {"bool": bool, "words": list[str], "numbers": list[str]}.get(spec.kind, str)
    default = "" if spec.default in (None, "", (), False) else f" (default {spec.default})"
    declared = typer.Option(
        f"--{spec.name}",
        help=spec.help + default,
        rich_help_panel=spec.group,
        metavar=spec.metavar or None,
        show_default=False,
    )
    return inspect.Parameter(
        spec.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[plain | None, declared],
    )


def option_command(
    name: str, cls: type, more: dict[str, Spec], allowed: Callable[[], frozenset[str]]
) -> Callable:
    """Register a command whose parameters are the options of a dataclass.

    The decorated function gets one dictionary: option name -> text or list of texts as given.
    """
    known = {**more, **specs(cls)}

    class Command(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            if any(word in ("--help", "-h") for word in args):
                return super().parse_args(ctx, ["--help"])
            ctx.obj = read_words(args, known, others=allowed(), flags=BARE_FLAGS)
            return super().parse_args(ctx, [])

    def register(function: Callable[[dict[str, Any]], None]) -> Callable:
        def command(context: typer.Context, **_shown: Any) -> None:
            function(context.obj)

        parameters = [_declare(spec) for spec in known.values()]
        context = inspect.Parameter(
            "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
        )
        command.__signature__ = inspect.Signature([context, *parameters])
        command.__annotations__ = {p.name: p.annotation for p in (context, *parameters)}
        app.command(name, cls=Command, help=function.__doc__)(command)
        return function

    return register


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"anima-fast {__version__}")
        raise typer.Exit()
