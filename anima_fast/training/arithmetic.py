"""The arithmetic of a run, from its options, its device and the state that it resumes from.

`settle` decides it once, before anything is encoded: from then on the options of the run say no
`auto`, and `training.arithmetic` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch

from anima_fast.errors import UserError
from anima_fast.measure.arithmetic import Arithmetic, Machine, ShortSums, machine, resolve
from anima_fast.measure.sums import card_facts, known_sums, measured_sums
from anima_fast.measure.verdict import unless_refused
from anima_fast.models.adapter_kinds import ADAPTER_KINDS, LORA, title_of
from anima_fast.options.run import TrainOptions
from anima_fast.training.kind import AnyOptions, Say

OptionsT = TypeVar("OptionsT", bound=AnyOptions)
# States that do not say theirs are of a time when this was the default.
FORMER = {"precision": "bf16", "chain": 0, "encoders": "bf16"}


def settle(
    options: OptionsT, device: torch.device, *, say: Say, saved: Mapping[str, Any] | None = None
) -> tuple[OptionsT, Arithmetic]:
    """The options with what `auto` means here, and the arithmetic.

    Args:
        options, device: of the run. A card that was never measured is, in some 20 ms.
        say: gets what was decided, where the program decides.
        saved: `record_of` the arithmetic of the state that the run resumes from.

    Raises:
        UserError: short sums by hand where they cannot be.
    """
    where = machine_of(options, device, lambda: measured_sums(card_facts(device), device, say))
    asked, sums = options.mixed_precision, sums_of(options)
    if asked == "auto" and saved is not None:
        found = _kept(saved, sums, where, say)
    else:
        found = resolve(asked, sums, where)
        lora = isinstance(options, TrainOptions)
        if lora and (found.chosen or (found.precision == "fp16" and sums == "auto")):
            say(f"precision: {found.text} ({found.reason})")
        if hint := _hint(options, device, where):
            say(hint)
    return with_arithmetic(options, found), found


def predicted(options: OptionsT, device: torch.device) -> OptionsT:
    """The options with what `auto` most probably means, without measuring anything."""
    asked = options.mixed_precision
    try:
        where = machine_of(options, device, lambda: known_sums(card_facts(device)))
        found = resolve(asked, sums_of(options), where)
    except UserError:
        # What cannot run here may be meant for another machine.
        word = "bf16" if asked == "auto" else asked
        found = Arithmetic(word, 0, "as asked for", word)
    return with_arithmetic(options, found)


def with_arithmetic(options: OptionsT, found: Arithmetic) -> OptionsT:
    """The options of a run that computes so."""
    changes = {"mixed_precision": found.precision}
    if isinstance(options, TrainOptions):
        changes["sums"] = found.sums
    return replace(options, **changes)  # type: ignore[arg-type]


def sums_of(options: AnyOptions) -> str:
    """`--sums`; full fine-tuning has none."""
    return options.sums if isinstance(options, TrainOptions) else "auto"


def machine_of(
    options: AnyOptions, device: torch.device, short: Callable[[], ShortSums]
) -> Machine:
    """What the device can do for a run."""
    found = machine(device, options.kernels, compiled=options.compile, short=short)
    network = options.network_kwargs if isinstance(options, TrainOptions) else {}
    word, dora = network.get("kind", LORA.word), "dora" in network
    kind = next(kind for kind in ADAPTER_KINDS if kind.word == word)
    if not found.obstacle and (kind is not LORA or dora):
        # Blocks with such adapters fall back on the plain ones (models/fuse.py).
        obstacle = f"blocks with {title_of(kind, dora=dora)} adapters run in plain PyTorch"
        found = replace(found, obstacle=obstacle)
    return found


def _hint(options: AnyOptions, device: torch.device, where: Machine) -> str | None:
    """What bf16 by hand gives away, on a card whose name or measurement says so."""
    by_hand = options.mixed_precision == "bf16" and isinstance(options, TrainOptions)
    if not by_hand or options.full_bf16 or sums_of(options) != "auto" or where.obstacle:
        return None
    if device.type != "cuda":
        return None
    card = card_facts(device)
    short = known_sums(card)
    chosen = Arithmetic("fp16", short.chain, "", "bf16", chosen=True)
    chosen = unless_refused(chosen, card, options.pretrained_model_name_or_path or "")
    if not (short.faster and short.chain and chosen.precision == "fp16"):
        return None
    times = "faster" if short.ratio is None else f"{short.ratio:.1f} times as fast in products"
    return (
        f"on this card fp16 with short sums is {times} and closer to float32: "
        "--mixed_precision fp16"
    )


def _kept(saved: Mapping[str, Any], sums: str, where: Machine, say: Say) -> Arithmetic:
    """The arithmetic of a state, as far as the device has it."""
    precision, encoders = saved["precision"], saved["encoders"]
    if "bf16" in (precision, encoders) and not where.has_bf16:
        found = resolve("auto", sums, where)
        say(f"the state was made with bf16, which this card has not: {found.text} from here on")
        return found
    if sums == "auto":
        sums = "short" if saved["chain"] else "full"
    try:
        found = resolve(precision, sums, where)
    except UserError as error:
        say(f"the state's precision stays, with float32 sums: {error}")
        found = resolve(precision, "full", where)
    # Not `chosen`: what the state was made in was judged then.
    return replace(found, reason="as in the state", encoders=encoders)


def record_of(found: Arithmetic) -> dict[str, Any]:
    """What a resume state says of it."""
    return {name: getattr(found, name) for name in FORMER}


def changed_arithmetic(saved: Mapping[str, Any] | None, found: Arithmetic) -> str | None:
    """A line where a run goes on in another arithmetic than its state (if known) was made in."""
    if saved is None:
        return None
    was = replace(found, precision=saved["precision"], chain=saved["chain"])
    if was.text == found.text:
        return None
    return f"the precision changes from {was.text} to {found.text}; the run goes on"
