"""The Typer application, and commands whose parameters come from dataclasses of options.

Each other module of this package registers the commands of one theme: they parse, build options and
call, and import nothing heavy before their command runs.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import sys
from collections.abc import Callable, Collection
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from anima_fast import __version__
from anima_fast.errors import UserError
from anima_fast.options.command_line import read_words
from anima_fast.options.declare import Spec, specs
from anima_fast.options.other_names import BARE_FLAGS

# Panels of the help page.
PREPARE, USE, MACHINE = "Prepare and train", "Use", "This machine"

# How writing to stdout fails where it is a file on a full disk, or is no more.
UNWRITABLE = (errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EBADF)

# Typer's or click's own, whichever this Typer is built on.
UsageError: Any = typer.BadParameter.__base__


class Commands(TyperGroup):
    """Turns users' errors into one line and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            _tell(f"error: {' '.join(str(error).split())}")
            raise typer.Exit(error.status) from None
        except UsageError as error:
            # A group without a command shows its help page.
            if type(error).__name__ == "NoArgsIsHelpError":
                raise
            text = " ".join(error.format_message().split()).rstrip(".?")
            path = error.ctx.command_path if error.ctx else ctx.command_path
            _tell(f"error: {text}: see `{path} --help`")
            raise typer.Exit(2) from None
        except KeyboardInterrupt as stop:
            _tell("interrupted")
            raise typer.Exit(getattr(stop, "status", 130)) from None
        except OSError as error:
            # A file has a name; a pipe that is closed is for click.
            if error.filename is not None or error.errno not in UNWRITABLE:
                raise
            # Else Python tries to write the rest when it ends, and says so.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            _tell(f"error: the output cannot be written: {error.strerror}")
            raise typer.Exit(2) from None


def _tell(text: str) -> None:
    """A line on stderr, if that can be written."""
    with contextlib.suppress(OSError):
        typer.echo(text, err=True)


Function = TypeVar("Function", bound=Callable[[dict[str, Any]], None])

app = typer.Typer(
    name="anima-fast",
    cls=Commands,
    help="Train LoRAs for the Anima image model on one GPU.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _parameter(name: str, annotation: Any, declared: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(
        name, kind, default=None, annotation=Annotated[annotation | None, declared]
    )


def _declare(spec: Spec) -> inspect.Parameter:
    """An option as a Typer parameter. It stays text: `options.declare.convert` reads it."""
    plain: Any = {"bool": bool, "words": list[str], "numbers": list[str]}.get(spec.kind, str)
    default = "" if spec.default in (None, "", (), False) else f" (default {spec.default})"
    declared = typer.Option(
        f"--{spec.name}",
        help=spec.help + default,
        rich_help_panel=spec.group,
        metavar=spec.metavar or None,
    )
    return _parameter(spec.name, plain, declared)


def option_command(
    name: str,
    *classes: type,
    allowed: Collection[str] = (),
    word: tuple[str, str] | None = None,
    hidden: Collection[str] = (),
    panel: str | None = None,
    group: typer.Typer = app,
) -> Callable[[Function], Function]:
    """Register a command whose parameters are the options of dataclasses.

    The decorated function gets one dictionary: option name -> text or list of texts as given.

    Args:
        name: the command's word.
        classes: the dataclasses, in the order of the help page.
        allowed: further names that are let through.
        word: an option whose value may be given without its name, and what the help page calls it.
        hidden: options that are not on the help page.
        panel: where the help page of the group lists the command.
        group: what it is a command of.
    """
    known = {name: spec for cls in classes for name, spec in specs(cls).items()}
    alone = word[0] if word else None

    class Command(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            if any(word in ("--help", "-h") for word in args):
                return super().parse_args(ctx, ["--help"])
            ctx.obj = read_words(args, known, others=allowed, flags=BARE_FLAGS, word=alone)
            return super().parse_args(ctx, [])

    def register(function: Function) -> Function:
        def command(context: typer.Context, **_shown: Any) -> None:
            function(context.obj)

        parameters = [_declare(spec) for name, spec in known.items() if name not in hidden]
        if word:
            shown = typer.Argument(metavar=word[1], help=known[word[0]].help)
            parameters.insert(0, _parameter("word", str, shown))
        context = inspect.Parameter(
            "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
        )
        # Typer reads these as if they were written out above.
        vars(command)["__signature__"] = inspect.Signature([context, *parameters])
        command.__annotations__ = {p.name: p.annotation for p in (context, *parameters)}
        group.command(name, cls=Command, help=function.__doc__, rich_help_panel=panel)(command)
        return function

    return register


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"anima-fast {__version__}")
        raise typer.Exit()
