"""Optimizer and learning rate of OneTrainer as our options."""

from __future__ import annotations

import math
from typing import Any

from anima_fast.migrate.ledger import Ledger
from anima_fast.migrate.onetrainer_tables import DEFAULTS
from anima_fast.migrate.optimizers import ONETRAINER, Known, argument_words
from anima_fast.migrate.values import is_off

SCHEDULERS = {
    "CONSTANT": "constant", "LINEAR": "linear", "COSINE": "cosine",
    "COSINE_WITH_RESTARTS": "cosine_with_restarts",
    "COSINE_WITH_HARD_RESTARTS": "cosine_with_restarts", "REX": "linear",
    "ADAFACTOR": "adafactor",
}  # fmt: skip


# For an optimizer that does not exist here: betas and eps are made for its own formulas.
_OTHER = Known("AdamW", betas=0)


def convert_rate(ledger: Ledger) -> None:
    """The learning rate and its curve."""
    _rate(ledger)
    kind = str(ledger.get("learning_rate_scheduler", "CONSTANT"))
    steps = ledger.number("learning_rate_warmup_steps", DEFAULTS["learning_rate_warmup_steps"])
    low = ledger.number("learning_rate_min_factor")
    ours, why = SCHEDULERS.get(kind, "constant"), ""
    if ours == "constant" and steps:
        ours, why = "constant_with_warmup", "constant has no warm-up here"
    elif ours == "cosine" and low:
        ours, why = "cosine_with_min_lr", "with learning_rate_min_factor it has this name here"
    elif kind == "COSINE":
        why = "it ends at 0 here, and at half the rate in newer versions of OneTrainer"
    elif kind == "REX":
        why = "REX does not exist here: it falls a little later than a straight line"
    key = "learning_rate_scheduler"
    if kind == "CUSTOM":
        _custom_schedule(ledger)
    elif ledger.has(key) and (why or kind not in SCHEDULERS):
        ledger.change(key, "lr_scheduler", ours, why or "this curve does not exist here")
    elif ledger.has(key):
        ledger.take(key, "lr_scheduler", ours)
    else:
        ledger.add("lr_scheduler", ours, why or "OneTrainer's default")
    _warmup(ledger, steps if kind != "CUSTOM" else 0)
    _shape(ledger, ours, low)


def _rate(ledger: Ledger) -> None:
    scaler = str(ledger.get("learning_rate_scaler", "NONE"))
    batch = ledger.number("batch_size", 1) if scaler.endswith(("BATCH", "BOTH")) else 1
    groups = ledger.number("gradient_accumulation_steps", 1)
    groups = groups if scaler.endswith(("ACCUMULATION", "BOTH")) else 1
    factor = math.sqrt(max(1.0, batch * groups))
    if ledger.has("learning_rate_scaler"):
        what = "it is part of learning_rate here" if factor > 1 else "it is off"
        ledger.drop("learning_rate_scaler", what)
    # The DiT is all that is trained, so its own rate comes last and counts.
    own = "transformer.learning_rate"
    for key in ("learning_rate", own):
        if not ledger.has(key) or ledger.get(key) is None:
            continue
        if key != own and ledger.get(own) is not None:
            ledger.drop(key, f"{own} beats it")
            continue
        value = float(f"{ledger.number(key) * factor:.6g}")
        if factor > 1:
            why = f"times {factor:g}, the root of the images that learning_rate_scaler counts"
            ledger.change(key, "learning_rate", value, why)
        else:
            ledger.take(key, "learning_rate", value)
    ledger.add("learning_rate", DEFAULTS["learning_rate"] * factor, "OneTrainer's default")


def _custom_schedule(ledger: Ledger) -> None:
    ledger.drop("learning_rate_scheduler", "custom_learning_rate_scheduler names the class")
    key = "custom_learning_rate_scheduler"
    if not is_off(ledger.get(key)):
        ledger.take(key, "lr_scheduler_type")
        words = []
        for name in ledger.open_keys("scheduler_params["):
            if name.endswith("].key"):
                value = f"{name[:-4]}.value"
                words.append(f"{ledger.get(name)}={ledger.get(value)}")
                ledger.take_elsewhere(name, "lr_scheduler_args")
                if ledger.has(value):
                    ledger.take_elsewhere(value, "lr_scheduler_args")
        if words:
            ledger.put("lr_scheduler_args", words, "scheduler_params")


def _warmup(ledger: Ledger, steps: float) -> None:
    key = "learning_rate_warmup_steps"
    value = steps if 0 < steps < 1 else int(steps)
    if ledger.has(key) and not value:
        ledger.drop(key, "there is no warm-up")
    elif ledger.has(key):
        ledger.take(key, "lr_warmup_steps", value)
    elif value:
        ledger.add("lr_warmup_steps", value, "OneTrainer's default")


def _shape(ledger: Ledger, ours: str, low: float) -> None:
    """Cycles and the lowest rate, for curves that have them."""
    key = "learning_rate_cycles"
    if ledger.has(key):
        if ours == "cosine_with_restarts":
            cycles = max(1, round(ledger.number(key, 1)))
            ledger.take(key, "lr_scheduler_num_cycles", cycles)
        else:
            ledger.drop(key, "this curve has no cycles")
    key = "learning_rate_min_factor"
    if ledger.has(key):
        if ours == "cosine_with_min_lr":
            ledger.take(key, "lr_scheduler_min_lr_ratio", low)
        else:
            ledger.drop(key, "it is off" if not low else "this curve ends at 0 here")
    for key in ("custom_learning_rate_scheduler", "scheduler_params"):
        if ledger.has(key):
            ledger.drop(key, "it is not set")


def convert_optimizer(ledger: Ledger, command: str) -> None:
    """The optimizer with its arguments; a preset keeps these in optimizer_defaults."""
    kind = str(ledger.get("optimizer.optimizer", ledger.get("optimizer", "ADAMW")))
    known = ONETRAINER.get(kind.upper())
    key = "optimizer.optimizer" if ledger.has("optimizer.optimizer") else "optimizer"
    if known is None:
        known = _nearest(kind)
        if ledger.has(key):
            ledger.change(key, "optimizer_type", known.name, f"{kind} does not exist here")
        ledger.todo.append(f"check learning_rate: {kind} became {known.name}")
    elif ledger.has(key):
        ledger.take(key, "optimizer_type", known.name)
    prefix = "optimizer."
    own = [k for k in ledger.open_keys(prefix) if ledger.get(k) is not None]
    if not [k for k in own if not k.endswith("__version")]:
        prefix = f"optimizer_defaults.{kind}."
    _arguments(ledger, known, prefix, command)
    for rest in ledger.open_keys("optimizer."):
        ledger.drop(rest, f"{known.name} has no such argument, or it is not set")
    key = "clip_grad_norm"
    if ledger.has(key):
        ledger.take(key, "max_grad_norm", ledger.number(key))


def _nearest(kind: str) -> Known:
    """The plain form of an optimizer that has another one there, such as PRODIGY_ADV."""
    longer = [name for name in ONETRAINER if kind.upper().startswith(name)]
    return ONETRAINER[max(longer, key=len)] if longer else _OTHER


def _arguments(ledger: Ledger, known: Known, prefix: str, command: str) -> None:
    arguments: dict[str, Any] = dict(known.defaults)
    taken = []
    betas = [ledger.get(f"{prefix}beta{i}") for i in range(1, known.betas + 1)]
    if betas and all(isinstance(beta, (int, float)) for beta in betas):
        arguments["betas"] = betas
        taken += [f"beta{i}" for i in range(1, known.betas + 1)]
    names = ("weight_decay",) if known is _OTHER else ("eps", "weight_decay", *known.accepts)
    for name in names:
        value = ledger.get(f"{prefix}{name}")
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            continue
        if known.name == "AdaFactor" and name == "eps":
            value = (value, ledger.get(f"{prefix}eps2") or 1e-3)
            taken.append("eps2")
        arguments[name] = value
        taken.append(name)
    if command == "finetune":
        taken += _full(ledger, prefix)
    for name in taken:
        if ledger.has(f"{prefix}{name}"):
            ledger.take_elsewhere(f"{prefix}{name}", f"optimizer_args {name}")
    if arguments:
        why = "its arguments there, its own defaults included"
        ledger.put("optimizer_args", argument_words(arguments), why)


def _full(ledger: Ledger, prefix: str) -> list[str]:
    """What OneTrainer has among the optimizer's arguments and full fine-tuning has as options."""
    taken = []
    several = ledger.number("gradient_accumulation_steps", 1) > 1
    if ledger.get(f"{prefix}fused_back_pass") and not several:
        ledger.put("fused_backward_pass", True, f"{prefix}fused_back_pass")
        taken.append("fused_back_pass")
    if ledger.options.get("full_bf16"):
        rounded = bool(ledger.get(f"{prefix}stochastic_rounding"))
        value = "stochastic" if rounded else "plain"
        ledger.put("weight_update", value, f"{prefix}stochastic_rounding")
        taken.append("stochastic_rounding")
    return taken
