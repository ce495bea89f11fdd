"""Noise levels and loss of OneTrainer as our options."""

from __future__ import annotations

from typing import Any

from anima_fast.migrate.ledger import Ledger
from anima_fast.migrate.onetrainer_tables import DEFAULTS
from anima_fast.migrate.values import is_off


def convert_noise(ledger: Ledger) -> None:
    """The distribution of noise levels, its shift and its limits."""
    key = "timestep_distribution"
    kind = str(ledger.get(key, DEFAULTS[key]))
    shift = ledger.number("timestep_shift", 1.0) or 1.0
    dynamic = bool(ledger.get("dynamic_timestep_shifting"))
    weight, bias = ledger.number("noising_weight"), ledger.number("noising_bias")
    options, why = _distribution(kind, weight, bias, shift, dynamic)
    sampling = options["timestep_sampling"]
    if ledger.has(key) and why:
        ledger.change(key, "timestep_sampling", sampling, why)
    elif ledger.has(key):
        ledger.take(key, "timestep_sampling", sampling)
    else:
        ledger.add("timestep_sampling", sampling, "OneTrainer's default")
    ledger.options |= options
    used = ", ".join(options)
    for name in ("noising_weight", "noising_bias", "timestep_shift", "dynamic_timestep_shifting"):
        if ledger.has(name) and is_off(ledger.get(name)):
            ledger.drop(name, "it is off")
        elif ledger.has(name):
            ledger.take_elsewhere(name, used)
    _limits(ledger, shift)
    for key in ("perturbation_noise_weight", "offset_noise_weight"):
        if ledger.has(key):
            why = "it is off" if is_off(ledger.get(key)) else "it has no counterpart here"
            ledger.drop(key, why)


def _distribution(
    kind: str, weight: float, bias: float, shift: float, dynamic: bool
) -> tuple[dict[str, Any], str]:
    """Our options for a distribution of OneTrainer, and what is different."""
    options: dict[str, Any] = {"timestep_sampling": "uniform"}
    why = ""
    if kind == "LOGIT_NORMAL" and not bias:
        options = {"timestep_sampling": "sigmoid", "sigmoid_scale": weight + 1.0}
        if dynamic or shift != 1:
            options["timestep_sampling"] = "flux_shift" if dynamic else "shift"
        why = "its own rule for the shift by size is a little different" if dynamic else ""
    elif kind == "LOGIT_NORMAL":
        # The table of `sigma` begins at full noise, so the mean changes its sign.
        options = {"timestep_sampling": "sigma", "weighting_scheme": "logit_normal",
                   "logit_mean": -bias, "logit_std": weight + 1.0}  # fmt: skip
        why = "a logit-normal draw with a mean has this name here"
    elif kind == "HEAVY_TAIL":
        options = {"timestep_sampling": "sigma", "weighting_scheme": "mode", "mode_scale": weight}
        why = "the same distribution has this name here"
    elif kind == "COS_MAP":
        options = {"timestep_sampling": "uniform", "weighting_scheme": "cosmap"}
        why = "as a weight of the loss instead of a density: the same on average"
    elif kind in ("SIGMOID", "INVERTED_PARABOLA"):
        options = {"timestep_sampling": "sigmoid"}
        why = f"{kind} does not exist here: choose a distribution by hand"
    if options["timestep_sampling"] == "uniform" and shift != 1 and kind == "UNIFORM":
        options["timestep_sampling"] = "sigma"
        why = "a shifted uniform draw has this name here"
    if shift != 1 and not dynamic and options["timestep_sampling"] in ("shift", "sigma"):
        options["discrete_flow_shift"] = shift
    return options, why


def _limits(ledger: Ledger, shift: float) -> None:
    for key, option, off in (
        ("min_noising_strength", "min_timestep", 0.0),
        ("max_noising_strength", "max_timestep", 1.0),
    ):
        if not ledger.has(key):
            continue
        value = ledger.number(key, off)
        if value == off:
            ledger.drop(key, "the whole range, as here by default")
        elif shift != 1:
            why = "in thousandths; here it limits what comes out of the shift"
            ledger.change(key, option, round(value * 1000), why)
        else:
            ledger.take(key, option, round(value * 1000))


def convert_loss(ledger: Ledger) -> None:
    """The loss: the strongest of OneTrainer's four, which can be mixed there."""
    kinds = {"mse_strength": "l2", "mae_strength": "l1", "huber_strength": "huber",
             "log_cosh_strength": "huber"}  # fmt: skip
    strength = {key: ledger.number(key, 1.0 if key == "mse_strength" else 0.0) for key in kinds}
    best = max(strength, key=lambda key: strength[key])
    mixed = sum(value > 0 for value in strength.values()) > 1
    for key, kind in kinds.items():
        if not ledger.has(key):
            continue
        if key == best and not (mixed or key == "log_cosh_strength"):
            ledger.take(key, "loss_type", kind)
        elif key == best:
            ledger.change(key, "loss_type", kind, "one loss is used here, the strongest of them")
        else:
            ledger.drop(key, "it is off" if not strength[key] else "one loss is used here")
    if best != "mse_strength" and kinds[best] == "huber":
        ledger.options["huber_schedule"] = "constant"
    key = "huber_delta"
    if ledger.has(key) and ledger.options.get("loss_type") == "huber":
        ledger.take(key, "huber_c", ledger.number(key, 1.0))
    elif ledger.has(key):
        ledger.drop(key, "the loss is another one")
    key = "loss_weight_fn"
    if ledger.has(key):
        constant = str(ledger.get(key)) == "CONSTANT"
        ledger.drop(key, "as here by default" if constant else "it has no counterpart here")
    key = "normalize_masked_area_loss"
    if ledger.has(key) and ledger.get(key):
        ledger.take(key, "masked_loss_normalize", True)
    elif ledger.has(key):
        ledger.drop(key, "it is off")
