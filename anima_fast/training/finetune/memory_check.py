"""Does a full fine-tuning run fit into memory, and if not, what would make it fit?

Before anything is encoded the peak is predicted (training/memory_needs.py) and compared with what
is free. A run that cannot fit is refused with both numbers and with the options that would help,
each with its own number, in the order of what they cost: first those that cost time only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from anima_fast.data.items import DatasetPlan
from anima_fast.data.plan import build_plan
from anima_fast.device import choose_device
from anima_fast.errors import UserError
from anima_fast.memory.free import device_free, host_free
from anima_fast.memory.plan import CONTEXT_BYTES, GIB, USABLE_SHARE, Prediction
from anima_fast.models.model_files import check_model_files
from anima_fast.training.finetune.memory_needs import Batch, block_count, largest_batch, prediction
from anima_fast.training.finetune.start import looks_at_all
from anima_fast.training.optimizers.recipes import find_optimizer

if TYPE_CHECKING:
    from anima_fast.options.run import FinetuneOptions

# Changes that save memory, in the order of what they cost. Blocks to swap are counted at the end.
REMEDIES: tuple[dict, ...] = (
    {"gradient_checkpointing": True, "recompute": "block"},
    {"llm_adapter_lr": 0.0},
    {"optimizer_type": "AdamW8bit", "optimizer_args": ()},
    {"full_bf16": True, "weight_update": "stochastic"},
    {"fused_backward_pass": True},
    {"optimizer_type": "AdaFactor", "optimizer_args": ("relative_step=False",)},
)


@dataclass(frozen=True)
class Budget:
    """Bytes that may be used; None where it is not known. On a CPU both are the host's."""

    device: int | None
    host: int | None
    same: bool = False

    def size(self, need: Prediction) -> int:
        """What counts of a prediction: the device, on a CPU everything."""
        return need.device + need.host if self.same else need.device

    def fits(self, need: Prediction) -> bool:
        """Whether a prediction stays within both."""
        if self.same:
            return self.host is None or self.size(need) <= self.host
        return (self.device is None or need.device <= self.device) and (
            self.host is None or need.host <= self.host
        )


def check_memory(
    options: FinetuneOptions,
    plan: DatasetPlan,
    device: torch.device,
    *,
    say: Callable[[str], None],
) -> None:
    """Refuse a run that cannot fit, else say what it will take.

    Raises:
        UserError: with the predicted and the free memory, and the options that would make it fit.
    """
    needs, budget = Needs(largest_batch(plan), device), measure_budget(options, device)
    need = needs(options)
    if not budget.fits(need):
        raise UserError(f"{shortage(need, budget)}: {describe_remedies(options, needs, budget)}")
    text = f"memory: about {gib(need.device)} GiB on {device.type}"
    say(text + (f", {gib(need.host)} GiB in the host" if options.blocks_to_swap else ""))


def show_memory(options: FinetuneOptions, *, say: Callable[[str], None]) -> None:
    """Say what a run would take, for `--plan_memory`, without loading any model."""
    device = choose_device(options.device)
    check_model_files(
        options.pretrained_model_name_or_path,
        options.qwen3,
        options.vae,
        options.llm_adapter_path,
    )
    for line in memory_plan(options, build_plan(options), device):
        say(line)


def memory_plan(options: FinetuneOptions, plan: DatasetPlan, device: torch.device) -> list[str]:
    """The prediction and what would change it, in lines of text."""
    needs, budget = Needs(largest_batch(plan), device), measure_budget(options, device)
    need = needs(options)
    lines = [f"{gib(size):>7} GiB  {name}" for name, size in need.rows() if size]
    lines.append(f"{gib(need.device):>7} GiB  together, on the device")
    lines.append(f"{gib(need.host):>7} GiB  in the host")
    if not budget.fits(need):
        lines.append(f"{shortage(need, budget)}: {describe_remedies(options, needs, budget)}")
    elif budget.device is not None:
        lines.append(f"it fits: {gib(budget.device)} GiB of device memory can be used")
    lines += [
        f"{gib(other.device):>7} GiB  with {text}, {gib(other.host)} GiB in the host"
        for text, _, other in single_changes(options, needs)
    ]
    return lines


@dataclass(frozen=True)
class Needs:
    """The prediction for any options, with the same data on the same device."""

    batch: Batch
    device: torch.device

    def __call__(self, options: FinetuneOptions) -> Prediction:
        """The predicted peaks."""
        return prediction(options, self.batch, self.device)


def shortage(need: Prediction, budget: Budget) -> str:
    """What is needed and what is there."""
    if budget.same:
        return (
            f"full fine-tuning needs about {gib(budget.size(need))} GiB, "
            f"{gib(budget.host)} GiB are free"
        )
    if budget.device is not None and need.device > budget.device:
        return (
            f"full fine-tuning needs about {gib(need.device)} GiB of device memory, "
            f"{gib(budget.device)} GiB can be used"
        )
    return (
        f"full fine-tuning needs about {gib(need.host)} GiB of host memory, "
        f"{gib(budget.host)} GiB are free"
    )


def gib(size: float) -> str:
    """Bytes as GiB with one digit."""
    return f"{size / GIB:.1f}"


def describe_remedies(options: FinetuneOptions, needs: Needs, budget: Budget) -> str:
    """The single options that make the run fit, else the first combination of them that does."""
    alone = [
        f"{text} ({gib(budget.size(need))} GiB)"
        for text, _, need in single_changes(options, needs)
        if budget.fits(need)
    ]
    if alone:
        return "use " + ", or ".join(alone)
    steps = list(combined_changes(options, needs))
    last = steps[-1][1] if steps else options
    more = swaps(last, needs, range(1, block_count(options) - 1))
    words = []
    for text, _, need in steps:
        words.append(text)
        if budget.fits(need):
            return f"use {' '.join(words)} ({gib(budget.size(need))} GiB)"
    for text, _, need in more:
        if budget.fits(need):
            return f"use {' '.join([*words, text])} ({gib(budget.size(need))} GiB)"
    return (
        f"even {' '.join(words) or 'the options that save memory'} needs "
        f"{gib(budget.size(needs(last)))} GiB; use a smaller resolution or batch size, or train a "
        "LoRA (`anima-fast train`)"
    )


Change = tuple[str, "FinetuneOptions", Prediction]


def single_changes(options: FinetuneOptions, needs: Needs) -> Iterator[Change]:
    """Options that save device memory, each alone, with how they are written."""
    for change in REMEDIES:
        yield from _changes(options, change, needs)
    blocks = block_count(options)
    yield from swaps(options, needs, sorted({blocks // 2, blocks - 2}))


def combined_changes(options: FinetuneOptions, needs: Needs) -> Iterator[Change]:
    """The same on top of each other, but for the last, which excludes another."""
    for change in REMEDIES[:-1]:
        for step in _changes(options, change, needs):
            options = step[1]
            yield step


def swaps(options: FinetuneOptions, needs: Needs, counts: Iterable[int]) -> Iterator[Change]:
    """Block swap of more blocks than now."""
    for count in counts:
        if count > (options.blocks_to_swap or 0):
            yield from _changes(options, {"blocks_to_swap": count}, needs)


def _changes(options: FinetuneOptions, change: dict, needs: Needs) -> Iterator[Change]:
    """The options with a change, if it can be (a package may be missing) and saves memory."""
    try:
        changed = dataclasses.replace(options, **change)
        one_by_one = changed.fused_backward_pass or changed.blocks_to_swap
        if one_by_one and looks_at_all(find_optimizer(changed.optimizer_type)[0]):
            return
        need = needs(changed)
    except UserError:
        return
    if need.device < needs(options).device:
        yield _words(change), changed, need


def _words(change: dict) -> str:
    """A change as it is written on the command line; what it implies is left out."""
    name, value = next(iter(change.items()))
    if value is True:
        return f"--{name}"
    return f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}"


def measure_budget(options: FinetuneOptions, device: torch.device) -> Budget:
    """What may be used: of the card, or of `--vram` without what the program itself takes."""
    free, host = device_free(device), host_free()
    if options.vram is not None:
        return Budget(max(0, int(USABLE_SHARE * options.vram * GIB) - CONTEXT_BYTES), host)
    if free is None:
        return Budget(None, host, same=True)
    return Budget(int(USABLE_SHARE * free), host)
