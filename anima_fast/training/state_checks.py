"""Whether a resume state fits the run that wants to go on from it, and if not, what differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from anima_fast.errors import UserError
from anima_fast.training.state_files import NETWORK_FILE, tensors_of

if TYPE_CHECKING:
    from anima_fast.adapters.lora import LoRANetwork
    from anima_fast.data.plan import DatasetPlan


def dataset_fingerprint(plan: DatasetPlan, accumulation: int = 1) -> dict:
    """What a resumed run must share with the one before, from its `DatasetPlan`.

    File names, buckets, repeats and batch sizes decide the order of the batches; captions and
    folders may change.
    """
    rows = [
        f"{item.path.name} {item.bucket} {item.repeats} {item.is_reg} {item.dataset.batch_size}"
        for item in plan.items
    ]
    return {
        "number of images": len(plan.items),
        "batches per epoch": plan.batches_per_epoch,
        "gradient_accumulation_steps": accumulation,
        "image files, buckets, repeats and batch sizes": hashlib.sha256(
            "\n".join(rows).encode("utf-8")
        ).hexdigest()[:16],
    }


def check_fingerprint(folder: Path, saved: dict, now: Mapping | None) -> None:
    """The same dataset and batches (None = not to be compared)."""
    if now is None:
        return
    # Through JSON, as the saved one went: tuples are lists there.
    now = json.loads(json.dumps(dict(now)))
    changed = [
        f"{name} was {saved.get(name)}, is {now.get(name)}"
        for name in {**saved, **now}
        if saved.get(name) != now.get(name)
    ]
    if changed:
        raise UserError(
            f"{folder} belongs to another run: {'; '.join(changed)}. Restore that, or start anew "
            f"from its weights with --network_weights {folder / NETWORK_FILE}"
        )


def check_network(folder: Path, network: LoRANetwork) -> None:
    """Same modules, ranks and alphas, or an explanation."""
    saved, now = tensors_of(folder / NETWORK_FILE), network.state_tensors()
    gone, new = sorted(saved.keys() - now.keys()), sorted(now.keys() - saved.keys())
    differences = []
    if gone:
        differences.append(f"{len(gone)} tensors are trained no more ({gone[0]}, ...)")
    if new:
        differences.append(f"{len(new)} tensors are new ({new[0]}, ...)")
    for name in sorted(saved.keys() & now.keys()):
        was, here = saved[name], now[name]
        if was.shape != here.shape:
            differences.append(f"{name} was {list(was.shape)}, is {list(here.shape)} (rank?)")
            break
        if name.endswith(".alpha") and was.item() != here.item():
            differences.append(f"{name} was {was.item():g}, is {here.item():g}")
            break
    if differences:
        raise UserError(
            f"{folder} holds another network: {'; '.join(differences)}. Give the --network_dim, "
            "--network_alpha and --network_args of that run"
        )


def check_optimizer(folder: Path, record: dict, optimizer: torch.optim.Optimizer) -> None:
    """The same class with as many groups and parameters."""
    name = class_name(optimizer)
    if record["optimizer"] != name:
        raise UserError(
            f"{folder} was made with the optimizer {record['optimizer']}, this run has {name}: "
            "give the same --optimizer_type, or start anew from its weights with "
            f"--network_weights {folder / NETWORK_FILE}"
        )
    groups = json.loads((folder / "optimizer.json").read_text(encoding="utf-8"))["dict"]
    saved = [dict(group["dict"]) for group in dict(groups)["param_groups"]["list"]]
    counts = [len(group["params"]["list"]) for group in saved]
    if counts != [len(group["params"]) for group in optimizer.param_groups]:
        raise UserError(
            f"{folder} has {len(counts)} groups of learning rates, this run has "
            f"{len(optimizer.param_groups)}: give the same rates and LoRA+ ratios"
        )


def check_scheduler(
    folder: Path, schedule: dict, scheduler: torch.optim.lr_scheduler.LRScheduler
) -> None:
    """The same kind of scheduler; a named schedule may be another one."""
    if schedule["class"] != class_name(scheduler):
        raise UserError(
            f"{folder} was made with the scheduler {schedule['class']}, this run has "
            f"{class_name(scheduler)}: give the same --lr_scheduler, --lr_scheduler_type and "
            "--optimizer_type"
        )


def tell_changed_rates(
    optimizer: torch.optim.Optimizer, new_rates: list[float | None], say: Callable[[str], None]
) -> None:
    """One line for each group whose own rate is not the saved one."""
    for group, new in zip(optimizer.param_groups, new_rates, strict=True):
        was = group.get("initial_lr")
        if None not in (was, new) and was != new:
            name = group.get("name", "the network")
            say(f"the learning rate of {name} changes from {was:g} to {new:g}, as asked for")


def class_name(thing: object) -> str:
    """Module and name of a thing's class, or of the one that it stands for."""
    cls = getattr(thing, "stands_for", type(thing))
    return f"{cls.__module__}.{cls.__qualname__}"
