"""What an earlier run of the same name left in the output folder: told, and moved aside.

A new run would write its files and states under the same names, and prune and delete them. Those
that are there already go to OUT/previous/NAME-DATE/ first, whole, once the new run is ready.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anima_fast.errors import UserError
from anima_fast.files import disk_error, read_safetensors_header
from anima_fast.training.checkpoints import EMA_MARK, own_names
from anima_fast.training.state_files import find_states, read_record

if TYPE_CHECKING:
    from anima_fast.training.kind import AnyOptions, Say

FOLDER = "previous"
# Sizes from here on are told.
LARGE = 1e9


def notice(options: AnyOptions) -> str | None:
    """One line about the run that is in the output folder of a new one; None if there is none."""
    if not options.output_dir or not left_behind(options):
        return None
    where = f"this new run moves it to {Path(options.output_dir, FOLDER)}"
    for state in find_states(options.output_dir, options.output_stem):
        record, problem = read_record(state)
        if not problem:
            step, whole = record["position"]["step"], state.name == f"{options.output_stem}-state"
            kind = "a finished run of" if whole else "an unfinished run at step"
            steps = f" {step} steps" if whole else f" {step}"
            return f"{kind}{steps} is here: --resume auto goes on with it; {where}"
    return f"an earlier run of this name is here; {where}"


def left_behind(options: AnyOptions) -> list[Path]:
    """Files and states in the output folder under the names that a run with these options uses.

    Files that the options name (a model or a LoRA to start from) are not among them.
    """
    names = own_names(options)
    pattern = re.compile(
        rf"\.?(?:{names})(?:-\d{{6}}|-step\d{{8}}|-best|-autosave)?(?:{EMA_MARK})?"
        r"(?:\.safetensors|-state(?:\.prev|\.old)?)"
    )
    used = set(_named_paths(options))
    folder = Path(options.output_dir or "")
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [p for p in found if pattern.fullmatch(p.name) and p.resolve() not in used]


def set_aside(options: AnyOptions, run_id: str, *, fresh: bool, say: Say) -> None:
    """Move what another run has left to OUT/previous/NAME-DATE/.

    A `fresh` run moves everything under its names; one that resumes only what says that it is of
    another run. Raises `UserError` when the system refuses.
    """
    found = [p for p in left_behind(options) if fresh or run_of(p) not in (None, run_id)]
    if not found:
        return
    parent = Path(options.output_dir or "") / FOLDER
    name = f"{options.output_stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    target, number = parent / name, 1
    while target.exists():
        number += 1
        target = parent / f"{name}-{number}"
    size = sum(map(_size, found))
    try:
        target.mkdir(parents=True)
        for path in found:
            os.replace(path, target / path.name)
    except OSError as error:
        raise disk_error(error, target) from error
    large = f" ({size / 1e9:.1f} GB)" if size >= LARGE else ""
    say(f"the files and states of an earlier run are now in {target}{large}")


def ahead(options: AnyOptions, run_id: str, step: int) -> str | None:
    """Names the file of this run with the most steps, if it has more than its state."""
    found = [(_steps(p), p.name) for p in left_behind(options) if run_of(p) == run_id]
    most, name = max(found, default=(0, ""))
    if most <= step:
        return None
    return f"{name} is of step {most}: the steps after {step} had no state and are made again"


def _steps(path: Path) -> int:
    """The steps that a LoRA file says it has; 0 for everything else."""
    if path.is_dir():
        return 0
    steps = read_safetensors_header(path).get("__metadata__", {}).get("ss_steps", "")
    return int(steps) if steps.isdecimal() else 0


def run_of(path: Path) -> str | None:
    """The run that a file or a state says it belongs to; None if it does not say."""
    if path.is_dir():
        return read_record(path)[0].get("run")
    try:
        return read_safetensors_header(path).get("__metadata__", {}).get("ss_run_id")
    except UserError:
        return None


def _size(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _named_paths(options: AnyOptions) -> Iterator[Path]:
    """Every path that an option may mean."""
    for field in fields(options):
        value: Any = getattr(options, field.name)
        for text in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(text, str) and text and "\0" not in text:
                yield Path(text).absolute().resolve()
