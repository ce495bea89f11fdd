"""The command line: parse, build options, call. Nothing heavy is imported before a command runs.

`anima-fast COMMAND --help` lists the options of each command. Bad input ends with one line on
stderr and exit status 2, an interrupt with 130.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from anima_fast import __version__
from anima_fast.bench.commands import bench
from anima_fast.errors import UserError
from anima_fast.option_groups.base import Spec, specs
from anima_fast.option_groups.tables import BARE_FLAGS
from anima_fast.option_words import read_words
from anima_fast.options import SampleOptions, TrainOptions


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

app.add_typer(bench)

# Options of `train` that are no part of a run.
_FILE_SPECS = {
    name: Spec(name, kind, None, text, "Configuration file", (), None, None, True, False)
    for name, kind, text in (
        ("config_file", "str", "TOML file with options; the command line beats it."),
        ("output_config", "bool", "Write the options to --config_file and stop."),
    )
}


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


def _train_names() -> frozenset[str]:
    from anima_fast.option_files import OTHER_NAMES

    return OTHER_NAMES


@option_command("train", TrainOptions, _FILE_SPECS, _train_names)
def _train(values: dict[str, Any]) -> None:
    """Train a LoRA. Names may be written with hyphens, and stand in a TOML file too."""
    from anima_fast.console import configure_console
    from anima_fast.option_files import resolve_train_options, write_config

    config_file = values.pop("config_file", None)
    if values.pop("output_config", "false").lower() == "true":
        options, _ = resolve_train_options(values, None, complete=False)
        typer.echo(f"wrote {write_config(options, config_file)}")
        return
    options, notices = resolve_train_options(values, config_file)
    log = configure_console(
        options.console_log_level, options.console_log_file, simple=options.console_log_simple
    )
    for notice in notices:
        log.warning(notice)
    from anima_fast.training.loop import train

    result = train(options)
    if result is not None and result.interrupted_by is not None:
        raise typer.Exit(128 + result.interrupted_by)


@option_command("sample", SampleOptions, {}, lambda: frozenset({"pretrained_model_name_or_path"}))
def _sample(values: dict[str, Any]) -> None:
    """Render an image from a prompt, with or without LoRA files."""
    from anima_fast.option_groups.base import convert
    from anima_fast.sampling import run_sample

    if "pretrained_model_name_or_path" in values:
        values.setdefault("dit", values["pretrained_model_name_or_path"])
        del values["pretrained_model_name_or_path"]
    known = specs(SampleOptions)
    options = SampleOptions(
        **{name: convert(known[name], v, f"--{name}", text=True) for name, v in values.items()}
    )
    for name in ("dit", "qwen3", "vae"):
        if not getattr(options, name):
            raise UserError(f"--{name} is required: give the path of that model file")
    run_sample(options)


@app.command("convert")
def _convert(
    src: Annotated[Path | None, typer.Argument(help="LoRA file to read.")] = None,
    dst: Annotated[Path | None, typer.Argument(help="LoRA file to write.")] = None,
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
    """Convert a LoRA file between kohya, ComfyUI and diffusers names."""
    from anima_fast.adapters.formats import convert_file

    if to is not None and to not in ("kohya", "comfyui", "diffusers"):
        raise UserError(f"--to {to}: use kohya, comfyui or diffusers")
    words = [path for path in (input, src, output, dst) if path is not None]
    source = input or src
    # `convert --input A B` and `convert A --output B` both leave one positional word.
    target = output or (src if input and dst is None else dst)
    if source is None or target is None or len(words) != 2:
        raise UserError("convert needs two files: convert SRC DST, or --input SRC --output DST")
    convert_file(source, target, to=to, reverse=reverse, fold_alpha=fold_alpha)
    typer.echo(f"wrote {target}")


@app.command("inspect")
def _inspect(
    file: Annotated[Path, typer.Argument(help="Any checkpoint, LoRA or cache file.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what a model, LoRA or cache file holds and which programs load it."""
    from json import dumps

    from anima_fast.inspection.file import describe, render

    found = describe(file)
    typer.echo(dumps(found, indent=1, ensure_ascii=False, default=str) if json else render(found))


@app.command("parity")
def _parity(
    op: Annotated[
        list[str] | None, typer.Option("--op", help="Only this op; may be repeated.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print every check as JSON.")] = False,
) -> None:
    """Check every kernel against its definition, on the card or, without one, interpreted.

    Ends with status 1 when a check fails.
    """
    from anima_fast.parity_report import run_parity

    raise typer.Exit(0 if run_parity(op or [], as_json=json, say=typer.echo) else 1)


@app.command("download")
def _download(
    dit: Annotated[
        str, typer.Option(help="Release of the DiT, or its file name in the repository.")
    ] = "base-v1.0",
    models_dir: Annotated[
        Path | None,
        typer.Option("--models_dir", "--models-dir", help="Folder to fill.", show_default=False),
    ] = None,
    list_only: Annotated[bool, typer.Option("--list", help="List the known DiT releases.")] = False,
    tokenizers_only: Annotated[
        bool, typer.Option("--tokenizers_only", "--tokenizers-only", help="Only the tokenizers.")
    ] = False,
) -> None:
    """Fetch the published model files and tokenizers, then print the train command to use."""
    from anima_fast.download import DIT_RELEASES, download_models, train_command

    if list_only:
        typer.echo("\n".join(f"{name:16} {file}" for name, file in DIT_RELEASES.items()))
        return
    found = download_models(models_dir, dit=dit, tokenizers_only=tokenizers_only, say=typer.echo)
    if not tokenizers_only:
        typer.echo("\n" + train_command(found))


@app.command("doctor")
def _doctor(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    models_dir: Annotated[
        Path | None,
        typer.Option("--models_dir", "--models-dir", help="Models folder.", show_default=False),
    ] = None,
) -> None:
    """Report what this machine has and what missing pieces would bring."""
    from json import dumps

    from anima_fast.doctor import examine, render

    report = examine(models_dir)
    typer.echo(dumps(report, indent=1, ensure_ascii=False) if json else render(report))
    raise typer.Exit(0 if report["can_train"] else 1)


@app.command("demo")
def _demo(
    out: Annotated[Path, typer.Option("--out", help="Folder to fill.")] = Path("demo_output"),
) -> None:
    """Train a tiny random model on photographs, end to end, and write a report."""
    from anima_fast.demo import run_demo

    run_demo(out)


def main() -> None:
    """The entry of the `anima-fast` script."""
    # A pipe or an old console may use another encoding than the paths and captions that are shown.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app(prog_name="anima-fast")
