"""Any optimizer over weights that are not float32 tensors on the device.

The optimizer sees its own parameters, a few at a time. During its step a parameter's data is the
weight in float32 on the device, and its gradient is scaled and in float32; then the result goes
back to where the weight lives.

    float32 weight     the step works on it in place
    float32 master     the step works on the master, the model gets it rounded (fp32)
    bfloat16 weight    a float32 copy is updated and rounded at random (stochastic)
    16-bit weight      the step works on it in place, rounding to nearest (plain)

Optimizer state is float32 in the first three. Weights of swapped blocks, their masters, gradients
and state visit the device for their own step only, so the arithmetic is the same with and without
swap. Random rounding follows from (seed, step, name).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from anima_fast.data.seeding import seeded
from anima_fast.memory.swap import host_copy
from anima_fast.training.optimizers.weights import SMALLEST_MOVED, Gradients, Weight

# Elements whose float32 copies are in memory together.
CHUNK = 2**25
# Of a float32, which bfloat16 does not have.
LOWER_BITS = 16


class WeightUpdates(torch.optim.Optimizer):
    """An optimizer of `weights`, stepped a chunk at a time.

    Args:
        inner: made over the weights' own parameters; its groups, state and rates are also those
            of this object.
        weights: in the order of the groups.
        device: where steps are computed.
        update: plain, stochastic or fp32; see the module docstring.
        seed: of the run.
        together: all weights take one step together, for optimizers that look at all of them.
        fused: each weight is updated as soon as its gradient is there; `step` only counts.
        max_grad_norm: of each gradient, when fused; 0 is off.
        wide_gradients: see `Gradients`.
    """

    # Without Optimizer.__init__: groups and state are those of `inner`.
    def __init__(
        self,
        inner: torch.optim.Optimizer,
        weights: Sequence[Weight],
        device: torch.device,
        *,
        update: str,
        seed: int,
        together: bool = False,
        fused: bool = False,
        max_grad_norm: float = 0.0,
        wide_gradients: bool = False,
    ) -> None:
        self.inner, self.device, self.update, self.seed = inner, device, update, seed
        self.together, self.fused, self.max_grad_norm = together, fused, max_grad_norm
        self.rounds = 0
        self.weights = {weight.param: weight for weight in weights}
        groups = enumerate(inner.param_groups)
        self._group_of = {param: index for index, g in groups for param in g["params"]}
        use = self._use if fused else None
        self.gradients = Gradients(weights, device, wide=wide_gradients, use=use)
        self._factor: Tensor | None = None
        self._loss_scale: Tensor | None = None
        # In a fused backward pass: whether its first gradient was finite; None before it.
        self._sound: bool | None = None

    @property
    def stands_for(self) -> type:
        """The class that resume states name."""
        return getattr(self.inner, "stands_for", type(self.inner))

    def __getattr__(self, name: str) -> Any:
        # A schedule-free optimizer is recognised by `train` and `eval`.
        if name in ("param_groups", "state", "defaults", "train", "eval"):
            return getattr(self.inner, name)
        raise AttributeError(name)

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale the gradients of the next step down to `max_norm` (0 = off).

        Returns their norm before, a float32 scalar on the device, without waiting for it.
        """
        norm = self.gradients.norm()
        factor = self._loss_scale
        if factor is not None:
            norm = norm * factor
        if max_norm and not self.fused:
            clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            factor = clip if factor is None else factor * clip
        self._factor = factor
        return norm

    @torch.no_grad()
    def unscale(self, inverse_scale: Tensor, found_inf: Tensor) -> dict[torch.device, Tensor]:
        """Remember the scale for the next step, where `torch.amp.GradScaler` would scale now."""
        self._loss_scale = inverse_scale.to(self.device)
        found_inf.copy_(~torch.isfinite(self.gradients.norm()))
        return {self.device: found_inf}

    def clear_gradients(self) -> None:
        """Forget the gradients of this step."""
        self.gradients.clear()
        self._factor = self._loss_scale = self._sound = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every weight that has a gradient."""
        assert closure is None
        if not self.fused:
            kept = self.gradients.kept
            if self.together or self._in_place():
                with self._opened([w for w in self.weights.values() if w in kept]):
                    self.inner.step()
            else:
                for group, weights in self._chunks():
                    self._step_some(group, weights)
            self._wait_for_host()
        self.rounds += 1

    def _in_place(self) -> bool:
        """Whether every weight is updated where it is."""
        return all(
            not weight.swapped
            and weight.master is None
            and (self.update == "plain" or weight.param.dtype == torch.float32)
            for weight in self.weights.values()
        )

    def _chunks(self) -> Iterator[tuple[dict, list[Weight]]]:
        """The weights with gradients, of one group and up to `CHUNK` elements at a time."""
        for group in list(self.param_groups):
            some: list[Weight] = []
            size = 0
            weights = [self.weights[param] for param in group["params"]]
            for weight in [w for w in weights if w in self.gradients.kept]:
                if some and size + weight.param.numel() > CHUNK:
                    yield group, some
                    some, size = [], 0
                some.append(weight)
                size += weight.param.numel()
            if some:
                yield group, some

    def _step_some(self, group: dict, weights: list[Weight]) -> None:
        """The optimizer's step, as if it had these weights only."""
        groups = self.inner.param_groups
        with self._opened(weights):
            self.inner.param_groups = [{**group, "params": [w.param for w in weights]}]
            try:
                self.inner.step()
            finally:
                self.inner.param_groups = groups

    def _use(self, weight: Weight, grad: Tensor) -> None:
        """The step of one weight, inside backward."""
        norm = self.gradients.norms[weight]
        if self._sound is None:
            # The one wait for the device in a step: a loss that is not finite shows in the first
            # gradient, and then nothing of this batch is used.
            self._sound = bool(torch.isfinite(norm))
        if not self._sound:
            return
        # A later gradient that is not finite changes only the optimizer's state; the loop sees by
        # the norm that the batch is bad.
        factor = torch.isfinite(norm).to(torch.float32)
        if self.max_grad_norm:
            factor = factor * (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        grad.mul_(factor.nan_to_num()).nan_to_num_(0.0, 0.0, 0.0)
        self.gradients.kept[weight] = grad
        self._step_some(self.param_groups[self._group_of[weight.param]], [weight])

    @contextlib.contextmanager
    def _opened(self, weights: list[Weight]) -> Iterator[None]:
        """Inside the block the parameters hold what the optimizer works on."""
        computed = [weight.param.data for weight in weights]
        try:
            for weight in weights:
                self._open(weight)
            yield
        except BaseException:
            for weight, data in zip(weights, computed, strict=True):
                weight.param.data, weight.param.grad = data, None
            raise
        for weight, data in zip(weights, computed, strict=True):
            self._close(weight, data)

    def _open(self, weight: Weight) -> None:
        truth = weight.truth
        dtype = truth.dtype if self.update == "plain" else torch.float32
        # Two calls each: in one, the CPU would convert before it copies.
        weight.param.data = truth.to(self.device, non_blocking=True).to(dtype)
        grad = self.gradients.kept.pop(weight).to(self.device, non_blocking=True).to(dtype)
        if self._factor is not None and not self.fused:
            grad = grad.mul_(self._factor.to(grad))
        weight.param.grad = grad
        state = self.inner.state.get(weight.param)
        for name in weight.state_home if state else ():
            state[name] = weight.state_home[name].to(self.device, non_blocking=True)

    def _close(self, weight: Weight, computed: Tensor) -> None:
        updated = weight.param.data
        weight.param.data, weight.param.grad = computed, None
        if weight.master is not None:
            weight.set(updated)
        elif computed.dtype == torch.bfloat16 and updated.dtype == torch.float32:
            generator = rounding_generator(self.device, self.seed, self.rounds, weight.name)
            computed.copy_(stochastic_round(updated, generator), non_blocking=True)
        elif updated is not computed:
            computed.copy_(updated.to(computed.dtype), non_blocking=True)
        if weight.swapped:
            self._send_state_home(weight)

    def _send_state_home(self, weight: Weight) -> None:
        """Move the large tensors of a weight's state to host memory."""
        state = self.inner.state[weight.param]
        for name, value in state.items():
            if not _moves(value):
                continue
            home = weight.state_home.get(name)
            if home is None or home.shape != value.shape or home.dtype != value.dtype:
                pinned = self.device.type == "cuda"
                weight.state_home[name] = home = host_copy(value, pinned=pinned)
            elif home is not value:
                home.copy_(value, non_blocking=True)
            state[name] = home

    def _place_small_state(self, weight: Weight) -> None:
        """Move small state to the device; counters only where the optimizer keeps them there."""
        group = self.param_groups[self._group_of[weight.param]]
        counters = group.get("fused") or group.get("capturable")
        state = self.inner.state[weight.param]
        for name, value in state.items():
            if isinstance(value, Tensor) and not _moves(value) and (value.ndim or counters):
                state[name] = value.to(self.device)

    def _wait_for_host(self) -> None:
        """Wait until host memory has been written: the CPU may read it next."""
        if self.device.type == "cuda" and any(w.swapped for w in self.weights.values()):
            torch.cuda.current_stream(self.device).synchronize()

    def state_dict(self) -> dict:
        """That of `inner`, and the count that random rounding depends on."""
        self._wait_for_host()
        return {**self.inner.state_dict(), "rounds": self.rounds}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Restore it bit for bit: state keeps its dtype whatever the weights' dtype is."""
        own = {k: v for k, v in state_dict.items() if k != "rounds"}
        computed = {param: param.data for param in self.weights}
        for param, weight in self.weights.items():
            dtype = weight.truth.dtype if self.update == "plain" else torch.float32
            device = "cpu" if weight.swapped else self.device
            # Optimizers cast state to the parameter's dtype and device, but do not read its values.
            param.data = torch.zeros((), dtype=dtype, device=device).expand(param.shape)
        try:
            self.inner.load_state_dict(own)
        finally:
            for param, data in computed.items():
                param.data = data
        for weight in self.weights.values():
            weight.state_home.clear()
            if weight.swapped and weight.param in self.inner.state:
                self._send_state_home(weight)
                self._place_small_state(weight)
        self.rounds = state_dict["rounds"]


def _moves(value: Any) -> bool:
    """Whether a value of an optimizer's state is kept in host memory between steps."""
    if not isinstance(value, Tensor) or value.numel() < SMALLEST_MOVED:
        return False
    # bitsandbytes' paged optimizers move their state themselves.
    return not getattr(value, "is_paged", False)


def stochastic_round(x: Tensor, generator: torch.Generator) -> Tensor:
    """x (float32) as bfloat16, rounded at random; bfloat16 numbers, infinities and NaN stay.

    A bfloat16 weight w has steps of about |w| / 256. An update below half a step vanishes when it
    is rounded to nearest, every time. Here x = a + r·(b − a) between two neighbours a and b becomes
    b with probability r, so E[round(x)] = x and small updates add up (Gupta et al. 2015,
    arXiv 1502.02551).
    """
    if x.dtype != torch.float32:
        raise ValueError(f"x is {x.dtype}, expected float32")
    # bfloat16 is the upper half of a float32: adding a random number below 2¹⁶ to the bits and
    # cutting the lower half off rounds either sign, as the bits after it are the magnitude's.
    bits = torch.randint(
        0, 1 << LOWER_BITS, x.shape, dtype=torch.int32, device=x.device, generator=generator
    )
    bits += x.view(torch.int32)
    bits &= -(1 << LOWER_BITS)
    rounded = bits.view(torch.float32)
    # A NaN whose bits are all ones would become a number.
    return torch.where(x.isnan(), x, rounded).to(torch.bfloat16)


def rounding_generator(device: torch.device, *key: object) -> torch.Generator:
    """The generator of one rounding, which follows from its key (seed, step, name) alone."""
    return torch.Generator(device).manual_seed(seeded("rounding", *key).getrandbits(63))
