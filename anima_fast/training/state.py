"""Resume states: everything a run needs to continue exactly where it was.

A state is a folder: `state.json` (position, seed, fingerprint, versions, checksums),
`network.safetensors` (a LoRA file like any other; in full fine-tuning the trained weights),
`optimizer.json` + `optimizer.safetensors`, `scheduler.json`, `scaler.json`. It holds no
random state, because every random number of a run follows from (seed, epoch, step). The folder
appears at once, complete, and the previous one stays until then, so that a kill at any instant
leaves at least one complete state. Files are written one tensor at a time.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from anima_fast.errors import UserError
from anima_fast.files import atomic_folder, remove_leftovers, replace, save_safetensors, write_json
from anima_fast.models.checkpoint import Checkpoint
from anima_fast.training import state_checks as checks
from anima_fast.training import state_files as files
from anima_fast.training.arithmetic import changed_arithmetic, record_of
from anima_fast.training.optimizers.schedules import restore_scheduler
from anima_fast.training.run import Position, Run

if TYPE_CHECKING:
    from anima_fast.training.optimizers.ema import Ema

EMA_FILE = "ema.safetensors"


def save_state(folder: Path, run: Run, position: Position, *, keep_previous: bool = False) -> None:
    """Write a state folder atomically; one that is there is replaced, or kept as `FOLDER.prev`.

    A schedule-free optimizer must be in training mode. Raises `UserError` for a full disk, no
    permission, or an optimizer whose state cannot be saved.
    """
    remove_leftovers(folder)
    with atomic_folder(folder) as new:
        save_safetensors(run.network.state_tensors(), new / files.NETWORK_FILE)
        files.write_packed(new, "optimizer", run.optimizer.state_dict())
        write_json(new / "scheduler.json", _scheduler_record(run.scheduler))
        write_json(new / "scaler.json", run.scaler.state_dict())
        if run.training.ema is not None:
            save_safetensors(run.training.ema.state_tensors(), new / EMA_FILE)
        record = {
            "position": {**asdict(position), "sigma_bins": run.sigma_bins.copy().tolist()},
            "run": run.id,
            "seed": run.seed,
            "fingerprint": run.fingerprint,
            "optimizer": checks.class_name(run.optimizer),
            "arithmetic": record_of(run.training.arithmetic),
            "versions": files.versions(),
            "saved_at": time.time(),
        }
        files.seal(new, record)
        if keep_previous and folder.exists():
            previous = folder.with_name(f"{folder.name}.prev")
            shutil.rmtree(previous, ignore_errors=True)
            replace(folder, previous)


def load_state(folder: Path, run: Run, *, say: Callable[[str], None]) -> Position:
    """Restore a freshly made run from a state; everything is checked first.

    Args:
        folder: a state folder, or one of sd-scripts (of which only the network is taken).
        run: changed in place.
        say: gets one line for each difference that does not prevent resuming.

    Returns the saved position; the beginning for a state of sd-scripts.

    Raises:
        UserError: a damaged state (names the newest intact one before it), or one of another
            dataset, network or optimizer (says what differs).
    """
    network, optimizer, remedies = run.network, run.optimizer, run.training.remedies
    if files.is_foreign_state(folder):
        ignored = network.load(folder / "model.safetensors")
        left_out = f"; {len(ignored)} keys ignored" if ignored else ""
        say(
            f"{folder} is a state of sd-scripts: only its network weights are taken; optimizer, "
            f"schedule and step count start again{left_out}"
        )
        return Position()
    record = files.intact_record(folder)
    checks.check_fingerprint(folder, record["fingerprint"], run.fingerprint, remedies)
    checks.check_network(folder, network.state_tensors(), remedies)
    checks.check_optimizer(folder, record, optimizer, remedies)
    schedule = files.read_json(folder / "scheduler.json")
    checks.check_scheduler(folder, schedule, run.scheduler)
    if ignored := network.load(folder / files.NETWORK_FILE):
        raise UserError(f"{folder / files.NETWORK_FILE} has {len(ignored)} tensors that do not fit")
    if run.training.ema is not None:
        _load_ema(folder / EMA_FILE, run.training.ema, say)
    fresh = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(files.read_packed(folder, "optimizer"))
    for notice in (
        *checks.changed_rates(optimizer, fresh),
        *checks.kept_arguments(optimizer, fresh[0]),
        *restore_scheduler(run.scheduler, schedule["state"]),
    ):
        say(notice)
    scale = files.read_json(folder / "scaler.json")
    if run.scaler.is_enabled() and scale:
        run.scaler.load_state_dict(scale)
    if text := changed_arithmetic(record.get("arithmetic"), run.training.arithmetic):
        say(text)
    for name, version in files.versions().items():
        was = record["versions"].get(name)
        if was != version:
            say(f"{name} is {version}, the state was made with {was}: maybe not bit-identical")
    # Those of older versions have none.
    run.id = record.get("run", run.id)
    position = dict(record["position"])
    if bins := position.pop("sigma_bins", None):
        run.sigma_bins.restore(torch.tensor(bins))
    return Position(**position)


def _load_ema(path: Path, ema: Ema, say: Callable[[str], None]) -> None:
    if path.exists():
        ema.load(Checkpoint.open(path))
        return
    ema.restart()
    say("the state has no running mean of the weights (ema_decay): it starts from these weights")


def _scheduler_record(scheduler: torch.optim.lr_scheduler.LRScheduler) -> dict:
    record = {"class": checks.class_name(scheduler), "state": scheduler.state_dict()}
    try:
        json.dumps(record)
    except TypeError as error:
        raise UserError(
            f"the scheduler {record['class']} cannot be saved in a resume state ({error}): use "
            "another one, or --autosave_minutes 0 without --save_state"
        ) from error
    return record
