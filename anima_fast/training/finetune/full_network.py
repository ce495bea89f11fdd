"""The network of full fine-tuning: the model's own weights; a part with rate 0 stays frozen."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from anima_fast.errors import UserError
from anima_fast.files import LazyTensor, save_safetensors
from anima_fast.models.checkpoint import Checkpoint
from anima_fast.models.dit import AnimaDiT, dit_tensors
from anima_fast.models.llm_adapter import LLMAdapter, adapter_tensors
from anima_fast.options.finetune import PARTS, part_of
from anima_fast.training.optimizers.weights import Weight

if TYPE_CHECKING:
    from anima_fast.training.optimizers.weight_updates import WeightUpdates

PREFIX = "net."
ADAPTER = "llm_adapter."


class FullNetwork:
    """The trained weights of a DiT and its LLM adapter; made by `train_everything`.

    Attributes:
        weights: in the order of the groups.
        rates: the learning rate of each part by name.
        multiplier: for LoRA networks; ignored here.
        frozen: tensors that are saved but not trained, lazily read, by published name.
        dtype: of saved files, unless another is asked for.
    """

    # Holds the gradients.
    updates: WeightUpdates

    def __init__(
        self,
        weights: list[Weight],
        rates: Mapping[str, float],
        frozen: Mapping[str, LazyTensor],
        order: list[str],
        dtype: torch.dtype,
    ) -> None:
        self.weights, self.rates, self.frozen, self.order = weights, dict(rates), frozen, order
        self.dtype = dtype
        self.multiplier = 1.0
        self._by_place = {
            tuple(weight.name.split(".", 2)[1:]): weight
            for weight in weights
            if weight.name.startswith("blocks.")
        }

    def train(self) -> FullNetwork:
        """Do nothing: no layer of the model acts differently in training."""
        return self

    def eval(self) -> FullNetwork:
        """Do nothing, like `train`."""
        return self

    def at_noise(self, sigma: Tensor) -> None:
        """Do nothing: only LoRA networks have rank masks."""

    def param_groups(self, flat: bool = False) -> list[dict]:
        """Groups for an optimizer: {"params", "lr", "name"}; always the tensors themselves."""
        groups: dict[str, dict] = {}
        for weight in self.weights:
            part = weight.part
            group = groups.setdefault(part, {"params": [], "lr": self.rates[part], "name": part})
            group["params"].append(weight.param)
        return list(groups.values())

    def zero_grad_flat(self) -> None:
        """Forget all gradients."""
        self.updates.clear_gradients()

    def swapped_gradients(self, index: int, grads: Mapping[str, Tensor]) -> None:
        """The sink of block swap: gradients of a block by name (memory/swap.py)."""
        for name, grad in grads.items():
            self.updates.gradients.take(self._by_place[str(index), name], grad)

    def state_tensors(self) -> dict[str, Tensor]:
        """The trained weights by published name with `net.`; not copied."""
        wait_for_copies()
        return {PREFIX + weight.name: weight.truth for weight in self.weights}

    def save(
        self,
        path: str | os.PathLike,
        *,
        dtype: torch.dtype | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write the whole model atomically, one tensor at a time, all as `dtype` or `self.dtype`.

        Raises:
            UserError: numbers that are not finite, or a disk that refuses; nothing is written.
        """
        wait_for_copies()
        dtype = dtype or self.dtype
        trained = {weight.name: weight for weight in self.weights}
        tensors = {}
        for name in self.order:
            source = trained[name].truth if name in trained else self.frozen[name]
            read = partial(_finite, path, name, source, dtype)
            tensors[PREFIX + name] = LazyTensor(tuple(source.shape), dtype, read)
        save_safetensors(tensors, path, metadata)

    @torch.no_grad()
    def load(self, path: str | os.PathLike) -> list[str]:
        """Load the trained weights from a file, with or without prefix.

        Returns names in the file that are not trained here. Raises `UserError` when a trained
        weight is missing or has another shape.
        """
        found = published_tensors(Checkpoint.open(path))
        for weight in self.weights:
            if found.shapes.get(weight.name) != tuple(weight.param.shape):
                raise UserError(
                    f"{path} has no {weight.name} of shape {list(weight.param.shape)}: give a file "
                    "of the same model"
                )
        for weight in self.weights:
            weight.set(found.get(weight.name))
        wait_for_copies()
        return sorted(found.shapes.keys() - {weight.name for weight in self.weights})


def wait_for_copies() -> None:
    """Wait until swapped weights have arrived in host memory."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _finite(
    path: str | os.PathLike, name: str, source: Tensor | LazyTensor, dtype: torch.dtype
) -> Tensor:
    tensor = (source.read() if isinstance(source, LazyTensor) else source).to(dtype)
    if not torch.isfinite(tensor).all():
        raise UserError(
            f"{path} is not written: {name} holds numbers that are not finite in "
            f"{str(dtype).removeprefix('torch.')}"
        )
    return tensor


def published_tensors(checkpoint: Checkpoint) -> Checkpoint:
    """DiT and adapter tensors of a file under their published names without `net.`."""
    keys = checkpoint.shapes
    # A resume state may hold too few tensors for the kind of model to be recognised.
    if all(key.startswith(PREFIX) for key in keys):
        return checkpoint.renamed({key.removeprefix(PREFIX): key for key in keys})
    return joined(dit_tensors(checkpoint), adapter_tensors(checkpoint))


def joined(dit: Checkpoint, adapter: Checkpoint | None) -> Checkpoint:
    """The tensors of a DiT and, under `llm_adapter.`, those of an adapter."""
    if adapter is None:
        return dit
    shapes = {ADAPTER + name: shape for name, shape in adapter.shapes.items()}

    def get(name: str) -> Tensor:
        own = name.startswith(ADAPTER)
        return adapter.get(name.removeprefix(ADAPTER)) if own else dit.get(name)

    return Checkpoint(dit.shapes | shapes, get, path=dit.path)


def train_everything(
    dit: AnimaDiT,
    adapter: LLMAdapter | None,
    rates: Mapping[str, float],
    base: Checkpoint,
    *,
    saves_adapter: bool,
    dtype: torch.dtype = torch.float32,
) -> FullNetwork:
    """Make the weights of every part with a learning rate trainable; `UserError` if none has one.

    Args:
        dit: from `load_dit`.
        adapter: from `load_llm_adapter`, if it is trained.
        rates: of each part, including `base`; 0 freezes it.
        base: the published tensors that `dit` was loaded from; frozen ones are saved from it.
        saves_adapter: whether the saved file holds the adapter (the base had it, or it is trained).
        dtype: of saved files, unless another is asked for.
    """
    named: dict[str, nn.Parameter] = dict(dit.named_parameters())
    order = list(named)
    if adapter is not None:
        own = {ADAPTER + name: param for name, param in adapter.named_parameters()}
        named |= own
        order += own
    elif saves_adapter:
        order += [name for name in base.shapes if name.startswith(ADAPTER)]
    weights = []
    for part in (*PARTS, "base"):
        for name, param in named.items():
            if part_of(name) == part and rates[part]:
                param.requires_grad_(True)
                weights.append(Weight(name, param, part))
    if not weights:
        raise UserError("every learning rate is 0: nothing would be trained")
    trained = {weight.name for weight in weights}
    frozen = {
        name: LazyTensor(base.shapes[name], torch.float32, partial(_wide, base, name))
        for name in order
        if name not in trained
    }
    return FullNetwork(weights, rates, frozen, order, dtype)


def _wide(base: Checkpoint, name: str) -> Tensor:
    return base.get(name).to(torch.float32)
