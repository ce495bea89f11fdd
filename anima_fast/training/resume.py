"""Which resume state `--resume` means: states found, damaged ones passed over."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from anima_fast.errors import UserError
from anima_fast.training.state_files import STATE_FILE, damage, read_record

logger = logging.getLogger("anima_fast")


def find_states(output_dir: str | os.PathLike, stem: str | None = None) -> list[Path]:
    """State folders of a run in its output folder, newest first, damaged ones included.

    Args:
        output_dir: where to look; it need not exist.
        stem: the run's output name; None finds the states of every run.
    """
    names = re.escape(stem) if stem else ".+"
    # The replaced state is called `.NAME.old` for an instant, and keeps that name if killed then.
    pattern = re.compile(
        rf"\.?(?:{names}|epoch|at|last)(?:-\d{{6}}|-step\d{{8}}|-autosave)?-state(?:\.prev|\.old)?"
        if stem in (None, "last")
        else rf"\.?{names}(?:-\d{{6}}|-step\d{{8}}|-autosave)?-state(?:\.prev|\.old)?"
    )
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if pattern.fullmatch(path.name)]
    return sorted(filter(Path.is_dir, found), key=_age, reverse=True)


def resolve_resume(
    value: str | None, output_dir: str | os.PathLike | None, stem: str | None = None
) -> Path | None:
    """The state folder that `--resume` means.

    Args:
        value: a state folder, an output folder (its newest intact state), "auto" (the newest
            intact state of this run, if there is one), or None.
        output_dir, stem: of this run.

    Returns:
        A state folder, or None if the run starts from the beginning.

    Raises:
        UserError: the folder does not exist or holds no state, or every state is damaged.
    """
    if not value:
        return None
    if value == "auto":
        if not output_dir:
            return None
        states = find_states(output_dir, stem)
        return _newest_intact(states, Path(output_dir)) if states else None
    folder = Path(value)
    if not folder.exists():
        # A kill between the two renames of a save leaves the previous state under one of these.
        for name in (f".{folder.name}.old", f"{folder.name}.prev"):
            if damage(folder.with_name(name)) is None:
                return folder.with_name(name)
    if not folder.is_dir():
        raise UserError(
            f"--resume {value} does not exist: give a state folder (NAME-state) or auto"
        )
    if (folder / STATE_FILE).exists() or is_foreign_state(folder):
        return folder
    states = find_states(folder, stem) or find_states(folder)
    if states:
        return _newest_intact(states, folder)
    raise UserError(
        f"--resume {value} holds no resume state: states are folders named NAME-state, made by "
        "--save_state or by the autosave"
    )


def state_seed(folder: str | os.PathLike) -> int | None:
    """The seed of the run that made a state; None for a state of sd-scripts.

    Raises `UserError` when the state is damaged.
    """
    folder = Path(folder)
    return None if is_foreign_state(folder) else intact_record(folder)["seed"]


def is_foreign_state(folder: Path) -> bool:
    """Whether a folder is a training state of sd-scripts."""
    own = (folder / STATE_FILE).exists()
    marks = ("train_state.json", "optimizer.bin")
    return (
        not own
        and (folder / "model.safetensors").exists()
        and any((folder / mark).exists() for mark in marks)
    )


def intact_record(folder: Path) -> dict:
    """The record of a state whose checksums are right."""
    problem = damage(folder)
    if problem is None:
        return read_record(folder)[0]
    older = [p for p in find_states(folder.parent) if p != folder and damage(p) is None]
    older = [p for p in older if _age(p) <= _age(folder)] or older
    remedy = (
        f"go on from the newest whole state beside it with --resume {older[0]}"
        if older
        else "there is no whole state beside it, so start again without --resume"
    )
    raise UserError(f"the resume state {folder} is damaged ({problem}): {remedy}")


def _newest_intact(states: list[Path], folder: Path) -> Path:
    for state in states:
        problem = damage(state)
        if problem is None:
            return state
        logger.warning("resume state %s is damaged (%s): trying the one before", state, problem)
    raise UserError(
        f"every resume state in {folder} is damaged: start again without --resume, or from a saved "
        "file (a LoRA with --network_weights, a model with --pretrained_model_name_or_path)"
    )


def _age(folder: Path) -> tuple[float, str]:
    """When a state was saved; the folder's own time if its record cannot be read."""
    record, problem = read_record(folder)
    return (folder.stat().st_mtime if problem else record["saved_at"], folder.name)
