"""Everything that shapes the noise levels and the loss.

`options/training.py` makes its options from these fields: each has its help sentence and limits in
the metadata. This module stays free of torch, so that --help does not load it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from anima_fast.errors import UserError
from anima_fast.kernels.losses import LOSS_TYPES

TIMESTEP_SAMPLINGS = ("sigma", "uniform", "sigmoid", "shift", "flux_shift")
WEIGHTING_SCHEMES = ("uniform", "none", "sigma_sqrt", "cosmap", "logit_normal", "mode")
HUBER_SCHEDULES = ("snr", "constant", "exponential")


def _field(
    default: Any, help: str, *, group: str = "Timesteps, noise and loss", **limits: Any
) -> Any:
    metadata = {"group": group, "help": help, **limits}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class FlowSettings:
    """Noise levels and loss, checked when made.

    `min_timestep` and `max_timestep` are in thousandths: σ is mapped affinely into
    [min/1000, max/1000]. Raises `UserError` for an unknown name or an impossible number.
    """

    timestep_sampling: str = _field("sigmoid", "Distribution of sigma.", choices=TIMESTEP_SAMPLINGS)
    sigmoid_scale: float = _field(1.0, "Factor on the normal draw of sigmoid, shift, flux_shift.")
    discrete_flow_shift: float = _field(
        1.0, "Shift of timestep_sampling shift and sigma.", low=1e-6
    )
    weighting_scheme: str = _field(
        "uniform",
        "Loss weight by sigma (logit_normal and mode change how sigma is drawn).",
        choices=WEIGHTING_SCHEMES,
    )
    logit_mean: float = _field(0.0, "Mean of logit_normal.")
    logit_std: float = _field(1.0, "Standard deviation of logit_normal.", low=0)
    mode_scale: float = _field(1.29, "Scale of mode.")
    min_timestep: int | None = _field(None, "Smallest sigma, in thousandths.", low=0, high=1000)
    max_timestep: int | None = _field(None, "Largest sigma, in thousandths.", low=0, high=1000)
    loss_type: str = _field("l2", "Loss.", choices=LOSS_TYPES)
    huber_schedule: str = _field(
        "snr",
        "How the Huber threshold depends on sigma (snr acts as constant).",
        choices=HUBER_SCHEDULES,
    )
    huber_c: float = _field(0.1, "Huber threshold.", low=1e-9)
    huber_scale: float = _field(1.0, "Factor on the Huber threshold.", low=1e-9)
    ip_noise_gamma: float | None = _field(
        None, "Strength of extra noise in the input that the target does not have.", low=0
    )
    ip_noise_gamma_random_strength: bool = _field(
        False, "Draw that strength between 0 and ip_noise_gamma each time."
    )
    masked_loss_normalize: bool = _field(
        False,
        "Divide the masked loss by the mask's area, so that small masks count in full.",
        group="Masked loss",
    )

    def __post_init__(self) -> None:
        low, high = self.sigma_range
        if not 0 <= low < high <= 1:
            raise UserError(
                f"--min_timestep {self.min_timestep} and --max_timestep {self.max_timestep}: "
                "expected 0 <= min < max <= 1000"
            )
        for field in dataclasses.fields(FlowSettings):
            value, limits = getattr(self, field.name), field.metadata
            if value not in limits.get("choices", (value,)):
                expected = ", ".join(limits["choices"])
                raise UserError(f"--{field.name} is {value!r}, expected one of {expected}")
            if value is not None and not value >= limits.get("low", value):
                raise UserError(f"--{field.name} is {value}, expected at least {limits['low']:g}")

    @classmethod
    def from_options(cls, options: Any) -> FlowSettings:
        """Take the fields of the same names from the options; absent ones keep defaults."""
        names = [field.name for field in dataclasses.fields(FlowSettings)]
        return FlowSettings(**{n: getattr(options, n) for n in names if hasattr(options, n)})

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Lowest and highest σ."""
        low = 0.0 if self.min_timestep is None else self.min_timestep / 1000
        high = 1.0 if self.max_timestep is None else self.max_timestep / 1000
        return low, high
