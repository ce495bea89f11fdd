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
import logging
import os
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
from anima_fast.training.resume import intact_record, is_foreign_state
from anima_fast.training.state_checks import (
    LORA_REMEDIES,
    Remedies,
    check_fingerprint,
    check_network,
    check_optimizer,
    check_scheduler,
    class_name,
    tell_changed_rates,
    tell_kept_arguments,
)
from anima_fast.training.state_files import (
    NETWORK_FILE,
    read_packed,
    seal,
    versions,
    write_packed,
)

if TYPE_CHECKING:
    from anima_fast.training.kind import Network
    from anima_fast.training.optimizers.ema import Ema

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
        position: JSON values that `load_state` returns unchanged; at least `step`.
        seed: the run's seed, for `state_seed`.
        fingerprint: named JSON values that must be the same in the run that resumes, such as
            `dataset_fingerprint(plan)`.
        ema: the running mean of the weights, if there is one.
        keep_previous: keep the replaced state next to the new one as `FOLDER.prev`.

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
    remedies: Remedies = LORA_REMEDIES,
    say: Callable[[str], None] = logger.info,
) -> dict:
    """Restore a freshly made run from a state; everything is checked first.

    Args:
        folder: a state folder, or one of sd-scripts (of which only the network is taken).
        network, optimizer, scheduler, scaler, ema: of the run that resumes; changed in place.
        fingerprint: as given to `save_state`; None skips the comparison.
        remedies: what messages about a state that does not fit advise.
        say: gets one line for each difference that does not prevent resuming.

    Returns:
        The saved position; {} for a state of sd-scripts, whose run starts counting from zero.

    Raises:
        UserError: a damaged state (names the newest intact one before it), or one of another
            dataset, network or optimizer (says what differs).
    """
    folder = Path(folder)
    if is_foreign_state(folder):
        return _load_foreign(folder, network, say)
    record = intact_record(folder)
    check_fingerprint(folder, record["fingerprint"], fingerprint, remedies)
    check_network(folder, network.state_tensors(), remedies)
    check_optimizer(folder, record, optimizer, remedies)
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
            say(f"{name} is {version}, the state was made with {was}: maybe not bit-identical")
    return record["position"]


def _load_ema(path: Path, ema: Ema, say: Callable[[str], None]) -> None:
    if path.exists():
        ema.load(Checkpoint.open(path))
        return
    ema.restart()
    say("the state has no running mean of the weights (ema_decay): it starts from these weights")


def _load_foreign(folder: Path, network: Network, say: Callable[[str], None]) -> dict:
    ignored = network.load(folder / "model.safetensors")
    left_out = f"; {len(ignored)} keys ignored" if ignored else ""
    say(
        f"{folder} is a state of sd-scripts: only its network weights are taken; optimizer, "
        f"schedule and step count start again{left_out}"
    )
    return {}


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
