"""The suite proves itself: errors are planted one by one, and a check must turn red each time.

    python -m benchmarks.plant [--only WORD] [--quick] [--jobs N]

Every row of plants.py is applied to a copy of this checkout, its command run there, and the line
put back. Ends with status 1 and names what stayed green, or with 2 for a row that no longer
applies: its line must occur once. Without `--quick` the commands run unplanted first, as one that
is always red sees nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from anima_fast.errors import UserError
from benchmarks.plants import PLANTS, Plant

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 1200
RED = 1


def command(check: str) -> list[str]:
    """The words of a row's check as a command line."""
    words = check.split()
    if words[0] == "pytest":
        # No plugin may hand the tests to processes that start elsewhere.
        return [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *words[1:]]
    start = [sys.executable, "-m", "anima_fast"]
    return [*start, *words] if words[0] == "bench" else [*start, "parity", *words]


def copy_checkout(target: Path) -> Path:
    """The files of this checkout as they are now, those that git ignores left out."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, check=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        source = ROOT / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    return target


def text_of(plant: Plant, folder: Path) -> str:
    """The file of a row. Raises `UserError` when the row does not apply to it."""
    path = folder / plant.file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if (times := text.count(plant.right)) != 1:
        raise UserError(
            f"{plant.name}: {plant.right!r} occurs {times} times in {plant.file}, expected once: "
            "mend the row in benchmarks/plants.py"
        )
    return text


def run_check(check: str, folder: Path) -> tuple[int, str]:
    """Exit status and last words of a check in a copy."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    variables |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command(check), cwd=folder, env=variables, text=True,
                              capture_output=True, timeout=LIMIT_S)  # fmt: skip
    except subprocess.TimeoutExpired:
        return -1, f"no end after {LIMIT_S} s"
    return done.returncode, done.stdout + done.stderr


def seen(status: int, output: str) -> bool:
    """Whether a check saw the error: it failed, and not by falling over."""
    verdict = any(word in output for word in ("WRONG", "worse ", " failed", "problem: "))
    return status == RED and verdict


def outcome(plant: Plant, folder: Path) -> str:
    """ "" when the planted error was seen, else what happened."""
    before = text_of(plant, folder)
    changed = before.replace(plant.right, plant.wrong)
    (folder / plant.file).write_text(changed, encoding="utf-8")
    try:
        status, output = run_check(plant.check, folder)
    finally:
        (folder / plant.file).write_text(before, encoding="utf-8")
    if seen(status, output):
        return ""
    last = [line for line in output.splitlines() if line.strip()][-1:]
    return f"status {status}: {''.join(last)[:160]}"


def run_all(plants: Sequence[Plant], jobs: int, clean: bool, say: Callable[[str], None]) -> int:
    """Plant every row; the exit status."""
    with tempfile.TemporaryDirectory(prefix="plant-") as name:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(jobs):
            copies.put(copy_checkout(Path(name) / str(number)))

        def task(title: str, work: Callable[[Path], str]) -> str:
            folder, start = copies.get(), time.monotonic()
            try:
                found = work(folder)
            finally:
                copies.put(folder)
            say(f"{title:75} {found or 'as it should be'} ({time.monotonic() - start:.0f} s)")
            return f"{title}: {found}" if found else ""

        def unplanted(check: str, folder: Path) -> str:
            status, output = run_check(check, folder)
            return f"red without an error: {output[-300:]}" if status else ""

        tasks = []
        if clean:
            for check in dict.fromkeys(plant.check for plant in plants):
                tasks.append((f"nothing planted: {check}", lambda f, c=check: unplanted(c, f)))
        tasks += [(plant.name, lambda f, p=plant: outcome(p, f)) for plant in plants]
        with ThreadPoolExecutor(jobs) as pool:
            failed = [text for text in pool.map(lambda t: task(*t), tasks) if text]
    for text in failed:
        say(f"not seen: {text}")
    say(f"{len(plants)} errors planted, {len(failed)} checks did not do as they should")
    return 1 if failed else 0


def main(words: Sequence[str] | None = None) -> int:
    """The command; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plant", description=__doc__)
    parser.add_argument("--only", action="append", default=[], help="names that contain this")
    parser.add_argument("--quick", action="store_true", help="the part that CI runs")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args(words)
    chosen = [p for p in PLANTS if (p.quick or not options.quick)
              and (not options.only or any(word in p.name for word in options.only))]  # fmt: skip
    try:
        if not chosen:
            raise UserError(f"--only {' '.join(options.only)}: no row of benchmarks/plants.py")
        for plant in chosen:
            # Before the first check runs.
            text_of(plant, ROOT)
        return run_all(
            chosen, options.jobs, not options.quick, lambda text: print(text, flush=True)
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
