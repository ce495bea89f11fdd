"""Model files by module: the key of each layer's weight, under whatever prefix."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch

from anima_fast.adapters import names
from anima_fast.errors import UserError
from anima_fast.models.checkpoint import (
    FOREIGN,
    KIND_NAMES,
    LEFTOVERS,
    Checkpoint,
    detect_kind,
    strip_prefix,
)

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Tensors that quantised files keep next to their weights.
QUANTISED = re.compile(
    r".*\.(scale_weight|weight_scale(_2)?|scale_input|input_scale|comfy_quant|absmax|quant_map"
    r"|nested_absmax|quant_state\..*|SCB|qweight|qzeros|scales)|scaled_fp8"
)
# The models by the prefix of their dotted module names, as messages call them.
MODELS = {"": "the DiT", names.ADAPTER: "the LLM adapter", names.TEXT_ENCODER: "the text encoder"}
# Both are recognised by a name that the DiT does not have.
LAYER_OF_QWEN3 = re.compile(r"(.*?)layers\.\d+\.self_attn\.q_norm\.weight")
LAYER_OF_ADAPTER = re.compile(r"((.*\.)?llm_adapter\.|)blocks\.\d+\.norm_cross_attn\.weight")


@dataclass(frozen=True)
class ModelFile:
    """A DiT, an LLM adapter, a text encoder, or several in one file.

    Attributes:
        checkpoint: its tensors.
        prefixes: what precedes the names of each model in the file, by the model's prefix in dotted
            module names ("" is the DiT).
    """

    checkpoint: Checkpoint
    prefixes: dict[str, str]

    @classmethod
    def open(cls, path: str | os.PathLike) -> ModelFile:
        """Open a model file; raises `UserError` when networks are not made for such a file."""
        checkpoint = Checkpoint.open(path)
        kind = detect_kind(checkpoint)
        if kind not in ("dit", "llm_adapter", "qwen3"):
            raise UserError(
                f"{path} is not a checkpoint of Anima: {KIND_NAMES[kind]}; expected a DiT, LLM "
                "adapter or text encoder file"
            )
        found = cls(checkpoint, _prefixes(checkpoint))
        found._refuse_quantised()
        return found

    def key(self, module: str) -> str | None:
        """The key of a module's weight by its dotted name; None when the file has none."""
        model = model_of_module(module)
        if model not in self.prefixes:
            return None
        key = f"{self.prefixes[model]}{module[len(model) :]}.weight"
        return key if key in self.checkpoint.shapes else None

    def model_of_key(self, key: str) -> str | None:
        """The model that a tensor belongs to; None for leftovers and foreign models."""
        # The adapter's names begin like those of the DiT around it.
        for model in sorted(self.prefixes, key=lambda model: -len(self.prefixes[model])):
            name = key.removeprefix(self.prefixes[model])
            if not key.startswith(self.prefixes[model]) or LEFTOVERS.fullmatch(name):
                continue
            if model or not FOREIGN.fullmatch(name):
                return model
        return None

    def named(self, *models: str) -> Checkpoint:
        """The tensors of those models that the file has, by dotted name (`blocks.0...weight`)."""
        found = {}
        for key in self.checkpoint.shapes:
            model = self.model_of_key(key)
            if model in models:
                found[model + key.removeprefix(self.prefixes[model])] = key
        return self.checkpoint.renamed(found)

    def _refuse_quantised(self) -> None:
        bad = [key for key in self.checkpoint.shapes if QUANTISED.fullmatch(key)]
        if bad:
            raise UserError(
                f"{self.checkpoint.name} is quantised (it has {bad[0]}): give the file in bf16, "
                "fp16 or fp32 that it was made from"
            )


def model_of_module(name: str) -> str:
    """The model of a dotted module name: "", `names.ADAPTER` or `names.TEXT_ENCODER`."""
    return next((p for p in (names.TEXT_ENCODER, names.ADAPTER) if name.startswith(p)), "")


def _prefixes(checkpoint: Checkpoint) -> dict[str, str]:
    keys = checkpoint.shapes
    found = {}
    dit = strip_prefix(keys)
    if dit is not None:
        found[""] = dit
    for model, pattern in ((names.ADAPTER, LAYER_OF_ADAPTER), (names.TEXT_ENCODER, LAYER_OF_QWEN3)):
        match = next((m for key in keys if (m := pattern.fullmatch(key))), None)
        if match:
            found[model] = match[1]
    return found


def check_floats(checkpoint: Checkpoint, key: str) -> None:
    """Refuse a weight of integers or 8-bit numbers, which cannot be computed with."""
    dtype = checkpoint.get(key).dtype
    if dtype not in FLOATS:
        kind = str(dtype).removeprefix("torch.")
        raise UserError(
            f"{checkpoint.name}: {key} is {kind}, expected bf16, fp16 or fp32: give the file that "
            "it was quantised from"
        )
