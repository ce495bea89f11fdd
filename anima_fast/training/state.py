"""Resume states: everything a run needs to go on exactly where it stood.

A state is a folder: `state.json` (position, seed, fingerprint, versions, checksums),
`network.safetensors` (a LoRA file like any other; in full fine-tuning the trained weights),
`optimizer.json` + `optimizer.safetensors`, `scheduler.json`, `scaler.json`. There is no random
state in it, because every random number of a run follows from (seed, epoch, step). The folder
appears at once, complete, and the one before it stays until then, so that a kill at any instant
leaves at least one whole state. Files are written one tensor at a time.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from anima_fast.errors import UserError
from anima_fast.files import (
    atomic_folder,
    remove_leftovers,
    replace,
    save_safetensors,
    write_json,
)
from anima_fast.models.checkpoint import Checkpoint
from anima_fast.training.optimizers.schedules import restore_scheduler
from anima_fast.training.state_checks import (
    check_fingerprint,
    check_network,
    check_optimizer,
    check_scheduler,
    class_name,
    dataset_fingerprint,
    tell_changed_rates,
    tell_kept_arguments,
)
from anima_fast.training.state_files import (
    NETWORK_FILE,
    STATE_FILE,
    damage,
    read_packed,
    read_record,
    seal,
    versions,
    write_packed,
)

if TYPE_CHECKING:
    from anima_fast.training.network import Network
    from anima_fast.training.optimizers.ema import Ema

__all__ = [
    "dataset_fingerprint", "find_states", "load_state", "resolve_resume", "save_state",
    "state_seed",
]  # fmt: skip

logger = logging.getLogger("anima_fast")

EMA_FILE = "ema.safetensors"


def save_state(
    folder: str | os.PathLike,
    *,
    network: Network,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler | None = None,
    position: Mapping,
    seed: int | None = None,
    fingerprint: Mapping | None = None,
    ema: Ema | None = None,
    keep_previous: bool = False,
) -> None:
    """Write a state folder atomically.

    Args:
        folder: where; a state that is there already is replaced.
        network, optimizer, scheduler, scaler: what is saved. A schedule-free optimizer must be in
            training mode.
        position: JSON values, given back by `load_state` as they are; has at least `step`.
        seed: the run's seed, for `state_seed`.
        fingerprint: named JSON values that must be the same in the run that resumes, such as
            `dataset_fingerprint(plan)`.
        ema: the running mean of the weights, if there is one.
        keep_previous: keep the replaced state beside the new one as `FOLDER.prev`.

    Raises:
        UserError: disk full, no permission, or an optimizer whose state cannot be saved.
    """
    folder = Path(folder)
    remove_leftovers(folder)
    with atomic_folder(folder) as new:
        save_safetensors(network.state_tensors(), new / NETWORK_FILE)
        write_packed(new, "optimizer", optimizer.state_dict())
        write_json(new / "scheduler.json", _scheduler_record(scheduler))
        write_json(new / "scaler.json", scaler.state_dict() if scaler is not None else {})
        if ema is not None:
            save_safetensors(ema.state_tensors(), new / EMA_FILE)
        record = {
            "position": dict(position),
            "seed": seed,
            "fingerprint": dict(fingerprint or {}),
            "optimizer": class_name(optimizer),
            "versions": versions(),
            "saved_at": time.time(),
        }
        seal(new, record)
        if keep_previous and folder.exists():
            previous = folder.with_name(f"{folder.name}.prev")
            shutil.rmtree(previous, ignore_errors=True)
            replace(folder, previous)


def load_state(
    folder: str | os.PathLike,
    *,
    network: Network,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler | None = None,
    fingerprint: Mapping | None = None,
    ema: Ema | None = None,
    say: Callable[[str], None] = logger.info,
) -> dict:
    """Bring a freshly made run to the point of a state; everything is checked before.

    Args:
        folder: a state folder, or one of sd-scripts (of which only the network is taken).
        network, optimizer, scheduler, scaler, ema: of the run that resumes; changed in place.
        fingerprint: as given to `save_state`; None skips the comparison.
        say: gets one line for every difference that does not prevent resuming.

    Returns:
        The saved position; {} for a state of sd-scripts, whose run starts counting from zero.

    Raises:
        UserError: a damaged state (naming the newest whole one before it), or one of another
            dataset, network or optimizer (saying what differs).
    """
    folder = Path(folder)
    if is_foreign_state(folder):
        return _load_foreign(folder, network, say)
    record = _whole_record(folder)
    check_fingerprint(folder, record["fingerprint"], fingerprint, network)
    check_network(folder, network)
    check_optimizer(folder, record, optimizer, network)
    schedule = json.loads((folder / "scheduler.json").read_text(encoding="utf-8"))
    check_scheduler(folder, schedule, scheduler)
    ignored = network.load(folder / NETWORK_FILE)
    if ignored:
        raise UserError(f"{folder / NETWORK_FILE} has {len(ignored)} tensors that do not fit")
    if ema is not None:
        _load_ema(folder / EMA_FILE, ema, say)
    fresh = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(read_packed(folder, "optimizer"))
    tell_changed_rates(optimizer, [group.get("initial_lr") for group in fresh], say)
    tell_kept_arguments(optimizer, fresh[0], say)
    for notice in restore_scheduler(scheduler, schedule["state"]):
        say(notice)
    saved_scaler = json.loads((folder / "scaler.json").read_text(encoding="utf-8"))
    if scaler is not None and scaler.is_enabled() and saved_scaler:
        scaler.load_state_dict(saved_scaler)
    for name, version in versions().items():
        was = record["versions"].get(name)
        if was != version:
            say(f"{name} is {version}, the state was made with {was}: not bit-identical perhaps")
    return record["position"]


def _load_ema(path: Path, ema: Ema, say: Callable[[str], None]) -> None:
    if path.exists():
        ema.load(Checkpoint.open(path))
        return
    ema.restart()
    say("the state has no running mean of the weights (ema_decay): it starts from these weights")


def state_seed(folder: str | os.PathLike) -> int | None:
    """The seed of the run that made a state; None for a state of sd-scripts.

    Raises `UserError` when the state is damaged.
    """
    folder = Path(folder)
    return None if is_foreign_state(folder) else _whole_record(folder)["seed"]


def find_states(output_dir: str | os.PathLike, stem: str | None = None) -> list[Path]:
    """State folders of a run in its output folder, newest first, damaged ones included.

    Args:
        output_dir: where to look; a folder that does not exist holds none.
        stem: the run's output name; None takes the states of every run.
    """
    names = re.escape(stem) if stem else ".+"
    # The replaced state is called `.NAME.old` for an instant, and for good after a kill just then.
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
        value: a state folder, an output folder (its newest whole state), "auto" (the newest whole
            state of this run, if there is any), or None.
        output_dir, stem: of this run.

    Returns:
        A state folder, or None when the run starts anew.

    Raises:
        UserError: the folder does not exist or holds no state, or every state is damaged.
    """
    if not value:
        return None
    if value == "auto":
        states = find_states(output_dir, stem) if output_dir else []
        return _newest_whole(states, Path(output_dir)) if states else None
    folder = Path(value)
    if not folder.exists():
        # A kill between the two renames of a save leaves the state before under one of these.
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
        return _newest_whole(states, folder)
    raise UserError(
        f"--resume {value} holds no resume state: states are folders named NAME-state, made by "
        "--save_state or by the autosave"
    )


def is_foreign_state(folder: Path) -> bool:
    """Whether a folder is a training state of sd-scripts."""
    own = (folder / STATE_FILE).exists()
    marks = ("train_state.json", "optimizer.bin")
    return (
        not own
        and (folder / "model.safetensors").exists()
        and any((folder / mark).exists() for mark in marks)
    )


def _load_foreign(folder: Path, network: Network, say: Callable[[str], None]) -> dict:
    ignored = network.load(folder / "model.safetensors")
    say(
        f"{folder} is a state of sd-scripts: only its network weights are taken; optimizer, "
        "schedule and step count start anew" + (f"; {len(ignored)} keys ignored" if ignored else "")
    )
    return {}


def _whole_record(folder: Path) -> dict:
    """The record of a state, after its checksums were compared."""
    problem = damage(folder)
    if problem is None:
        return read_record(folder)[0]
    older = [p for p in find_states(folder.parent) if p != folder and damage(p) is None]
    older = [p for p in older if _age(p) <= _age(folder)] or older
    remedy = (
        f"go on from the newest whole state beside it with --resume {older[0]}"
        if older
        else "there is no whole state beside it, so start anew without --resume"
    )
    raise UserError(f"the resume state {folder} is damaged ({problem}): {remedy}")


def _newest_whole(states: list[Path], folder: Path) -> Path:
    for state in states:
        problem = damage(state)
        if problem is None:
            return state
        logger.warning("resume state %s is damaged (%s): trying the one before", state, problem)
    raise UserError(
        f"every resume state in {folder} is damaged: start anew without --resume, or from a saved "
        "file (a LoRA with --network_weights, a model with --pretrained_model_name_or_path)"
    )


def _scheduler_record(scheduler: torch.optim.lr_scheduler.LRScheduler) -> dict:
    record = {"class": class_name(scheduler), "state": scheduler.state_dict()}
    try:
        json.dumps(record)
    except TypeError as error:
        raise UserError(
            f"the scheduler {record['class']} cannot be saved in a resume state ({error}): use "
            "another one, or --autosave_minutes 0 without --save_state"
        ) from error
    return record


def _age(folder: Path) -> tuple[float, str]:
    """When a state was saved; the folder's own time when its record cannot be read."""
    record, problem = read_record(folder)
    return (folder.stat().st_mtime if problem else record["saved_at"], folder.name)
