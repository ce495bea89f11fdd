"""Optimizers by the names that sd-scripts knows, any class of `torch.optim`, or a dotted path.

Elementwise optimizers get the network's flat buffer, one parameter per learning-rate group, so that
a step is one launch per group however many LoRA modules there are. Optimizers for which a matrix's
shape matters (AdaFactor, CAME, Muon, any unknown class) get the matrices, views of that buffer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from anima_fast.errors import UserError, reason
from anima_fast.training.optimizers.recipes import Recipe, find_optimizer, import_class

if TYPE_CHECKING:
    from anima_fast.options.training import OptimizerOptions

# Makes groups for an optimizer, {"params", "lr", "name"}; the argument allows one tensor a group.
ParamGroups = Callable[[bool], list[dict]]


def build_optimizer(
    options: OptimizerOptions, param_groups: ParamGroups, lr_scheduler: str = "constant"
) -> tuple[Optimizer, list[str]]:
    """The optimizer of a run.

    Args:
        options: its type, arguments, rate and clipping.
        param_groups: of what is trained.
        lr_scheduler: the schedule of the run; some optimizers do not go with every one.

    Returns:
        The optimizer, in training mode, and notices for the user.

    Raises:
        UserError: unknown name (with the nearest), missing package (with the extra), or arguments
            that the class refuses.
    """
    kind = options.optimizer_type or "AdamW"
    recipe, cls = find_optimizer(kind)
    groups = param_groups(recipe.flat)
    device = groups[0]["params"][0].device
    notices = _adaptive_notices(recipe, kind, groups) if recipe.adaptive else []
    arguments = optimizer_arguments(options, recipe)
    if recipe.name == "Adafactor" and recipe.module.startswith("transformers"):
        notices += _prepare_adafactor(options, arguments, groups, lr_scheduler)
    if recipe.module == "bitsandbytes.optim" and device.type != "cuda":
        cls, more = _bitsandbytes_off_cuda(cls, kind, device)
        notices += more
    if cls in (torch.optim.AdamW, torch.optim.Adam) and not {"fused", "foreach"} & set(arguments):
        # The first parameter of each group tells its dtype and device.
        arguments["fused"] = _supports_fused(cls, [group["params"][0] for group in groups])
    try:
        optimizer = cls(groups, **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"--optimizer_type {kind} refused its arguments {arguments}: {reason(error)}; "
            "correct --optimizer_args"
        ) from error
    train_mode(optimizer)
    if is_schedule_free(optimizer) and lr_scheduler not in ("", "constant"):
        notices.append(f"{kind} schedules itself: --lr_scheduler is not used")
    return optimizer, notices


def optimizer_arguments(options: OptimizerOptions, recipe: Recipe) -> dict[str, Any]:
    """The arguments of an optimizer's class: the rate, its recipe's, and the user's."""
    return {"lr": options.learning_rate, **recipe.defaults, **options.optimizer_kwargs}


def _adaptive_notices(recipe: Recipe, kind: str, groups: list[dict]) -> list[str]:
    """Notices for D-Adaptation and Prodigy, which find the rate themselves."""
    rates = {group["lr"] for group in groups}
    if len(rates - {0}) > 1:
        shown = ", ".join(f"{rate:g}" for rate in sorted(rates))
        raise UserError(
            f"--optimizer_type {kind} finds one rate for all parameters, but the groups have "
            f"different ones ({shown}): give one learning rate, and no LoRA+ ratio or reg_lrs"
        )
    if max(rates) > 0.1:
        return []
    return [f"{kind} finds the learning rate itself: about 1 is meant, {max(rates):g} is given"]


def _prepare_adafactor(
    options: OptimizerOptions, arguments: dict, groups: list[dict], lr_scheduler: str
) -> list[str]:
    """Set AdaFactor up for its own relative step (the default) or for a given rate."""
    notices = []
    relative = arguments.setdefault("relative_step", True)
    if arguments.get("warmup_init") and not relative:
        arguments["relative_step"] = relative = True
        notices.append("AdaFactor: warmup_init=True needs relative_step=True, which is set")
    if relative:
        arguments["lr"] = None
        for group in groups:
            group.pop("lr", None)
        notices.append(
            "AdaFactor computes its own rate (relative_step): the learning rates of the groups and "
            "--lr_scheduler are not used; --optimizer_args relative_step=False uses them"
        )
        return notices
    if lr_scheduler != "constant_with_warmup":
        notices.append("AdaFactor with a given rate works best with constant_with_warmup")
    if options.max_grad_norm:
        notices.append("AdaFactor clips its own updates: --max_grad_norm 0 is advised")
    return notices


def _bitsandbytes_off_cuda(
    cls: type[Optimizer], kind: str, device: torch.device
) -> tuple[type[Optimizer], list[str]]:
    """The class without paging, which needs CUDA, after a trial step on this device.

    Not every version of bitsandbytes has CPU kernels, and it fails only at the first step, which
    would be after the caches are filled.
    """
    notices = []
    if cls.__name__.startswith("Paged"):
        notices.append(f"{kind} pages its state on CUDA only: here the state stays in memory")
        name = cls.__name__.removeprefix("Paged")
        cls = import_class("bitsandbytes.optim", name, f"--optimizer_type {kind}")
    probe = torch.nn.Parameter(torch.zeros(4096, device=device))
    probe.grad = torch.ones_like(probe)
    momentum = {"momentum": 0.9} if cls.__name__.startswith("SGD") else {}
    try:
        cls([probe], lr=1e-3, **momentum).step()
    except Exception as error:
        raise UserError(
            f"--optimizer_type {kind}: the installed bitsandbytes cannot step on {device.type} "
            f"({reason(error)}); upgrade it (pip install -U bitsandbytes), use a CUDA card or "
            "--optimizer_type AdamW"
        ) from error
    return cls, notices


def _supports_fused(cls: type[Optimizer], params: list[torch.Tensor]) -> bool:
    """Whether this torch has a fused kernel for these parameters."""
    try:
        cls([param.detach()[:0].requires_grad_() for param in params], fused=True)
    except RuntimeError:
        return False
    return True


def learning_rates(optimizer: Optimizer) -> tuple[dict[str, float], dict[str, float]]:
    """The rate of each parameter group by its name, else its number; and the effective rate d·lr,
    which only D-Adaptation and Prodigy have."""
    groups = {g.get("name", str(index)): g for index, g in enumerate(optimizer.param_groups)}
    rates = {name: float(group["lr"]) for name, group in groups.items()}
    return rates, {n: float(g["d"]) * rates[n] for n, g in groups.items() if "d" in g}


def is_schedule_free(optimizer: Optimizer | type[Optimizer]) -> bool:
    """Whether the optimizer (a class too) keeps an average for everything but training."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def train_mode(optimizer: Optimizer) -> None:
    """Put the training point of a schedule-free optimizer into the parameters."""
    if is_schedule_free(optimizer):
        optimizer.train()


@contextlib.contextmanager
def averaged_weights(optimizer: Optimizer) -> Iterator[None]:
    """Inside the block the parameters hold what is to be saved, sampled or validated.

    Switching a schedule-free optimizer to its average and back rounds, so the training point is
    copied and put back bit for bit: saving more often does not change the result.
    """
    if not is_schedule_free(optimizer):
        yield
        return
    params = [param for group in optimizer.param_groups for param in group["params"]]
    copies = [param.detach().clone() for param in params]
    optimizer.eval()
    try:
        yield
    finally:
        train_mode(optimizer)
        with torch.no_grad():
            for param, copy in zip(params, copies, strict=True):
                param.copy_(copy)


@torch.no_grad()
def clip_flat_grad(flat_grad: torch.Tensor, max_norm: float) -> torch.Tensor:
    """Scale the gradients [P] in place so that their norm is at most `max_norm` (0 = off).

    Returns their norm before, a float32 scalar on the device, without waiting for it.
    """
    norm = torch.linalg.vector_norm(flat_grad, dtype=torch.float32)
    if max_norm:
        flat_grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0).to(flat_grad))
    return norm
