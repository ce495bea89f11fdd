"""Whether a resume state fits the run that resumes from it, and if not, what differs."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anima_fast.errors import UserError
from anima_fast.files import dtype_code, read_safetensors_header
from anima_fast.training.state_files import NETWORK_FILE, read_json, tensors_of

# States written before own classes had a `saved_name` hold the module where the class was.
FORMER_NAMES = {
    f"anima_fast.training.schedules.{name}": f"anima_fast.{name}"
    for name in ("Schedule", "AdafactorSchedule")
}

if TYPE_CHECKING:
    from anima_fast.data.items import DatasetPlan


@dataclass(frozen=True)
class Remedies:
    """What messages about a resume state that does not fit advise, by the kind of training.

    Attributes:
        start_over: how to use the weights of a state without the rest; {weights} is their file.
        same_network: what to give so that the network is that of the state.
        compares_dtypes: a network of other dtypes does not fit either.
    """

    start_over: str
    same_network: str
    compares_dtypes: bool = False

    def start_over_from(self, folder: Path) -> str:
        """`start_over` for a state."""
        return self.start_over.format(weights=folder / NETWORK_FILE)


LORA_REMEDIES = Remedies(
    start_over="start again from its weights with --network_weights {weights}",
    same_network="the --network_dim, --network_alpha and --network_args of that run",
)


def dataset_fingerprint(plan: DatasetPlan, accumulation: int = 1) -> dict:
    """What a resumed run must share with the saved one, from its `DatasetPlan`.

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


def check_fingerprint(folder: Path, saved: dict, now: dict, remedies: Remedies) -> None:
    """The same dataset and batches."""
    # Through JSON like the saved one, where tuples are lists.
    now = json.loads(json.dumps(now))
    changed = [
        f"{name} was {saved.get(name)}, is {now.get(name)}"
        for name in {**saved, **now}
        if saved.get(name) != now.get(name)
    ]
    if changed:
        raise UserError(
            f"{folder} belongs to another run: {'; '.join(changed)}. Restore that, or "
            f"{remedies.start_over_from(folder)}"
        )


def check_network(folder: Path, now: Mapping[str, Tensor], remedies: Remedies) -> None:
    """Same tensors, shapes and alphas (of full fine-tuning: and dtypes), or an explanation."""
    path = folder / NETWORK_FILE
    saved = read_safetensors_header(path)
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
        if remedies.compares_dtypes and was["dtype"] != dtype_code(here.dtype, name):
            kind = str(here.dtype).removeprefix("torch.")
            differences.append(f"{name} was {was['dtype']}, is {kind}")
            break
    if differences:
        raise UserError(
            f"{folder} holds another network: {'; '.join(differences)}. Give "
            f"{remedies.same_network}"
        )


def check_optimizer(
    folder: Path, record: dict, optimizer: torch.optim.Optimizer, remedies: Remedies
) -> None:
    """The same class with as many groups and parameters."""
    name = class_name(optimizer)
    if record["optimizer"] != name:
        raise UserError(
            f"{folder} was made with the optimizer {record['optimizer']}, this run has {name}: "
            f"give the same --optimizer_type, or {remedies.start_over_from(folder)}"
        )
    saved = dict(read_json(folder / "optimizer.json")["dict"])["param_groups"]["list"]
    counts = [len(dict(group["dict"])["params"]["list"]) for group in saved]
    if counts != [len(group["params"]) for group in optimizer.param_groups]:
        raise UserError(
            f"{folder} has {len(counts)} groups of learning rates, this run has "
            f"{len(optimizer.param_groups)}: give the same rates of parts and LoRA+ ratios"
        )


def check_scheduler(
    folder: Path, schedule: dict, scheduler: torch.optim.lr_scheduler.LRScheduler
) -> None:
    """The same kind of scheduler; named schedules may differ."""
    saved = FORMER_NAMES.get(schedule["class"], schedule["class"])
    if saved != class_name(scheduler):
        raise UserError(
            f"{folder} was made with the scheduler {saved}, this run has "
            f"{class_name(scheduler)}: give the same --lr_scheduler, --lr_scheduler_type and "
            "--optimizer_type"
        )


def changed_rates(optimizer: torch.optim.Optimizer, fresh: list[dict]) -> Iterator[str]:
    """Which groups now have another learning rate; `fresh` are those before the state's came."""
    for group, before in zip(optimizer.param_groups, fresh, strict=True):
        was, new = group.get("initial_lr"), before.get("initial_lr")
        if None not in (was, new) and was != new:
            name = group.get("name", "the network")
            yield f"the learning rate of {name} changes from {was:g} to {new:g}, as asked for"


def kept_arguments(optimizer: torch.optim.Optimizer, fresh: Mapping) -> Iterator[str]:
    """Which arguments keep their saved value although another one was given.

    `fresh` is the first group before the state's came. What the class does not take as an argument
    is state.
    """
    kept, cls = optimizer.param_groups[0], getattr(optimizer, "stands_for", type(optimizer))
    for name in inspect.signature(cls).parameters:
        own = name not in ("params", "lr", "fused", "foreach") and name in fresh
        was = kept.get(name)
        if own and was != fresh[name]:
            yield f"optimizer_args: {name} stays {was} as in the state, not {fresh[name]}"


def class_name(thing: object) -> str:
    """The name that saved files use for a thing's class, or for the class that it stands for.

    A class of this package has a `saved_name`, which stays the same when its module moves.
    """
    cls = getattr(thing, "stands_for", type(thing))
    return getattr(cls, "saved_name", f"{cls.__module__}.{cls.__qualname__}")
