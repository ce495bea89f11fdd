"""LoRA files on the models that make a picture: attached to the weights, never merged into them.

So a half-precision model does not round them away, and their strength can change between pictures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from anima_fast.adapters import names
from anima_fast.adapters.deltas import Delta
from anima_fast.adapters.formats import read_lora
from anima_fast.adapters.lora import add_lora
from anima_fast.adapters.network import LoRANetwork
from anima_fast.errors import UserError
from anima_fast.models.dit import AnimaDiT


@dataclass(frozen=True)
class LoRAFile:
    """A LoRA file that has been read, and the weight to use it at."""

    path: Path
    weight: float
    deltas: dict[str, Delta]

    @classmethod
    def read(cls, path: str | Path, weight: float = 1.0) -> LoRAFile:
        """Read a file of any dialect; raises `UserError` when it is not a LoRA of this model."""
        return cls(Path(path), weight, read_lora(path)[0])


def check_fit(loras: Iterable[LoRAFile], shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse files that do not fit a DiT of these shapes, before a model is loaded for them."""
    for lora in loras:
        for name, delta in lora.deltas.items():
            shape = shapes.get(f"{name}.weight")
            if _owner(name) == "" and (shape is None or tuple(shape) != delta.shape):
                has = "none" if shape is None else f"one of {list(shape)}"
                raise UserError(
                    f"{lora.path} does not fit this DiT: {name} is for a weight of "
                    f"{list(delta.shape)}, the DiT has {has} (`anima-fast remap` moves a network "
                    "to another depth)"
                )


def attach_lora(
    lora: LoRAFile,
    *,
    dit: AnimaDiT | None = None,
    llm_adapter: nn.Module | None = None,
    text_encoder: nn.Module | None = None,
) -> LoRANetwork | None:
    """Let models compute with the modules of a LoRA file that belong to them.

    Returns the network, or None when the file has none for the models given. Raises `UserError`
    when a model has no such layer, or one of another size.
    """
    owners = {names.TEXT_ENCODER: text_encoder, names.ADAPTER: llm_adapter, "": dit}
    deltas = {n: d for n, d in lora.deltas.items() if owners[_owner(n)] is not None}
    if not deltas:
        return None
    example = next(model for model in owners.values() if model is not None)
    weight = next(example.parameters())
    plain = all(delta.is_plain_lora for delta in deltas.values())
    try:
        network = add_lora(
            dit,
            train_dit=dit is not None,
            llm_adapter=llm_adapter,
            text_encoder=text_encoder,
            modules_from=deltas,
            # LoHa and LoKr multiply factors and DoRA takes norms in the precision of training.
            dtype=weight.dtype if plain else torch.float32,
        )
    except UserError as error:
        raise UserError(f"{lora.path}: {error}") from None
    network.multiplier = lora.weight
    return network.to(weight.device).eval()


def _owner(name: str) -> str:
    return next((p for p in (names.TEXT_ENCODER, names.ADAPTER) if name.startswith(p)), "")
