"""Optimizers of diffusion-pipe and OneTrainer by our names, with the arguments that they take."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from anima_fast.migrate.ledger import Ledger


@dataclass(frozen=True)
class Known:
    """Our optimizer for another trainer's.

    Attributes:
        name: the value of `optimizer_type`.
        why: what is different; "" where nothing is.
        defaults: the other trainer's arguments where ours has others.
        accepts: arguments that pass beside the betas and `base`; `*` for all.
        betas: how many betas it has.
    """

    name: str
    why: str = ""
    defaults: dict[str, Any] = field(default_factory=dict)
    accepts: str = ""
    betas: int = 2
    base: str = "eps weight_decay"


_KAHAN = "its Kahan sums are for 16-bit weights, which are float32 or rounded at random here"
_OPTIMI = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.0}
_D = "d0 d_coef growth_rate decouple use_bias_correction safeguard_warmup"
_FACTOR = "clip_threshold decay_rate scale_parameter relative_step warmup_init"
_BITS = "min_8bit_size percentile_clipping block_wise amsgrad"
_NO_STEP = {"relative_step": False, "scale_parameter": False, "warmup_init": False}

# For one that does not exist here: betas and eps are made for its own formulas.
OTHER = Known("AdamW", betas=0, base="weight_decay")

# Type in [optimizer] of diffusion-pipe, in small letters.
DIFFUSION_PIPE = {
    "adamw": Known("AdamW", accepts="amsgrad"),
    "adamw8bit": Known("AdamW8bit", accepts=_BITS),
    "adamw_optimi": Known("AdamW", _KAHAN, _OPTIMI),
    "stableadamw": Known("AdamW", "StableAdamW's clipping of updates does not exist here", _OPTIMI),
    "adamw8bitkahan": Known("AdamW8bit", _KAHAN, accepts=_BITS),
    "offload": Known("AdamW", "optimizer states stay on the card here, as a LoRA's are small"),
    "sgd": Known("SGD", accepts="momentum dampening nesterov", betas=0),
    "prodigy": Known("Prodigy", accepts=_D),
    "lion": Known("Lion"),
    "adafactor": Known("AdaFactor", accepts=_FACTOR, betas=0),
}
# `optimizer` in OneTrainer.
ONETRAINER = {
    "ADAMW": Known("AdamW", accepts="amsgrad"),
    "ADAM": Known("Adam", accepts="amsgrad"),
    "ADAMW_8BIT": Known("AdamW8bit", accepts=_BITS),
    "ADAM_8BIT": Known("bitsandbytes.optim.Adam8bit", accepts=_BITS),
    "ADEMAMIX": Known("bitsandbytes.optim.AdEMAMix", accepts="alpha", betas=3),
    "ADEMAMIX_8BIT": Known("bitsandbytes.optim.AdEMAMix8bit", accepts="alpha", betas=3),
    "SGD": Known("SGD", accepts="momentum dampening nesterov", betas=0),
    "SGD_8BIT": Known("bitsandbytes.optim.SGD8bit", accepts="momentum nesterov", betas=0),
    "ADAGRAD": Known("Adagrad", accepts="lr_decay initial_accumulator_value", betas=0),
    "RMSPROP": Known("RMSprop", accepts="alpha momentum centered", betas=0),
    "LION": Known("Lion", "", {"betas": (0.9, 0.99), "weight_decay": 0.0}),
    "LION_8BIT": Known("Lion8bit", accepts="min_8bit_size percentile_clipping"),
    "PRODIGY": Known("Prodigy", "", {"weight_decay": 0.0, "decouple": True}, f"{_D} slice_p"),
    "DADAPT_ADAM": Known("DAdaptAdam", accepts="d0 growth_rate decouple log_every"),
    "DADAPT_ADAN": Known("DAdaptAdan", accepts="d0 growth_rate no_prox", betas=3),
    "DADAPT_ADA_GRAD": Known("DAdaptAdaGrad", accepts="d0 growth_rate momentum", betas=0),
    "DADAPT_SGD": Known("DAdaptSGD", accepts="d0 growth_rate momentum", betas=0),
    "DADAPT_LION": Known("DAdaptLion", accepts="d0 log_every"),
    "ADAFACTOR": Known("AdaFactor", "", _NO_STEP, _FACTOR, betas=0),
    "SCHEDULE_FREE_ADAMW": Known("AdamWScheduleFree", accepts="r weight_lr_power"),
    "SCHEDULE_FREE_SGD": Known("SGDScheduleFree", accepts="r weight_lr_power momentum", betas=0),
}


def settle_arguments(arguments: dict[str, Any], known: Known, prefix: str, ledger: Ledger) -> None:
    """Set `optimizer_args` to key=value words; a list is written with commas.

    Args:
        arguments: what is known of them already.
        prefix: the beginning of the keys that hold the others.
    """
    names = f"{known.base} {known.accepts}".split()
    if "*" in names:
        names += [key.removeprefix(prefix) for key in ledger.open_keys(prefix)]
    for name in names:
        key, value = f"{prefix}{name}", ledger.get(f"{prefix}{name}")
        if ledger.has(key) and value is not None and value not in (math.inf, -math.inf):
            arguments[name] = value
            ledger.place("optimizer_args", key)
    words = []
    for name, value in arguments.items():
        if isinstance(value, (list, tuple)):
            value = ",".join(f"{v:g}" for v in value)
        words.append(f"{name}={value}")
    if words:
        why = "its arguments there, its own defaults included"
        ledger.put(why, optimizer_args=words)
