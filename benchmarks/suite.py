"""Everything that is measured and checked, in slices: `make gpu` runs all.

    python -m benchmarks.suite --out DIR [--slice NAME ...] [--list]

A slice is one command in a process of its own with a time limit of nine minutes, so that a crash
or a hang takes nothing else with it. What a
slice has written stays when it is stopped. Slices of one folder may run in several calls
(`--slice`); the report is made from all that stand there.

    DIR/slices/NAME.json   status, seconds, command, machine
    DIR/slices/NAME.csv    rows of measurements         NAME.out, NAME.log   what it printed
    DIR/results.csv, results.json, report.html          all slices together (suite_report.py)
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from anima_fast.errors import UserError
from anima_fast.files import check_folder, write_json
from benchmarks.rows import ROOT, machine
from benchmarks.slices import CPU, FAILED, GPU, PASSED, SANITIZER, SKIPPED, TIMED_OUT, Slice, slices
from benchmarks.suite_report import build_report

NO_TESTS_COLLECTED = 5


def choose(names: Sequence[str]) -> list[Slice]:
    """The slices of these names, all that suit this machine when there are none.

    Raises `UserError` for an unknown name.
    """
    known = {one.name: one for one in slices()}
    for name in names:
        if name not in known:
            raise UserError(f"--slice {name} is unknown: use one of {', '.join(known)}")
    if names:
        return [known[name] for name in names]
    return [one for one in known.values() if one.where != (GPU if not has_card() else CPU)]


def has_card() -> bool:
    """Whether there is a CUDA card."""
    import torch

    return torch.cuda.is_available()


def unfit(one: Slice) -> str:
    """Why a slice cannot run on this machine, or ""."""
    if one.where == GPU and not has_card():
        return "needs a CUDA card; there is none here"
    if one.where == CPU and has_card():
        return "for machines without a card"
    if one.command[0] == SANITIZER and shutil.which(SANITIZER) is None:
        return f"{SANITIZER} is not on PATH"
    return ""


def run_slices(
    chosen: Iterable[Slice], folder: Path, *, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Run slices one after another; each leaves its record in `folder`, also when interrupted.

    Args:
        chosen: of `choose`.
        folder: the output folder, see the module docstring.
        say: prints a line.

    Returns:
        The records, as in NAME.json.

    Raises:
        UserError: the folder cannot be written.
    """
    chosen, records, where = list(chosen), [], machine()
    for index, one in enumerate(chosen, 1):
        record = run_slice(one, folder) | where
        write_json(folder / "slices" / f"{one.name}.json", record)
        records.append(record)
        reason = f": {record['reason']}" if record["reason"] else ""
        say(
            f"[{index}/{len(chosen)}] {one.name} {record['status']}, "
            f"{record['seconds']:.0f} s{reason}"
        )
    return records


def run_slice(one: Slice, folder: Path) -> dict[str, Any]:
    """Run one slice and tell how it went; its earlier files are replaced."""
    base = folder / "slices" / one.name
    for suffix in (".csv", ".out", ".log"):
        base.with_suffix(suffix).unlink(missing_ok=True)
    record = asdict(one) | {"status": SKIPPED, "seconds": 0.0, "returncode": None}
    if reason := unfit(one):
        return record | {"reason": reason}
    words = {"python": sys.executable, "{rows}": str(base.with_suffix(".csv").resolve())}
    command = [words.get(word, word) for word in one.command]
    start = time.monotonic()
    with (
        open(base.with_suffix(".out"), "wb") as out,
        open(base.with_suffix(".log"), "wb") as log,
        subprocess.Popen(
            command, cwd=ROOT, env=environment(one), stdin=subprocess.DEVNULL, stdout=out,
            stderr=log, start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            code = process.wait(one.limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop(process)
    record["seconds"], record["returncode"] = time.monotonic() - start, code
    return record | outcome(one, code, base)


def environment(one: Slice) -> dict[str, str]:
    """Variables of a slice: this checkout first, no hub, and no interpreter by accident."""
    variables = dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    variables.pop("TRITON_INTERPRET", None)
    paths = [str(ROOT), variables.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    if one.command[0] == SANITIZER:
        # Each tensor gets memory of its own, so that a step beyond it is seen.
        variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    return variables


def stop(process: subprocess.Popen) -> None:
    """End a process and all that it started, when it still runs."""
    if process.poll() is not None:
        return
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def outcome(one: Slice, code: int | None, base: Path) -> dict[str, str]:
    """Status and reason from an exit status; None means stopped at the limit."""
    if code is None:
        kept = "; what it had written is kept"
        return {"status": TIMED_OUT, "reason": f"stopped after {one.limit_s:.0f} s{kept}"}
    if code == NO_TESTS_COLLECTED and "pytest" in one.command:
        return {"status": SKIPPED, "reason": "there is no such test"}
    if code:
        return {"status": FAILED, "reason": last_words(base) or f"exit status {code}"}
    return {"status": PASSED, "reason": ""}


def last_words(base: Path) -> str:
    """The last line that a slice printed, without JSON: pytest's summary, or an error."""
    for suffix in (".log", ".out"):
        text = base.with_suffix(suffix).read_text(encoding="utf-8", errors="replace")
        lines = [line.strip(" =") for line in text.splitlines() if line.strip(" =]}[{")]
        if lines and not text.startswith("["):
            return lines[-1][:300]
    return ""


def main(
    out: Annotated[Path, typer.Option("--out", help="Folder to fill.")] = Path("bench_output"),
    only: Annotated[
        list[str] | None, typer.Option("--slice", help="Only this slice; may be repeated.")
    ] = None,
    list_only: Annotated[bool, typer.Option("--list", help="List the slices and stop.")] = False,
) -> None:
    """Check and measure everything on this machine, and write a report.

    Runs in slices that keep what they have finished; the report is made from all slices that the
    folder holds. Ends with status 1 when one of them failed.
    """
    try:
        chosen = choose(only or [])
        if not list_only:
            # Before the first slice, which may take minutes.
            check_folder(out / "slices")
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if list_only:
        for one in slices():
            typer.echo(f"{one.name:40} {one.where:4} {one.title}")
        return
    if not has_card():
        typer.echo("no CUDA card here: what can run on the CPU runs, at tiny sizes; no speed")
    try:
        records = run_slices(chosen, out, say=typer.echo)
    finally:
        build_report(out)
        typer.echo(f"wrote {out / 'report.html'}, results.csv and results.json")
    raise typer.Exit(int(any(r["status"] in (FAILED, TIMED_OUT) for r in records)))


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
