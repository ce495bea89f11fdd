"""The adapter of one module as a file holds it: LoRA, LoHa or LoKr, with or without DoRA.

    LoRA    Δ = (alpha / R) · up down
    LoHa    Δ = (alpha / R) · (w1_a w1_b) ∘ (w2_a w2_b)
    LoKr    Δ = (alpha / R) · w1 ⊗ w2        each factor whole or a product of two; scale 1 when
                                             both are whole, since then there is no R
    DoRA    W' = m · (W + Δ) / ‖W + Δ‖       norm over the inputs of each output (m [out, 1]), or
                                             over the outputs of each input (m [1, in])

At a strength s the weight is W + s·Δ, with DoRA W + s·(W' − W). Suffixes, shapes and the meaning of
alpha are those of LyCORIS 4.1 and of ComfyUI's loader.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# No float32 norm of a weight row is this small; it keeps a row of zeros finite.
NORM_FLOOR = 1e-12


class Part:
    """What all kinds share. `alpha` is one number, None means the rank; `dora_scale` is m."""

    kind: str
    alpha: Tensor | None
    dora_scale: Tensor | None

    @property
    def rank(self) -> int | None:
        """R; None where both factors of a LoKr are whole."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight it belongs to."""
        raise NotImplementedError

    def matrices(self) -> dict[str, Tensor]:
        """The trained matrices by suffix (`down` and `up` for LoRA)."""
        raise NotImplementedError

    def product(self) -> Tensor:
        """Δ without alpha / R, [out, in] float32."""
        raise NotImplementedError

    def times(self, factor: float) -> Part:
        """The same part with Δ multiplied by a number, which one of its matrices takes."""
        raise NotImplementedError

    @property
    def network(self) -> str:
        """What users call it: LoRA, LoHa, LoKr or DoRA."""
        names = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}
        return names[self.kind] if self.dora_scale is None else "DoRA"

    @property
    def scale(self) -> float:
        """alpha / R; 1 where either is missing."""
        if self.alpha is None or self.rank is None:
            return 1.0
        return self.alpha.item() / self.rank

    def delta(self) -> Tensor:
        """Δ [out, in] float32, on the device of the matrices."""
        return self.product() * self.scale

    def settled(self) -> Part:
        """The same Δ at scale 1, alpha = R: programs agree on it whether they read alpha or not."""
        if self.scale == 1:
            return self
        return replace(self.times(self.scale), alpha=torch.full_like(self.alpha, self.rank))

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a file holds of it, by suffix."""
        more = {"alpha": self.alpha, "dora_scale": self.dora_scale}
        return self.matrices() | {name: t for name, t in more.items() if t is not None}

    def fields(self) -> dict[str, Tensor]:
        """Matrices and magnitudes by the name of their field."""
        found = {_field(suffix): tensor for suffix, tensor in self.matrices().items()}
        return found if self.dora_scale is None else found | {"dora_scale": self.dora_scale}

    def map(self, function: Callable[[Tensor], Tensor]) -> Part:
        """The part with `function` applied to its matrices and magnitudes; alpha stays."""
        return replace(self, **{name: function(t) for name, t in self.fields().items()})


@dataclass(frozen=True)
class LoRAPart(Part):
    """down [R, in], up [out, R]."""

    down: Tensor
    up: Tensor
    alpha: Tensor | None = None
    dora_scale: Tensor | None = None

    kind = "lora"

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def matrices(self) -> dict[str, Tensor]:
        return {"down": self.down, "up": self.up}

    def product(self) -> Tensor:
        return wide(self.up) @ wide(self.down)

    def times(self, factor: float) -> LoRAPart:
        return replace(self, up=_scaled(self.up, factor))


@dataclass(frozen=True)
class LoHaPart(Part):
    """w1_a, w2_a [out, R] and w1_b, w2_b [R, in]."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: Tensor | None = None
    dora_scale: Tensor | None = None

    kind = "loha"

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.w1_a.shape[0], self.w1_b.shape[1]

    def matrices(self) -> dict[str, Tensor]:
        return {f"hada_{name}": getattr(self, name) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}

    def product(self) -> Tensor:
        first = wide(self.w1_a) @ wide(self.w1_b)
        return first * (wide(self.w2_a) @ wide(self.w2_b))

    def times(self, factor: float) -> LoHaPart:
        return replace(self, w2_a=_scaled(self.w2_a, factor))


@dataclass(frozen=True)
class LoKrPart(Part):
    """w1 [out₁, in₁] and w2 [out₂, in₂], each whole or as w_a [.., R] and w_b [R, ..]."""

    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    alpha: Tensor | None = None
    dora_scale: Tensor | None = None

    kind = "lokr"

    @property
    def rank(self) -> int | None:
        for factor in (self.w2_b, self.w1_b):
            if factor is not None:
                return factor.shape[0]
        return None

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """w1 and w2 as wholes, float32."""
        first = wide(self.w1_a) @ wide(self.w1_b) if self.w1 is None else wide(self.w1)
        second = wide(self.w2_a) @ wide(self.w2_b) if self.w2 is None else wide(self.w2)
        return first, second

    @property
    def shape(self) -> tuple[int, int]:
        rows = [whole if whole is not None else a for whole, a, _ in self._both()]
        columns = [whole if whole is not None else b for whole, _, b in self._both()]
        return rows[0].shape[0] * rows[1].shape[0], columns[0].shape[1] * columns[1].shape[1]

    def _both(self) -> tuple[tuple[Tensor | None, ...], ...]:
        return (self.w1, self.w1_a, self.w1_b), (self.w2, self.w2_a, self.w2_b)

    def matrices(self) -> dict[str, Tensor]:
        names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")
        found = {f"lokr_{name}": getattr(self, name) for name in names}
        return {name: t for name, t in found.items() if t is not None}

    def product(self) -> Tensor:
        return torch.kron(*self.factors)

    def times(self, factor: float) -> LoKrPart:
        name = "w2_b" if self.w2 is None else "w2"
        return replace(self, **{name: _scaled(getattr(self, name), factor)})


def part_of(tensors: Mapping[str, Tensor]) -> Part:
    """A part from the tensors of one module by suffix.

    Raises:
        ValueError: a tensor of a kind that is not known here, or shapes that do not fit each other.
    """
    own = {_field(suffix): tensor for suffix, tensor in tensors.items()}
    kind = next(
        cls for mark, cls in (("hada_", LoHaPart), ("lokr_", LoKrPart), ("", LoRAPart))
        if any(suffix.startswith(mark) for suffix in tensors)
    )  # fmt: skip
    unknown = own.keys() - kind.__dataclass_fields__.keys()
    if unknown:
        raise ValueError(f"a tensor {sorted(unknown)[0]} is not supported in a {kind.kind}")
    part = kind(**own)
    _check(part)
    return part


def _field(suffix: str) -> str:
    return suffix.removeprefix("hada_").removeprefix("lokr_")


def _check(part: Part) -> None:
    matrices = part.matrices()
    shapes = ", ".join(f"{suffix} {list(t.shape)}" for suffix, t in matrices.items())
    if any(t.ndim != 2 or 0 in t.shape for t in matrices.values()):
        raise ValueError(f"{shapes}: expected matrices")
    pairs = {
        "lora": [("up", "down")],
        "loha": [("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")],
        "lokr": [("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b")],
    }[part.kind]
    for left, right in pairs:
        if left in matrices and matrices[left].shape[1] != matrices[right].shape[0]:
            raise ValueError(f"{shapes}: the ranks differ")
    if part.kind == "loha" and part.w1_a.shape[0] != part.w2_a.shape[0]:
        raise ValueError(f"{shapes}: the sizes differ")
    if part.kind == "loha" and part.w1_b.shape[1] != part.w2_b.shape[1]:
        raise ValueError(f"{shapes}: the sizes differ")
    if part.dora_scale is not None and part.dora_scale.numel() not in part.shape:
        raise ValueError(f"dora_scale {list(part.dora_scale.shape)} fits no side of {shapes}")


def adapted_weight(weight: Tensor, part: Part, strength: float = 1.0) -> Tensor:
    """The weight with a part built in.

    Args:
        weight: [out, in], any dtype.
        part: of that shape, on the weight's device.
        strength: s of the module docstring.

    Returns:
        [out, in] float32.
    """
    weight = wide(weight)
    if part.dora_scale is None:
        return weight + strength * part.delta()
    decomposed = weight + part.delta()
    dim = 0 if is_of_inputs(part.dora_scale) else 1
    norm = decomposed.norm(dim=dim, keepdim=True).clamp_min(NORM_FLOOR)
    decomposed = decomposed * (wide(part.dora_scale).view(norm.shape) / norm)
    return weight + strength * (decomposed - weight)


def is_of_inputs(dora_scale: Tensor) -> bool:
    """Whether magnitudes are those of the inputs [1, in]; other shapes belong to the outputs."""
    return dora_scale.ndim == 2 and dora_scale.shape[0] == 1 and dora_scale.shape[1] != 1


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or as it is when it is wider: products of factors are made in this."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else (x.double() * factor).to(x.dtype)
