"""The optimizers by the names of `--optimizer_type`: their classes and how each is used."""

from __future__ import annotations

import difflib
import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from anima_fast.errors import UserError, reason


@dataclass(frozen=True)
class Recipe:
    """Where an optimizer comes from and how it is used."""

    module: str
    name: str
    flat: bool = True
    adaptive: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _recipes(module: str, names: str, *, adaptive: bool = False) -> dict[str, Recipe]:
    """Optimizers that are known by the names of their classes."""
    return {name: Recipe(module, name, adaptive=adaptive) for name in names.split()}


BITSANDBYTES, DADAPTATION = "bitsandbytes.optim", "dadaptation"
NESTEROV = {"momentum": 0.9, "nesterov": True}
RECIPES = {
    "AdamW": Recipe("torch.optim", "AdamW"),
    "Lion": Recipe("lion_pytorch", "Lion"),
    "Prodigy": Recipe("prodigyopt", "Prodigy", adaptive=True),
    "AdaFactor": Recipe("transformers.optimization", "Adafactor", flat=False),
    "SGDNesterov": Recipe("torch.optim", "SGD", defaults=NESTEROV),
    "SGDNesterov8bit": Recipe(BITSANDBYTES, "SGD8bit", defaults=NESTEROV),
    "DAdaptation": Recipe(f"{DADAPTATION}.experimental", "DAdaptAdamPreprint", adaptive=True),
    **_recipes(
        BITSANDBYTES, "AdamW8bit PagedAdamW PagedAdamW8bit PagedAdamW32bit Lion8bit PagedLion8bit"
    ),
    **_recipes(
        DADAPTATION, "DAdaptAdam DAdaptAdaGrad DAdaptAdan DAdaptLion DAdaptSGD", adaptive=True
    ),
    **_recipes(f"{DADAPTATION}.experimental", "DAdaptAdamPreprint DAdaptAdanIP", adaptive=True),
    **_recipes("schedulefree", "RAdamScheduleFree AdamWScheduleFree SGDScheduleFree"),
}
BY_LOWER_NAME = {name.lower(): recipe for name, recipe in RECIPES.items()}
# Classes of these modules whose update of one number depends on that number's history alone.
ELEMENTWISE = {
    "torch.optim": {
        "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop",
        "Rprop", "SGD",
    },
    BITSANDBYTES: {
        f"{paged}{name}{bits}"
        for paged in ("", "Paged")
        for name in ("Adam", "AdamW", "Lion", "SGD", "AdEMAMix", "RMSprop", "Adagrad")
        for bits in ("", "8bit", "32bit")
    },
}  # fmt: skip
UNUSABLE = {
    "LBFGS": "it evaluates the model several times a step",
    "SparseAdam": "it needs sparse gradients",
}
# Installed by `pip install anima-fast[optimizers]`; the other packages are required ones.
IN_EXTRA = ("lion_pytorch", "prodigyopt", "schedulefree", DADAPTATION)


def find_optimizer(kind: str) -> tuple[Recipe, type[torch.optim.Optimizer]]:
    """Recipe and class of an optimizer name; `UserError` as in `build_optimizer`."""
    recipe = BY_LOWER_NAME.get(kind.lower())
    if recipe is None:
        module, _, name = kind.rpartition(".")
        names = {name.lower(): name for name in torch_optimizer_names()}
        if not module and kind.lower() not in names:
            known = [*RECIPES, *names.values()]
            by_lower = {name.lower(): name for name in known}
            near = difflib.get_close_matches(kind.lower(), by_lower, n=1, cutoff=0.5)
            hint = f"did you mean {by_lower[near[0]]}?" if near else f"known: {', '.join(known)}"
            raise UserError(f"--optimizer_type {kind} is unknown: {hint}")
        if not module:
            module, name = "torch.optim", names[kind.lower()]
        recipe = Recipe(module, name, flat=name in ELEMENTWISE.get(module, ()))
    if recipe.module == "torch.optim" and recipe.name in UNUSABLE:
        raise UserError(
            f"--optimizer_type {kind} cannot train a LoRA: {UNUSABLE[recipe.name]}; use AdamW"
        )
    cls = import_class(recipe.module, recipe.name, f"--optimizer_type {kind}")
    if not issubclass(cls, torch.optim.Optimizer):
        raise UserError(f"--optimizer_type {kind} is no torch optimizer: give a subclass of one")
    return recipe, cls


def torch_optimizer_names() -> list[str]:
    """Names of the optimizer classes that this torch has."""
    return [
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
        if value is not torch.optim.Optimizer
    ]


def import_class(module: str, name: str, option: str) -> type:
    """Import `module.name`; a missing package or name becomes a `UserError` with the remedy."""
    package = module.split(".")[0]
    # bitsandbytes warns that an optional kernel for 4-bit matrices is absent; no optimizer uses it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        value = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        what = "anima-fast[optimizers]" if package in IN_EXTRA else package
        raise UserError(
            f'{option} needs the package {package}: pip install "{what}" ({reason(error)})'
        ) from error
    if not isinstance(value, type):
        raise UserError(f"{option}: {module} has no class {name}; check the name and its version")
    return value
