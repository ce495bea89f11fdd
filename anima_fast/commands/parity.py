"""`anima-fast parity`: the kernels against their definitions, precisions against float32."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from anima_fast.commands.app import option_command
from anima_fast.errors import UserError
from anima_fast.options.declare import convert_all, option, specs
from anima_fast.options.files import OTHER_NAMES, resolve_train_options
from anima_fast.options.run import TrainOptions

parity = typer.Typer(name="parity", pretty_exceptions_enable=False)


@parity.callback(invoke_without_command=True)
def _parity(
    context: typer.Context,
    op: Annotated[
        list[str] | None, typer.Option("--op", help="Only this op; may be repeated.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help="Only float32, ...; may be repeated.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A part of the table, in less than a minute.")
    ] = False,
    baseline: Annotated[
        Path | None,
        typer.Option("--baseline", help="Run file to compare with, instead of the checkout's."),
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Store these numbers as the baseline.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a run file.")] = False,
) -> None:
    """Check every kernel, the fused block and a loss curve, on the card or interpreted.

    Two rules: an error is at most twice that of plain PyTorch in the same type, and not worse than
    the stored baseline. Ends with status 1 when one is broken.
    """
    if context.invoked_subcommand is not None:
        if op or dtype or quick or baseline or update or as_json:
            name = context.invoked_subcommand
            raise UserError(f"options of `parity` change nothing in `parity {name}`: drop them")
        return
    from anima_fast.bench.parity_report import run_parity

    good = run_parity(
        op or [],
        dtypes=dtype or [],
        quick=quick,
        baseline=baseline,
        update=update,
        as_json=as_json,
        say=typer.echo,
    )
    raise typer.Exit(0 if good else 1)


_own = partial(option, "This command")


@dataclass(frozen=True)
class PrecisionOptions:
    """Options of `parity precision` that are not part of a run."""

    dit: str | None = _own(None, "File of the DiT.")
    tokens: int = _own(256, "Image tokens a sample, at most.", low=1)
    json: bool = _own(False, "Print JSON instead of a table.")
    config_file: str | None = _own(None, "TOML file with options of `train`.")


# Options of `train` that say which data, and where to compute; the others are accepted and change
# nothing here.
_SHOWN = {
    "dataset_config", "qwen3", "vae", "llm_adapter_path", "qwen3_tokenizer_path",
    "t5_tokenizer_path", "models_dir", "cache_dir", "device", "kernels",
}  # fmt: skip


@option_command(
    "precision",
    PrecisionOptions,
    TrainOptions,
    allowed=OTHER_NAMES,
    hidden=specs(TrainOptions).keys() - _SHOWN,
    group=parity,
)
def _precision(values: dict[str, Any]) -> None:
    """Compare bf16 and fp16 with float32 on a model: gradients of a LoRA, and the velocity.

    On a card the kernels compute, elsewhere or with --kernels eager float16 sums are emulated.
    Without a dataset latents and text are random; a dataset needs --qwen3 and --vae, which encode
    what no cache holds. Takes the options of `train`, so a whole training command may be pasted.
    """
    from anima_fast.bench.precision_command import run_precision

    own = convert_all(PrecisionOptions, values, "--", text=True)
    run = {name: value for name, value in values.items() if name not in own}
    if own.get("dit"):
        run["pretrained_model_name_or_path"] = own["dit"]
    options: TrainOptions
    options, _ = resolve_train_options(run, own.get("config_file"), complete=False)
    if not options.pretrained_model_name_or_path:
        raise UserError("--dit is required: give the file of the DiT")
    tokens = own.get("tokens", specs(PrecisionOptions)["tokens"].default)
    run_precision(options, tokens=tokens, as_json=bool(own.get("json")), say=typer.echo)
