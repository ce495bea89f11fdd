"""Which noise levels and which loss a run uses: the names and numbers behind `flow.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from anima_fast.errors import UserError

if TYPE_CHECKING:
    from anima_fast.options import TrainOptions

TIMESTEP_SAMPLINGS = ("sigma", "uniform", "sigmoid", "shift", "flux_shift")
WEIGHTING_SCHEMES = ("uniform", "none", "sigma_sqrt", "cosmap", "logit_normal", "mode")
LOSS_TYPES = ("l2", "l1", "huber", "smooth_l1")
HUBER_SCHEDULES = ("constant", "exponential", "snr")


@dataclass(frozen=True)
class FlowSettings:
    """Everything that shapes the noise levels and the loss; checked when it is made.

    `min_timestep` and `max_timestep` are in thousandths: σ is mapped affinely into
    [min/1000, max/1000]. Raises `UserError` for an unknown name or an impossible number.
    """

    timestep_sampling: str = "sigmoid"
    sigmoid_scale: float = 1.0
    discrete_flow_shift: float = 1.0
    weighting_scheme: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    loss_type: str = "l2"
    huber_schedule: str = "constant"
    huber_c: float = 0.1
    huber_scale: float = 1.0
    min_timestep: float | None = None
    max_timestep: float | None = None
    ip_noise_gamma: float | None = None
    ip_noise_gamma_random_strength: bool = False
    masked_loss_normalize: bool = False

    def __post_init__(self) -> None:
        _one_of("timestep_sampling", self.timestep_sampling, TIMESTEP_SAMPLINGS)
        _one_of("weighting_scheme", self.weighting_scheme, WEIGHTING_SCHEMES)
        _one_of("loss_type", self.loss_type, LOSS_TYPES)
        _one_of("huber_schedule", self.huber_schedule, HUBER_SCHEDULES)
        for name in ("discrete_flow_shift", "huber_c", "huber_scale"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name} is {getattr(self, name)}, expected a number above 0")
        low, high = self.sigma_range
        if not 0 <= low < high <= 1:
            raise UserError(
                f"--min_timestep {self.min_timestep} and --max_timestep {self.max_timestep}: "
                "expected 0 <= min < max <= 1000"
            )

    @classmethod
    def from_options(cls, options: TrainOptions) -> FlowSettings:
        """Take the fields of the same names from the options; absent ones keep defaults."""
        names = (name for name in cls.__dataclass_fields__ if hasattr(options, name))
        return cls(**{name: getattr(options, name) for name in names})

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Lowest and highest σ."""
        low = 0.0 if self.min_timestep is None else self.min_timestep / 1000
        high = 1.0 if self.max_timestep is None else self.max_timestep / 1000
        return low, high


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"--{name} is {value!r}, expected one of {', '.join(known)}")
