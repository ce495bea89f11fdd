"""`anima-fast bench`: measure, compare, follow, profile and predict.

Torch and Triton are imported when a command runs, not for `--help`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from anima_fast.errors import UserError

bench = typer.Typer(
    name="bench",
    help="Measure the kernels, compare runs, predict a step.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


Ops = Annotated[
    list[str] | None,
    typer.Argument(help="Ops of the registry, or block, step, loss, program; all when none."),
]
Cases = Annotated[
    list[str] | None, typer.Option("--case", help="Sizes instead of the model's: L=4096,B=2.")
]
Dtypes = Annotated[list[str] | None, typer.Option("--dtype", help="float16, bfloat16, ...")]
Providers = Annotated[
    list[str] | None, typer.Option("--provider", help="own, eager, compile or a library.")
]
Modes = Annotated[list[str] | None, typer.Option("--mode", help="fwd, bwd, both.")]
Metrics = Annotated[
    list[str] | None,
    typer.Option("--metric", help="error, time, kept, peak, launches, registers, loss, ..."),
]
Archs = Annotated[
    list[str] | None,
    typer.Option("--arch", help="Compile for this: 89 for capability 8.9, or a card by name."),
]
Limits = Annotated[
    list[str] | None,
    typer.Option("--fail-if", help='Limits: "time:5% error:5% registers:0 launches:0 kept:0".'),
]
Page = Annotated[Path | None, typer.Option("--html", help="Write a page with tables and plots.")]


def _choice(ops: Sequence[str] | None, **words: Any) -> Any:
    from anima_fast.bench.choice import parse_choice

    given: Any = {name: value if value is not None else () for name, value in words.items()}
    return parse_choice(ops or (), **given)


@bench.command("run")
def _run(
    ops: Ops = None,
    case: Cases = None,
    dtype: Dtypes = None,
    provider: Providers = None,
    mode: Modes = None,
    metric: Metrics = None,
    arch: Archs = None,
    candidate: Annotated[
        str, typer.Option("--candidate", help="FILE.py:function, one more provider of the op.")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="The set that CI runs.")] = False,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.0, help="For each op and size, on a card.")
    ] = 4.0,
    out: Annotated[Path | None, typer.Option("--out", help="The run file to write.")] = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="A run file, or a folder of them, to compare with."),
    ] = None,
) -> None:
    """Measure what this machine can into one run file, a JSON line each measurement.

    Without a card: errors (interpreted), launches, kept and peak bytes of a block, registers, loss
    curve, imported packages, start-up. On a card also time and memory. Ends with status 1 when a
    value is wrong, a group fails, something that was asked for cannot be measured here, or
    --against finds something worse.
    """
    from anima_fast.bench.command import run_command

    choice = _choice(ops, cases=case, dtypes=dtype, providers=provider, modes=mode, metrics=metric,
                     archs=arch, candidate=candidate, quick=quick, seconds=seconds)  # fmt: skip
    raise typer.Exit(run_command(choice, out, against, say=typer.echo))


@bench.command("compare")
def _compare(
    a: Annotated[str, typer.Argument(help="A run file, or a commit.")],
    b: Annotated[str, typer.Argument(help="A run file, or a commit.")],
    fail_if: Limits = None,
    html: Page = None,
    op: Annotated[list[str] | None, typer.Option("--op", help="Of commits: only this.")] = None,
    metric: Metrics = None,
    full: Annotated[
        bool, typer.Option("--full", help="Of commits: all, not the quick set.")
    ] = False,
) -> None:
    """What moved from A to B; ends with status 1 when something is worse than its limit allows.

    Commits are measured here, from git worktrees, in turn. What repeats to the digit is compared
    exactly; a time is worse only when its whole 95 % interval lies beyond the limit.
    """
    from anima_fast.bench.command import compare_command

    choice = _choice(op, metrics=metric, quick=not full)
    raise typer.Exit(compare_command(a, b, fail_if or (), html, choice, say=typer.echo))


@bench.command("history")
def _history(
    ops: Ops = None,
    case: Cases = None,
    dtype: Dtypes = None,
    provider: Providers = None,
    metric: Metrics = None,
    folder: Annotated[Path, typer.Option("--folder", help="Where the run files are.")] = Path(
        "bench_output"
    ),
    html: Page = None,
) -> None:
    """Values over the run files of a folder: a line each commit, and where one stepped.

    Without OP and --metric only what stepped is shown.
    """
    from anima_fast.bench.history import history, history_page, read_runs, text_of

    choice = _choice(ops, cases=case, dtypes=dtype, providers=provider, metrics=metric)
    runs = read_runs(folder)
    every = history(runs, choice)
    found = every if ops or metric else [line for line in every if line.step is not None]
    for line in text_of(found):
        typer.echo(line)
    typer.echo(f"{len(runs)} runs, {len(every)} measurements: "
               f"{sum(line.step is not None for line in every)} stepped")  # fmt: skip
    if html:
        history_page(html, runs, found)
        typer.echo(f"wrote {html}")


@bench.command("profile")
def _profile(
    op: Annotated[str, typer.Argument(help="An op of the registry, block, or step.")],
    case: Cases = None,
    dtype: Dtypes = None,
    provider: Providers = None,
    arch: Archs = None,
    tool: Annotated[str, typer.Option("--tool", help="proton, ncu, nsys or sass.")] = "proton",
    against: Annotated[
        Path | None, typer.Option("--against", help="Of sass: a run file to compare with.")
    ] = None,
) -> None:
    """An op once under a profiler; `step`: phases, gaps, wait for data; sass needs no card."""
    from anima_fast.bench.command import profile_command

    choice = _choice([op], cases=case, dtypes=dtype, providers=provider, archs=arch)
    raise typer.Exit(profile_command(op, tool, choice, against, say=typer.echo))


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
        here = measured_card()
        found = prediction(here.card, here.rates, tokens=tokens, batch=batch, rank=rank)
        found["source"] = "measured here"
    typer.echo(json.dumps(found, indent=1) if as_json else prediction_text(found))
