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


def _table() -> dict[str, Recipe]:
    bnb, lion, adapt = "bitsandbytes.optim", "lion_pytorch", "dadaptation"
    nesterov = {"momentum": 0.9, "nesterov": True}
    table = {
        "AdamW": Recipe("torch.optim", "AdamW"),
        "Lion": Recipe(lion, "Lion"),
        "Prodigy": Recipe("prodigyopt", "Prodigy", adaptive=True),
        "AdaFactor": Recipe("transformers.optimization", "Adafactor", flat=False),
        "SGDNesterov": Recipe("torch.optim", "SGD", defaults=nesterov),
        "SGDNesterov8bit": Recipe(bnb, "SGD8bit", defaults=nesterov),
        "DAdaptation": Recipe(f"{adapt}.experimental", "DAdaptAdamPreprint", adaptive=True),
    }
    for name in ("AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit", "Lion8bit"):
        table[name] = Recipe(bnb, name)
    table["PagedLion8bit"] = Recipe(bnb, "PagedLion8bit")
    for name in ("DAdaptAdam", "DAdaptAdaGrad", "DAdaptAdan", "DAdaptLion", "DAdaptSGD"):
        table[name] = Recipe(adapt, name, adaptive=True)
    for name in ("DAdaptAdamPreprint", "DAdaptAdanIP"):
        table[name] = Recipe(f"{adapt}.experimental", name, adaptive=True)
    for name in ("RAdamScheduleFree", "AdamWScheduleFree", "SGDScheduleFree"):
        table[name] = Recipe("schedulefree", name)
    return table


RECIPES = _table()
BY_LOWER_NAME = {name.lower(): recipe for name, recipe in RECIPES.items()}
# Classes of these modules whose update of one number depends on that number's history alone.
_TORCH_ELEMENTWISE = (
    "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop",
    "SGD",
)  # fmt: skip
ELEMENTWISE = {
    "torch.optim": frozenset(_TORCH_ELEMENTWISE),
    "bitsandbytes.optim": frozenset(
        f"{paged}{name}{bits}"
        for paged in ("", "Paged")
        for name in ("Adam", "AdamW", "Lion", "SGD", "AdEMAMix", "RMSprop", "Adagrad")
        for bits in ("", "8bit", "32bit")
    ),
}
UNUSABLE = {
    "LBFGS": "it evaluates the model several times a step",
    "SparseAdam": "it needs sparse gradients",
}
# Installed by `pip install anima-fast[optimizers]`; the other packages are required ones.
IN_EXTRA = ("lion_pytorch", "prodigyopt", "schedulefree", "dadaptation")


def find_optimizer(kind: str) -> tuple[Recipe, type[torch.optim.Optimizer]]:
    """Recipe and class of an optimizer name; `UserError` as in `build_optimizer`."""
    recipe = BY_LOWER_NAME.get(kind.lower())
    if recipe is None and "." not in kind:
        names = {name.lower(): name for name in torch_optimizer_names()}
        if kind.lower() not in names:
            known = [*RECIPES, *names.values()]
            by_lower = {name.lower(): name for name in known}
            near = difflib.get_close_matches(kind.lower(), by_lower, n=1, cutoff=0.5)
            hint = f"did you mean {by_lower[near[0]]}?" if near else f"known: {', '.join(known)}"
            raise UserError(f"--optimizer_type {kind} is unknown: {hint}")
        recipe = _plain_recipe("torch.optim", names[kind.lower()])
    elif recipe is None:
        recipe = _plain_recipe(*kind.rsplit(".", 1))
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


def _plain_recipe(module: str, name: str) -> Recipe:
    return Recipe(module, name, flat=name in ELEMENTWISE.get(module, ()))


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
