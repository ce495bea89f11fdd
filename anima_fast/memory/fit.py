"""Does a run fit into memory, and if not, what would make it fit?

Before anything is encoded the predicted peak is compared with what is free. A run that cannot fit
is told so with both numbers and with the options that would help, each with its own number, in the
order of what they cost: first those that cost time only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from anima_fast.errors import UserError
from anima_fast.memory.free import device_free, host_free
from anima_fast.memory.plan import CONTEXT_BYTES, GIB, USABLE_SHARE, Needs, OptionsT, Prediction

# How changed options are written, the options, and what they take.
Change = tuple[str, OptionsT, Prediction]


@dataclass(frozen=True)
class Budget:
    """Bytes that may be used; None where it is not known. On a CPU both are the host's."""

    device: int | None
    host: int | None
    same: bool = False

    def size(self, need: Prediction) -> int:
        """What counts of a prediction: the device, on a CPU everything."""
        return need.device + need.host if self.same else need.device

    def short(self, need: Prediction) -> list[tuple[int, int, str]]:
        """Bytes needed, bytes there, and how to say so, of each memory that is too small."""
        rows = [(self.size(need), self.host, "GiB, {} GiB are free")]
        if not self.same:
            rows = [
                (need.device, self.device, "GiB of device memory, {} GiB can be used"),
                (need.host, self.host, "GiB of host memory, {} GiB are free"),
            ]
        return [(n, free, text) for n, free, text in rows if free is not None and n > free]

    def fits(self, need: Prediction) -> bool:
        """Whether a prediction stays within both."""
        return not self.short(need)


def measure_budget(vram: float | None, device: torch.device) -> Budget:
    """What may be used: of the card, or of `--vram` GiB without what the program itself takes."""
    free, host = device_free(device), host_free()
    if vram is not None:
        return Budget(max(0, int(USABLE_SHARE * vram * GIB) - CONTEXT_BYTES), host)
    if free is None:
        return Budget(None, host, same=True)
    return Budget(int(USABLE_SHARE * free), host)


def gib(size: float) -> str:
    """Bytes as GiB with one digit."""
    return f"{size / GIB:.1f}"


def does_not_fit(options: OptionsT, needs: Needs[OptionsT], device: torch.device) -> str | None:
    """What is short and what would help, in one line; None when the run fits."""
    budget = measure_budget(options.vram, device)
    short = budget.short(needs(options))
    if not short:
        return None
    needed, free, text = short[0]
    remedies = describe_remedies(options, needs, budget)
    return f"{needs.subject} needs about {gib(needed)} {text.format(gib(free))}: {remedies}"


def describe_need(options: OptionsT, needs: Needs[OptionsT], device: torch.device) -> str:
    """What a run that fits will take, in one line."""
    need = needs(options)
    text = f"memory: about {gib(need.device)} GiB on {device.type}"
    return text + (f", {gib(need.host)} GiB in the host" if options.blocks_to_swap else "")


def memory_plan(options: OptionsT, needs: Needs[OptionsT], device: torch.device) -> list[str]:
    """The prediction and what would change it, in lines of text."""
    budget, need = measure_budget(options.vram, device), needs(options)
    lines = [f"{gib(size):>7} GiB  {name}" for name, size in need.rows() if size]
    lines.append(f"{gib(need.device):>7} GiB  together, on the device")
    lines.append(f"{gib(need.host):>7} GiB  in the host")
    if len(stages := need.stages()) > 1:
        lines.append("peaks: " + ", ".join(f"{name} {gib(n)} GiB" for name, n in stages.items()))
    if (problem := does_not_fit(options, needs, device)) is not None:
        lines.append(problem)
    elif budget.device is not None:
        lines.append(f"it fits: {gib(budget.device)} GiB of device memory can be used")
    lines += [
        f"{gib(other.device):>7} GiB  with {text}, {gib(other.host)} GiB in the host"
        for text, _, other in single_changes(options, needs)
    ]
    return lines + [f"assumed: {text}" for text in need.assumed]


def describe_remedies(options: OptionsT, needs: Needs[OptionsT], budget: Budget) -> str:
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
    words: list[str] = []
    for text, _, need in steps:
        words.append(text)
        if budget.fits(need):
            return f"use {' '.join(words)} ({gib(budget.size(need))} GiB)"
    for text, _, need in swaps(last, needs, range(1, needs.blocks - 1)):
        if budget.fits(need):
            return f"use {' '.join([*words, text])} ({gib(budget.size(need))} GiB)"
    return (
        f"even {' '.join(words) or 'the options that save memory'} needs "
        f"{gib(budget.size(needs(last)))} GiB; {needs.last_resort}"
    )


def single_changes(options: OptionsT, needs: Needs[OptionsT]) -> Iterator[Change[OptionsT]]:
    """Options that save device memory, each alone, with how they are written."""
    for change in needs.remedies:
        yield from _changes(options, change, needs)
    yield from swaps(options, needs, sorted({needs.blocks // 2, needs.blocks - 2}))


def combined_changes(options: OptionsT, needs: Needs[OptionsT]) -> Iterator[Change[OptionsT]]:
    """The same on top of each other, as far as they go together."""
    for change in needs.together:
        for step in _changes(options, change, needs):
            options = step[1]
            yield step


def swaps(
    options: OptionsT, needs: Needs[OptionsT], counts: Iterable[int]
) -> Iterator[Change[OptionsT]]:
    """Block swap of more blocks than now."""
    for count in counts:
        if count > (options.blocks_to_swap or 0):
            yield from _changes(options, {"blocks_to_swap": count}, needs)


def _changes(options: OptionsT, change: dict, needs: Needs[OptionsT]) -> Iterator[Change[OptionsT]]:
    """The options with a change, if it can be (a package may be missing) and saves memory."""
    try:
        changed = dataclasses.replace(options, **change)
        if not needs.allows(options, changed):
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
