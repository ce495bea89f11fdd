"""`anima-fast bench`: what kernels need and how fast they should be.

Torch and Triton are imported when a command runs, not for `--help`.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from anima_fast.errors import UserError

bench = typer.Typer(
    name="bench",
    help="What the kernels need and how fast they should be.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@bench.command("resources")
def _resources(
    op: Annotated[
        list[str] | None, typer.Option("--op", help="Only this op; may be repeated.")
    ] = None,
    arch: Annotated[
        list[int] | None,
        typer.Option("--arch", help="Compute capability, 89 for 8.9; may be repeated."),
    ] = None,
    card: Annotated[
        list[str] | None, typer.Option("--card", help="A card, for its capability; repeatable.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Other types than bfloat16 for one capability only.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print every variant as JSON.")] = False,
) -> None:
    """Compile every kernel for cards that need not be there: registers, spills, shared memory.

    Ends with status 1 when a kernel spills, does not fit or does not compile.
    """
    from anima_fast.measure.cards import find_card

    archs = list(dict.fromkeys([*(arch or ()), *(find_card(name).arch for name in card or ())]))

    import triton

    from anima_fast.bench.resources import ARCHS, COMPILED, as_record, check, measure
    from anima_fast.bench.tables import resources_table

    unknown = [name for name in op or () if name not in COMPILED]
    if unknown:
        raise UserError(f"--op {unknown[0]} is unknown: use one of {', '.join(COMPILED)}")
    ops = {name: COMPILED[name] for name in op or COMPILED}
    rows = measure(ops=ops, archs=archs or ARCHS, quick=quick)
    problems = check(rows)
    if as_json:
        found = {"triton": triton.__version__, "problems": problems}
        typer.echo(json.dumps(found | {"kernels": [as_record(row) for row in rows]}, indent=1))
    else:
        typer.echo(resources_table(rows))
        typer.echo("\nregisters a thread, KiB of shared memory a block, occupancy; worst variant")
        for problem in problems:
            typer.echo(f"problem: {problem}")
        typer.echo(f"{len(rows)} kernels compiled with Triton {triton.__version__}")
    raise typer.Exit(1 if problems else 0)


@bench.command("model")
def _model(
    card: Annotated[
        str | None,
        typer.Option("--card", help="A card by name; without it the one here is measured."),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", help="Image tokens: 4096 at 1024x1024.")
    ] = 4096,
    batch: Annotated[int, typer.Option("--batch", help="Images per step.")] = 1,
    rank: Annotated[int, typer.Option("--rank", help="Rank of the LoRA.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, times in seconds.")] = False,
) -> None:
    """Predict the time of every op and of a training step, and the memory it takes.

    From data sheets and assumed shares of them: a yardstick for measurements, not one itself.
    """
    from anima_fast.measure.cards import find_card

    for name, value in (("tokens", tokens), ("batch", batch), ("rank", rank)):
        if value < 1:
            raise UserError(f"--{name} {value}: expected at least 1")
    sheet = find_card(card) if card else None

    from anima_fast.bench.model import prediction, prediction_text
    from anima_fast.measure.rates import Rates, measured_card

    if sheet:
        found = prediction(sheet, Rates.of(sheet), tokens=tokens, batch=batch, rank=rank)
        found["source"] = "assumed shares of the data sheet"
    else:
        found = prediction(*measured_card(), tokens=tokens, batch=batch, rank=rank)
        found["source"] = "measured here"
    typer.echo(json.dumps(found, indent=1) if as_json else prediction_text(found))


@bench.command("all", context_settings={"ignore_unknown_options": True})
def _all(words: Annotated[list[str] | None, typer.Argument(hidden=True)] = None) -> None:
    """Say where the whole suite is: in a checkout, as `make gpu`."""
    raise UserError(
        "the suite of tests, parity and benchmarks is part of the repository, not of the installed "
        "program: in a checkout run `make gpu`, or `python -m benchmarks.suite --out DIR`"
    )
