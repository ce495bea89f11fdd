"""Commands for finished files: `convert` and `inspect`, `merge`, `extract`, `resize`, `remap`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anima_fast.adapters.names import DIALECTS
from anima_fast.commands.app import USE, app
from anima_fast.errors import UserError
from anima_fast.models.adapter_kinds import TITLES

if TYPE_CHECKING:
    from anima_fast.tools.ranks import ModuleLoss

Output = Annotated[Path | None, typer.Option("--output", "-o", help="File to write.")]
Rank = Annotated[int | None, typer.Option(help="Largest rank.")]
Energy = Annotated[
    float | None,
    typer.Option(help="Keep this share of each module's energy (squared norm), such as 0.95."),
]
Dynamic = Annotated[
    str | None,
    typer.Option(
        help="Choose each module's rank: sv_fro:P keeps the share P of the norm, sv_cumulative:P "
        "that of the sum of singular values, sv_ratio:P values above the largest / P."
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cuda or cpu; default: a card where there is one.")
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Report every module.")]


def _check_dialect(to: str | None) -> None:
    if to is not None and to not in DIALECTS:
        raise UserError(f"--to {to}: use {', '.join(DIALECTS[:-1])} or {DIALECTS[-1]}")


@app.command("convert", rich_help_panel=USE)
def _convert(
    src: Annotated[Path | None, typer.Argument(help="Network file to read.")] = None,
    dst: Annotated[Path | None, typer.Argument(help="Network file to write.")] = None,
    input: Annotated[Path | None, typer.Option(help="The same as SRC.")] = None,
    output: Annotated[Path | None, typer.Option(help="The same as DST.")] = None,
    to: Annotated[str | None, typer.Option(help="kohya, comfyui or diffusers.")] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="ComfyUI to kohya names.")] = False,
    fold_alpha: Annotated[
        bool,
        typer.Option("--fold_alpha", "--fold-alpha", help="Multiply alpha / rank into weights."),
    ] = False,
) -> None:
    """Convert a LoRA, LoHa, LoKr or DoRA file between kohya, ComfyUI and diffusers names."""
    from anima_fast.tools.convert import convert_file

    _check_dialect(to)
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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a model, LoRA or cache file holds and which programs load it."""
    from anima_fast.inspection.description import inspection_text
    from anima_fast.inspection.file import inspect_file

    found = inspect_file(file)
    text = json.dumps(found, indent=1, ensure_ascii=False, default=str)
    typer.echo(text if as_json else inspection_text(found))


@app.command("merge", rich_help_panel=USE)
def _merge(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            help="DiT, LLM adapter or text encoder; without it the networks are merged."
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="Network file, as path or path:weight; may be repeated. Weight 1."),
    ] = None,
    output: Output = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="bf16, fp16, fp32 or keep (default: bf16 for a checkpoint, keep for networks). "
            "Other models in the same file keep theirs."
        ),
    ] = None,
    rank: Rank = None,
    energy: Energy = None,
    dynamic: Dynamic = None,
    device: Device = None,
    verbose: Verbose = False,
) -> None:
    """Merge LoRA, LoHa, LoKr or DoRA files into a checkpoint, or several LoRA into one.

    Into a checkpoint: in fp32; names and other tensors stay.
    Without one: the weighted sum of the networks as one LoRA, with all their ranks,
    or the closest one by --rank, --energy or --dynamic, with its error.
    """
    from anima_fast.device import choose_device
    from anima_fast.options.words import path_and_weight
    from anima_fast.tools.combine import combine_networks
    from anima_fast.tools.merge import merge_into_checkpoint
    from anima_fast.tools.ranks import RankRule

    if not lora:
        raise UserError("merge needs at least one --lora FILE or --lora FILE:WEIGHT")
    networks = [path_and_weight(text) for text in lora]
    target = _required(output)
    has_rule = (rank, energy, dynamic) != (None, None, None)
    if checkpoint is None:
        losses = combine_networks(
            networks,
            target,
            rule=RankRule.of(rank, dynamic, energy) if has_rule else None,
            precision=None if precision == "keep" else precision,
            device=choose_device(device),
            say=_progress,
        )
        _tell(losses, target, verbose)
        return
    if has_rule:
        raise UserError("--rank, --energy and --dynamic are for merging networks with each other")
    lines = merge_into_checkpoint(
        checkpoint, networks, target, precision=precision or "bf16", say=_progress
    )
    typer.echo("\n".join(lines))


@app.command("extract", rich_help_panel=USE)
def _extract(
    base: Annotated[Path, typer.Argument(help="Checkpoint to start from.")],
    tuned: Annotated[Path, typer.Argument(help="Checkpoint that the LoRA leads to.")],
    output: Output = None,
    rank: Rank = None,
    energy: Energy = None,
    dynamic: Dynamic = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Also layers whose whole dotted name matches; may be repeated."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Not layers whose whole dotted name matches; may be repeated."),
    ] = None,
    llm_adapter: Annotated[
        bool,
        typer.Option("--llm_adapter", "--llm-adapter", help="Also the layers of the LLM adapter."),
    ] = False,
    to: Annotated[str, typer.Option(help="Names: kohya, comfyui or diffusers.")] = "kohya",
    precision: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16 (default fp32).")
    ] = None,
    device: Device = None,
    verbose: Verbose = False,
) -> None:
    """Make a LoRA from the difference of two checkpoints.

    Takes the layers that training adapts by default.
    Reports the error, and what differs but cannot be in a LoRA.
    """
    from anima_fast.device import choose_device
    from anima_fast.tools.extract import extract_lora
    from anima_fast.tools.ranks import RankRule

    target = _required(output)
    _check_dialect(to)
    found = extract_lora(
        base,
        tuned,
        target,
        RankRule.of(rank, dynamic, energy),
        include=include or (),
        exclude=exclude or (),
        llm_adapter=llm_adapter,
        dialect=to,
        precision=precision or "fp32",
        device=choose_device(device),
        say=_progress,
    )
    if found.same:
        typer.echo(f"{found.same} target layers do not differ and are left out")
    if found.outside:
        name, change = next(iter(found.outside.items()))
        typer.echo(
            f"not in the LoRA: {len(found.outside)} other tensors that differ, most of all {name} "
            f"(by {100 * change:.3g} %); --include and --llm_adapter reach linear layers"
        )
        if verbose:
            typer.echo("\n".join(f"  {n}  {100 * c:.3g} %" for n, c in found.outside.items()))
    _tell(found.losses, target, verbose)


@app.command("resize", rich_help_panel=USE)
def _resize(
    src: Annotated[Path, typer.Argument(help=f"{TITLES} file to read.")],
    output: Output = None,
    rank: Rank = None,
    energy: Energy = None,
    dynamic: Dynamic = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16 (default: as in the file).")
    ] = None,
    device: Device = None,
    verbose: Verbose = False,
) -> None:
    """Reduce the rank of a LoRA, and report the error.

    Each module keeps its scale alpha / rank; a DoRA keeps its magnitudes.
    LoHa and LoKr become the closest plain LoRA.
    """
    from anima_fast.device import choose_device
    from anima_fast.tools.ranks import RankRule
    from anima_fast.tools.resize import resize_file

    target = _required(output)
    rule = RankRule.of(rank, dynamic, energy)
    losses = resize_file(
        src, target, rule, precision=precision, device=choose_device(device), say=_progress
    )
    _tell(losses, target, verbose)


@app.command("remap", rich_help_panel=USE)
def _remap(
    src: Annotated[Path, typer.Argument(help="Network file to read.")],
    output: Output = None,
    to: Annotated[
        int | None,
        typer.Option("--to", "--layers", help="Blocks of the target: 28, 40, 52 or any other."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Checkpoint of the target, which tells its blocks and widths."),
    ] = None,
    source: Annotated[
        int | None,
        typer.Option(
            "--from", help="Blocks that the network is for (default: from its highest block)."
        ),
    ] = None,
    mapping: Annotated[
        str | None,
        typer.Option(
            "--map", help="Pairs target=source or target=source*strength, or a file with them."
        ),
    ] = None,
    duplicate: Annotated[
        float,
        typer.Option(help="Strength in blocks that were copied from another; 0 leaves them out."),
    ] = 0.0,
) -> None:
    """Move a network between DiT of 28, 40 and 52 blocks.

    Follows the published insertions. Extra blocks of the deeper model get nothing,
    and are left out on the way back.
    """
    from anima_fast.tools.remap import remap_file

    lines = remap_file(
        src,
        _required(output),
        to=to,
        model=model,
        source=source,
        mapping=mapping,
        duplicate=duplicate,
    )
    typer.echo("\n".join(lines))


def _required(output: Path | None) -> Path:
    if output is None:
        raise UserError("--output is required: the file to write")
    return output


def _tell(losses: list[ModuleLoss], output: Path, verbose: bool) -> None:
    from anima_fast.tools.ranks import loss_table

    typer.echo("\n".join(loss_table(losses, verbose=verbose)))
    typer.echo(f"wrote {output}")


def _progress(text: str) -> None:
    typer.echo(text, err=True)
