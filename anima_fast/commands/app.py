"""The Typer application, and commands whose parameters come from a dataclass of options.

The other modules of this package register one command each theme: they parse, build options and
call, and import nothing heavy before their command runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from anima_fast import __version__
from anima_fast.errors import UserError
from anima_fast.options.command_line import read_words
from anima_fast.options.declare import Spec, specs
from anima_fast.options.other_names import BARE_FLAGS

# Typer's or click's own, whichever this Typer is built on.
UsageError = typer.BadParameter.__base__


class Commands(TyperGroup):
    """Turns errors of users into one line and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None
        except UsageError as error:
            # A group without a command shows its help page.
            if type(error).__name__ == "NoArgsIsHelpError":
                raise
            text = " ".join(error.format_message().split()).rstrip(".?")
            path = error.ctx.command_path if error.ctx else ctx.command_path
            typer.echo(f"error: {text}: see `{path} --help`", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="anima-fast",
    cls=Commands,
    help="Train LoRAs for the Anima image model on one GPU.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
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


def _declare_word(metavar: str, spec: Spec) -> inspect.Parameter:
    """The value that may stand alone as a Typer argument, for the help page."""
    declared = typer.Argument(metavar=metavar, help=spec.help, show_default=False)
    return inspect.Parameter(
        "word",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[str | None, declared],
    )


def option_command(
    name: str,
    cls: type,
    more: dict[str, Spec],
    allowed: Callable[[], frozenset[str]],
    *,
    word: tuple[str, str] | None = None,
    shown: Collection[str] | None = None,
) -> Callable:
    """Register a command whose parameters are the options of a dataclass.

    The decorated function gets one dictionary: option name -> text or list of texts as given.
    word: an option whose value may stand alone, and what the help page calls it. shown: the options
    on the help page beside `more`, all of them when it is None.
    """
    known = {**more, **specs(cls)}
    alone = word[0] if word else None

    class Command(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            if any(word in ("--help", "-h") for word in args):
                return super().parse_args(ctx, ["--help"])
            ctx.obj = read_words(args, known, others=allowed(), flags=BARE_FLAGS, word=alone)
            return super().parse_args(ctx, [])

    def register(function: Callable[[dict[str, Any]], None]) -> Callable:
        def command(context: typer.Context, **_shown: Any) -> None:
            function(context.obj)

        names = [n for n in known if shown is None or n in more or n in shown]
        parameters = [_declare(known[name]) for name in names]
        if word:
            parameters.insert(0, _declare_word(word[1], known[word[0]]))
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
