"""`anima-fast parity`: the checks of parity.py and curve.py, the rule and the baseline."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from anima_fast.bench import interpreter
from anima_fast.bench.choice import DTYPES, name_of
from anima_fast.bench.run_file import Measurement, Run, header, read_run, row_line
from anima_fast.device import one_thread
from anima_fast.errors import UserError

Say = Callable[[str], None]
# What the command checks beside the ops of the registry.
WHOLES = ("block", "loss")


def run_parity(
    names: Sequence[str],
    *,
    dtypes: Sequence[str] = (),
    quick: bool = False,
    baseline: Path | None = None,
    update: bool = False,
    as_json: bool = False,
    say: Say,
) -> bool:
    """Check ops (all, the block and the losses when `names` is empty), interpreted without a card.

    Args:
        names: ops by name, `block` or `loss`.
        dtypes: only these; all when empty.
        quick: a part of the table, in less than a minute.
        baseline: a run file to compare with; that of the checkout when None.
        update: store the rows there instead of comparing.
        as_json: print a run file instead of a table.
        say: prints.

    Returns:
        Whether every value is right and none is worse than in the baseline.

    Raises:
        UserError: an op or a dtype that does not exist, options that exclude each other, a baseline
            that cannot be read or written, or Triton is missing.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if device == "cpu":
            # Before anything imports triton.
            interpreter.start()
        from anima_fast.bench import errors
        from anima_fast.kernels.registry import OPS
    except ImportError as error:
        raise UserError(f"the kernels need triton, which is missing: {error}") from error
    from anima_fast.bench import baseline as stored_rows
    from anima_fast.bench import compare
    from anima_fast.bench.environment import environment

    known = (*OPS, *WHOLES)
    errors.known_ops(names, WHOLES)
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise UserError(f"--dtype {dtype} is unknown: use one of {', '.join(DTYPES)}")
    if update and (quick or dtypes):
        raise UserError("--update stores whole ops: drop --quick and --dtype, or name ops by --op")
    path = baseline or stored_rows.baseline_path(device)
    if update and path is None:
        raise UserError("the stored baseline is part of a checkout: name a file by --baseline FILE")
    # What is not there yet is told below; a damaged file, now.
    stored = read_run(path) if path and not update and (path.exists() or baseline) else None
    if not as_json:
        where = torch.cuda.get_device_name() if device == "cuda" else "the CPU, interpreted"
        say(f"kernels against their definitions on {where}; error relative to float64")
    found: list[Measurement] = []
    # The slowest first: two processes share them, and none waits for the other at the end.
    for some in rows_by_op(names or (*WHOLES, *OPS), device, quick, dtypes):
        found += some
        for line in () if as_json else lines(some):
            say(line)
    wrong = [row for row in found if row.note]
    if as_json:
        say((header(environment()) + "".join(map(row_line, found))).rstrip("\n"))
        return not wrong
    cases = sum(max(1, len(row.parts)) for row in found if row.provider == "own")
    say(f"{len(wrong)} of {len(found)} rows wrong" if wrong else f"{cases} numbers right")
    if update and path is not None:
        if wrong:
            raise UserError(f"wrong values are no baseline: {path} stays as it was")
        stored_rows.update(path, found, known)
        say(f"stored in {path}")
        return True
    if stored is None:
        if path:
            say(f"{path} is not there yet: `anima-fast parity --update` writes it")
        return not wrong
    run = Run(environment(), tuple(found), "this run")
    changes = stored_rows.judged(stored, run, whole=not quick)
    say(compare.report(compare.notes_of(stored, run), changes))
    if any(change.verdict != compare.SAME for change in changes):
        say("`anima-fast parity --update` stores these numbers, with --op OP those of an op alone")
    return not (wrong or compare.failed(changes))


def rows_by_op(
    names: Sequence[str], device: str, quick: bool, dtypes: Sequence[str]
) -> Iterator[list[Measurement]]:
    """The rows of each op as they are done; interpreted, two processes share the ops."""
    work = functools.partial(measured, device=device, quick=quick, dtypes=dtypes)
    if device == "cuda" or len(names) < 2 or (os.cpu_count() or 1) < 2:
        with one_thread():
            yield from map(work, names)
        return
    # Not forked: a copy of a process with threads may hang.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn, initializer=_start_process) as pool:
        yield from pool.map(work, names)


def _start_process() -> None:
    torch.set_num_threads(1)
    interpreter.start()


def measured(name: str, device: str, quick: bool, dtypes: Sequence[str] = ()) -> list[Measurement]:
    """The rows of one op, of the block or of the losses."""
    from anima_fast.bench import curve, errors
    from anima_fast.kernels.registry import OPS

    if name == "block":
        return curve.block_rows(device, quick, dtypes)
    if name == "loss":
        return curve.loss_rows(device, quick)
    return errors.error_rows(OPS[name], device, quick, dtypes)


def lines(found: Iterable[Measurement]) -> list[str]:
    """A line for each tensor or curve, with eager's figure beside it, then what is wrong."""
    from anima_fast.kernels.registry import OPS

    rows = list(found)
    eager = {(r.op, r.dtype, r.mode): r for r in rows if r.provider == "eager"}
    text = []
    for row in rows:
        if row.provider == "own":
            other = eager.get((row.op, row.dtype, row.mode))
            yardstick = OPS[row.op].yardstick if row.op in OPS else None
            name = f"eager {name_of(yardstick)}" if yardstick else "eager"
            beside = f"  {name} {other.value:.3g}" if other else ""
            what = f"{row.metric} {row.value:.3g}{beside}"
            text.append(f"{row.op:33} {row.dtype:9} {row.mode:30} {what}")
    return text + [f"  WRONG {row.note}" for row in rows if row.note]
