"""Whether a resume state fits the run that wants to go on from it, and if not, what differs."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from anima_fast.errors import UserError
from anima_fast.files import dtype_code, read_safetensors_header
from anima_fast.training.state_files import NETWORK_FILE, tensors_of

# States written before own classes had a `saved_name` hold the module where the class was.
FORMER_NAMES = {
    f"anima_fast.training.schedules.{name}": f"anima_fast.{name}"
    for name in ("Schedule", "AdafactorSchedule")
}

if TYPE_CHECKING:
    from anima_fast.data.items import DatasetPlan
    from anima_fast.training.network import Network


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


def check_fingerprint(folder: Path, saved: dict, now: Mapping | None, network: Network) -> None:
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
            f"{folder} belongs to another run: {'; '.join(changed)}. Restore that, or "
            f"{_start_from_weights(folder, network)}"
        )


def _start_from_weights(folder: Path, network: Network) -> str:
    """How to use the weights of a state without the rest."""
    lora = f"start anew from its weights with --network_weights {folder / NETWORK_FILE}"
    return getattr(network, "start_from_weights", lora)


def check_network(folder: Path, network: Network) -> None:
    """Same tensors, shapes and alphas (of full fine-tuning: and dtypes), or an explanation."""
    path = folder / NETWORK_FILE
    saved, now = read_safetensors_header(path), network.state_tensors()
    saved.pop("__metadata__", None)
    gone, new = sorted(saved.keys() - now.keys()), sorted(now.keys() - saved.keys())
    differences = []
    if gone:
        differences.append(f"{len(gone)} tensors are trained no more ({gone[0]}, ...)")
    if new:
        differences.append(f"{len(new)} tensors are new ({new[0]}, ...)")
    both = sorted(saved.keys() & now.keys())
    alphas = tensors_of(path, [name for name in both if name.endswith(".alpha")])
    for name in both:
        was, here = saved[name], now[name]
        if was["shape"] != list(here.shape):
            differences.append(f"{name} was {was['shape']}, is {list(here.shape)} (rank?)")
            break
        if name in alphas and alphas[name].item() != here.item():
            differences.append(f"{name} was {alphas[name].item():g}, is {here.item():g}")
            break
        if hasattr(network, "same_network") and was["dtype"] != dtype_code(here.dtype, name):
            kind = str(here.dtype).removeprefix("torch.")
            differences.append(f"{name} was {was['dtype']}, is {kind}")
            break
    if differences:
        lora = "the --network_dim, --network_alpha and --network_args of that run"
        raise UserError(
            f"{folder} holds another network: {'; '.join(differences)}. Give "
            f"{getattr(network, 'same_network', lora)}"
        )


def check_optimizer(
    folder: Path,
    record: dict,
    optimizer: torch.optim.Optimizer,
    network: Network,
) -> None:
    """The same class with as many groups and parameters."""
    name = class_name(optimizer)
    if record["optimizer"] != name:
        raise UserError(
            f"{folder} was made with the optimizer {record['optimizer']}, this run has {name}: "
            f"give the same --optimizer_type, or {_start_from_weights(folder, network)}"
        )
    groups = json.loads((folder / "optimizer.json").read_text(encoding="utf-8"))["dict"]
    saved = [dict(group["dict"]) for group in dict(groups)["param_groups"]["list"]]
    counts = [len(group["params"]["list"]) for group in saved]
    if counts != [len(group["params"]) for group in optimizer.param_groups]:
        raise UserError(
            f"{folder} has {len(counts)} groups of learning rates, this run has "
            f"{len(optimizer.param_groups)}: give the same rates of parts and LoRA+ ratios"
        )


def check_scheduler(
    folder: Path, schedule: dict, scheduler: torch.optim.lr_scheduler.LRScheduler
) -> None:
    """The same kind of scheduler; a named schedule may be another one."""
    saved = FORMER_NAMES.get(schedule["class"], schedule["class"])
    if saved != class_name(scheduler):
        raise UserError(
            f"{folder} was made with the scheduler {saved}, this run has "
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


def tell_kept_arguments(
    optimizer: torch.optim.Optimizer, fresh: Mapping, say: Callable[[str], None]
) -> None:
    """One line for each argument whose saved value stays though another one is given.

    Args:
        optimizer: with the saved state.
        fresh: its first group before. What is no argument of its class is state.
    """
    kept, cls = optimizer.param_groups[0], getattr(optimizer, "stands_for", type(optimizer))
    for name in inspect.signature(cls).parameters:
        own = name not in ("params", "lr", "fused", "foreach") and name in fresh
        if own and kept.get(name) != fresh[name]:
            say(f"optimizer_args: {name} stays {kept.get(name)} as in the state, not {fresh[name]}")


def class_name(thing: object) -> str:
    """The name by which saved files know a thing's class, or the class that it stands for.

    A class of this package carries a `saved_name`, which stays when its module moves.
    """
    cls = getattr(thing, "stands_for", type(thing))
    return getattr(cls, "saved_name", f"{cls.__module__}.{cls.__qualname__}")
