"""Learning-rate schedules by the names that sd-scripts knows, or any class by dotted path.

Every named schedule is a pure function of the optimizer step, so resuming is setting the step, and
a run whose length changed follows the new curve from there. T is the run's number of optimizer
steps, W the warm-up; rates are multiples of each group's own rate:

    constant 1 · linear (T−s)/(T−W) · cosine ½(1+cos πp), p = (s−W)/(T−W) · polynomial (1−p)^power
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from anima_fast.errors import UserError, reason
from anima_fast.training.optimizers.build import is_schedule_free
from anima_fast.training.optimizers.recipes import find_optimizer, import_class

if TYPE_CHECKING:
    from anima_fast.options.run import AnyRun
    from anima_fast.options.training import SchedulerOptions

Curve = Callable[[int], float]
POLYNOMIAL_END_RATE = 1e-7


class Schedule(LambdaLR):
    """A named schedule: each group's rate is its own rate times a pure function of the step."""

    saved_name = "anima_fast.Schedule"

    def __init__(
        self, optimizer: torch.optim.Optimizer, name: str, curves: list[Curve], total_steps: int
    ) -> None:
        self.name, self.total_steps = name, total_steps
        super().__init__(optimizer, curves)

    def state_dict(self) -> dict:
        """What a resume state keeps; the curves follow from the options."""
        return {
            "schedule": self.name,
            "total_steps": self.total_steps,
            "last_epoch": self.last_epoch,
            "step_count": self._step_count,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Go to the saved step of this schedule and set the rates that belong there."""
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict["step_count"]
        factors = [curve(self.last_epoch) for curve in self.lr_lambdas]
        self._last_lr = [base * f for base, f in zip(self.base_lrs, factors, strict=True)]
        groups = zip(self.optimizer.param_groups, self._last_lr, self.base_lrs, strict=True)
        for group, rate, base in groups:
            group["lr"], group["initial_lr"] = rate, base


class AdafactorSchedule(LRScheduler):
    """Reports the rate that AdaFactor with `relative_step` computes for itself."""

    saved_name = "anima_fast.AdafactorSchedule"

    def __init__(self, optimizer: torch.optim.Optimizer, initial_rate: float) -> None:
        self.initial_rate = initial_rate
        for group in optimizer.param_groups:
            group["initial_lr"] = initial_rate
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """Rates of the last step; the initial rate before the first one."""
        firsts = [(group, group["params"][0]) for group in self.optimizer.param_groups]
        return [self._rate(group, self.optimizer.state.get(first)) for group, first in firsts]

    def _rate(self, group: dict, state: dict | None) -> float:
        if not state:
            return self.initial_rate
        # AdaFactor's own rule, from the step count and the size of the parameter it has stored.
        slowest = 1e-6 * state["step"] if group["warmup_init"] else 1e-2
        rate = min(slowest, 1 / math.sqrt(state["step"]))
        return float(
            max(group["eps"][1], state["RMS"]) * rate if group["scale_parameter"] else rate
        )


def build_scheduler(
    options: SchedulerOptions,
    optimizer: torch.optim.Optimizer,
    total_steps: int,
    *,
    learning_rate: float,
) -> LRScheduler:
    """The schedule of a run of T = `total_steps` optimizer steps.

    Args:
        options: the `lr_*` options.
        optimizer: a schedule-free one keeps its rate constant, whatever `lr_scheduler` says.
        total_steps: T.
        learning_rate: what AdaFactor's own schedule reports before its first step.

    Raises:
        UserError: unknown name, wrong numbers, an unusable class.
    """
    if options.lr_scheduler_type:
        return _custom_schedule(options.lr_scheduler_type, options, optimizer)
    if any(group.get("relative_step") for group in optimizer.param_groups):
        return AdafactorSchedule(optimizer, learning_rate)
    name = options.lr_scheduler or "constant"
    if name == "adafactor":
        raise UserError(
            "--lr_scheduler adafactor works only with --optimizer_type AdaFactor and its "
            "relative_step: choose another schedule"
        )
    if is_schedule_free(optimizer):
        name, warmup = "constant", 0
    else:
        warmup = step_count(options.lr_warmup_steps, total_steps, "--lr_warmup_steps")
    rates = [group["lr"] for group in optimizer.param_groups]
    curves = [named_curve(name, options, total_steps, warmup, rate) for rate in rates]
    return Schedule(optimizer, name, curves, total_steps)


def step_count(value: int | float | str | None, total_steps: int, option: str) -> int:
    """Steps from a whole number, a fraction below 1 of all steps, or a text such as "5%"."""
    try:
        if isinstance(value, str) and value.strip().endswith("%"):
            number = float(value.strip()[:-1]) / 100
            steps = number * total_steps
        else:
            number = float(value or 0)
            steps = number * total_steps if number < 1 else number
    except ValueError:
        number = steps = math.nan
    if not 0 <= steps < math.inf:
        raise UserError(
            f"{option} is {value!r}: expected steps, a fraction below 1 or a percentage"
        )
    return int(steps)


def about_warmup(options: AnyRun, total_steps: int) -> list[str]:
    """A notice where `lr_warmup_steps` does nothing, or ends after the run's `total_steps`."""
    warmup = step_count(options.lr_warmup_steps, total_steps, "--lr_warmup_steps")
    if not warmup:
        return []
    if options.lr_scheduler_type or options.lr_scheduler == "piecewise_constant":
        kind = options.lr_scheduler_type or options.lr_scheduler
        return [f"lr_warmup_steps has no effect: {kind} has no warm-up of this kind"]
    recipe, cls = find_optimizer(options.optimizer_type)
    relative = recipe.name == "Adafactor" and options.optimizer_kwargs.get("relative_step", True)
    if is_schedule_free(cls):
        own = "warmup_steps" in inspect.signature(cls).parameters
        remedy = ": its own warm-up is --optimizer_args warmup_steps=N" if own else ""
        return [f"lr_warmup_steps has no effect: {recipe.name} schedules itself{remedy}"]
    if relative:
        return ["lr_warmup_steps has no effect: AdaFactor with relative_step finds its own rate"]
    if warmup < total_steps:
        return []
    share = (total_steps - 1) / warmup
    return [
        f"lr_warmup_steps {warmup} is not below the run's {total_steps} steps: the rate reaches "
        f"{share:.0%} of the one that is set; a fraction such as 0.05 follows the length"
    ]


def named_curve(
    name: str, options: SchedulerOptions, total_steps: int, warmup: int, rate: float
) -> Curve:
    """The function of the optimizer step that multiplies a group's `rate`."""
    if name == "piecewise_constant":
        return _piecewise(options)
    cycles, low = options.lr_scheduler_num_cycles, options.lr_scheduler_min_lr_ratio or 0.0
    timescale = options.lr_scheduler_timescale or warmup or 10_000
    span = max(1, total_steps - warmup)
    # From 1 at p = 0 to the end of the run at p = 1.
    shapes: dict[str, Callable[[float], float]] = {
        "linear": lambda p: 1 - p,
        "cosine": _half_cosine,
        "cosine_with_restarts": lambda p: 0.0 if p >= 1 else _half_cosine(cycles * p % 1),
        "polynomial": lambda p: _polynomial(p, options.lr_scheduler_power, rate),
        "cosine_with_min_lr": lambda p: _half_cosine(p, cycles, low),
    }
    after: dict[str, Curve] = {
        "constant": lambda step: 1.0,
        "constant_with_warmup": lambda step: 1.0,
        "inverse_sqrt": lambda step: 1 / math.sqrt((step + timescale - warmup) / timescale),
    }
    first = 0.0
    if name == "warmup_stable_decay":
        after[name] = _stable_decay(options, total_steps, warmup, low)
        first = low

    def curve(step: int) -> float:
        if step < warmup:
            return first + (1 - first) * step / warmup
        if name in after:
            return after[name](step)
        return max(0.0, shapes[name](min(1.0, (step - warmup) / span)))

    return curve


def _half_cosine(p: float, cycles: int = 1, low: float = 0.0) -> float:
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * cycles * p))


def _polynomial(p: float, power: float, rate: float) -> float:
    """From the rate down to 1e-7, as a multiple of the rate."""
    if rate <= POLYNOMIAL_END_RATE:
        return 1.0
    return ((rate - POLYNOMIAL_END_RATE) * (1 - p) ** power + POLYNOMIAL_END_RATE) / rate


def _stable_decay(options: SchedulerOptions, total_steps: int, warmup: int, low: float) -> Curve:
    """The full rate, then a cosine over the last `lr_decay_steps`."""
    decay = step_count(options.lr_decay_steps, total_steps, "--lr_decay_steps")
    if warmup + decay > total_steps:
        raise UserError(
            f"--lr_warmup_steps ({warmup}) and --lr_decay_steps ({decay}) are more than the "
            f"{total_steps} steps of the run: shorten one of them"
        )
    cycles, start = options.lr_scheduler_num_cycles, total_steps - decay

    def after(step: int) -> float:
        if step < start:
            return 1.0
        return _half_cosine((step - start) / decay, cycles, low) if step < total_steps else low

    return after


def _piecewise(options: SchedulerOptions) -> Curve:
    """`step_rules=1:10,0.1:20,0.01`: factor 1 up to step 10, 0.1 up to step 20, then 0.01."""
    rules = str(options.scheduler_kwargs.get("step_rules", ""))
    *pairs, last = rules.split(",")
    try:
        levels = sorted((int(end), float(factor)) for factor, end in (p.split(":") for p in pairs))
        final = float(last)
    except ValueError:
        raise UserError(
            f"--lr_scheduler piecewise_constant: step_rules is {rules!r}; give it as "
            "--lr_scheduler_args step_rules=1:10,0.1:20,0.01"
        ) from None
    return lambda step: next((factor for end, factor in levels if step < end), final)


def _custom_schedule(
    kind: str, options: SchedulerOptions, optimizer: torch.optim.Optimizer
) -> LRScheduler:
    """A scheduler class by dotted path (or a name of `torch.optim.lr_scheduler`)."""
    module, _, name = kind.rpartition(".")
    option = f"--lr_scheduler_type {kind}"
    cls = import_class(module or "torch.optim.lr_scheduler", name, option)
    if not issubclass(cls, LRScheduler) or cls.__name__ == "ReduceLROnPlateau":
        raise UserError(f"{option} is no scheduler that counts steps: choose another class")
    arguments = options.scheduler_kwargs
    try:
        return cls(optimizer, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{option} refused its arguments {arguments}: {reason(error)}; correct "
            "--lr_scheduler_args"
        ) from error


def restore_scheduler(scheduler: LRScheduler, saved: dict) -> list[str]:
    """Bring a scheduler of the present options to the step of a saved one's `state_dict()`.

    Returns notices where the curve is not the one of the saved run.
    """
    ours = isinstance(scheduler, Schedule)
    if ours != ("schedule" in saved):
        raise UserError(
            "the resume state was made with another kind of learning-rate scheduler: give the same "
            "--lr_scheduler_type, --lr_scheduler and --optimizer_type"
        )
    notices: list[str] = []
    if ours and saved["schedule"] != scheduler.name:
        notices.append(f"lr_scheduler changed from {saved['schedule']} to {scheduler.name}")
    if ours and saved["total_steps"] != scheduler.total_steps:
        notices.append(
            f"the run now has {scheduler.total_steps} steps instead of {saved['total_steps']}: the "
            f"rest follows the {scheduler.name} schedule of the new length"
        )
    scheduler.load_state_dict(saved)
    return notices
