"""LoRA, LoHa and LoKr files in the three dialects: reading, writing, converting, merging.

| dialect | module | down, up | scale |
|---|---|---|---|
| kohya | `lora_unet_blocks_0_self_attn_q_proj` | `lora_down`, `lora_up` | `.alpha` |
| comfyui | `diffusion_model.blocks.0.self_attn.q_proj` | `lora_A`, `lora_B` | `.alpha` |
| diffusers | `transformer.transformer_blocks.0.attn1.to_q` | `lora_A`, `lora_B` | none |

LoHa, LoKr and DoRA keep their suffixes in every dialect; diffusers does not load them. Names of
LyCORIS' wrapper and of PEFT are read too (names.py), but not written.

A file without `.alpha` means alpha = rank. Folding multiplies alpha / rank into one matrix (the up
matrix of a LoRA) and records the alphas in the metadata, so that unfolding restores the
file: bit for bit when alpha / rank is a power of two (and no number leaves the range of its dtype),
else to the rounding of one multiplication.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from anima_fast.adapters import names
from anima_fast.adapters.hashes import with_hashes
from anima_fast.adapters.parts import Part, adapted_weight, part_of
from anima_fast.errors import UserError
from anima_fast.files import save_safetensors
from anima_fast.models.checkpoint import Checkpoint, detect_kind, wrong_kind

FOLDED = "anima_fast.folded_alphas"
FOLDED_DTYPE = "anima_fast.folded_alphas_dtype"
SUFFIXES = {
    "kohya": {"down": "lora_down.weight", "up": "lora_up.weight"},
    "comfyui": {"down": "lora_A.weight", "up": "lora_B.weight"},
    "diffusers": {"down": "lora_A.weight", "up": "lora_B.weight"},
}
# Some tools keep lora_down/lora_up in dotted names; both spellings mean the same.
OURS = {theirs: ours for own in SUFFIXES.values() for ours, theirs in own.items()}
PEFT_MAGNITUDES = "lora_magnitude_vector"
# Tensors of other networks keep their suffix in every dialect.
OTHER_SUFFIXES = ("hada_", "lokr_", "dora_scale")
# What a module must hold to be complete, one of these.
COMPLETE = (
    {"down", "up"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    *(
        {*first, *second}
        for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ),
)


def read_tensors(
    path: str | os.PathLike, ignored: list[str] | None = None
) -> tuple[dict[str, dict[str, Tensor]], str, dict[str, str]]:
    """A network file as {dotted module name: {suffix: tensor}}, its dialect and its metadata.

    Suffixes are `down`, `up`, `alpha`, or those of other networks unchanged. Raises `UserError` for
    a file that is no LoRA of this model, is incomplete, or has keys of modules that no Anima model
    has; with a list `ignored`, such keys are put there instead.
    """
    checkpoint = Checkpoint.open(path)
    dialect = names.detect_dialect(checkpoint.keys())
    if dialect is None and detect_kind(checkpoint) not in ("lora", "unknown"):
        raise wrong_kind(checkpoint, "an Anima LoRA")
    if dialect is None:
        raise UserError(f"{path} is no Anima LoRA: none of its keys has a known prefix")
    modules: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key in checkpoint.shapes:
        module, suffix = split_key(key)
        name = names.from_dialect(module, dialect) if module else None
        if name is None:
            unknown.append(key)
            continue
        tensor, own = checkpoint.get(key), our_suffix(suffix)
        # PEFT keeps magnitudes as a vector; those of the outputs are [out, 1] elsewhere.
        vector = own == "dora_scale" and suffix != own
        modules.setdefault(name, {})[own] = tensor.reshape(-1, 1) if vector else tensor
    if ignored is not None:
        ignored += unknown
    elif unknown:
        raise UserError(
            f"{path}: {len(unknown)} keys belong to no module of Anima ({', '.join(unknown[:3])}): "
            "it is a LoRA of another model, or damaged"
        )
    for name, tensors in modules.items():
        if not any(parts <= tensors.keys() for parts in COMPLETE):
            raise UserError(f"{path}: {name} is incomplete, it has only {', '.join(tensors)}")
        if "alpha" in tensors and tensors["alpha"].numel() != 1:
            raise UserError(f"{path}: the alpha of {name} is not one number: the file is damaged")
    return modules, dialect, checkpoint.metadata


def our_suffix(suffix: str) -> str:
    """A tensor's suffix as it is called here: `down`, `up`, or unchanged."""
    # PEFT puts the name of the adapter in between.
    suffix = suffix.replace(".default", "")
    return "dora_scale" if suffix.startswith(PEFT_MAGNITUDES) else OURS.get(suffix, suffix)


def split_key(key: str) -> tuple[str, str]:
    """(module, suffix) of a key; ("", key) when the suffix is unknown."""
    for mark in (".lora_", ".alpha", *(f".{suffix}" for suffix in OTHER_SUFFIXES)):
        position = key.rfind(mark)
        if position > 0:
            return key[:position], key[position + 1 :]
    return "", key


def read_lora(
    path: str | os.PathLike, ignored: list[str] | None = None
) -> tuple[dict[str, Part], str, dict[str, str]]:
    """A LoRA, LoHa or LoKr file as {dotted module name: part}, its dialect and its metadata.

    Raises `UserError` as `read_tensors` does, and for matrices that do not fit each other or that
    no linear layer has.
    """
    modules, dialect, metadata = read_tensors(path, ignored)
    parts = {}
    for name, tensors in modules.items():
        try:
            parts[name] = part_of(tensors)
        except ValueError as error:
            raise UserError(
                f"{path}: the matrices of {name} cannot be used: {error}; it is a LoRA of another "
                "kind, or damaged"
            ) from None
    return parts, dialect, metadata


def named_tensors(
    parts: Mapping[str, Part], dialect: str, *, fold_alpha: bool = False
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors of a file in a dialect, and the alphas that were folded, by dotted name."""
    if dialect not in names.DIALECTS:
        raise ValueError(f"dialect {dialect!r}, expected one of {', '.join(names.DIALECTS)}")
    fold = fold_alpha or dialect == "diffusers"
    tensors, folded = {}, {}
    for name, part in parts.items():
        theirs = names.to_dialect(name, dialect)
        if theirs is None:
            raise UserError(f"{name} has no name in the {dialect} dialect: use comfyui or kohya")
        if dialect == "diffusers" and (part.kind != "lora" or part.dora_scale is not None):
            raise UserError(
                f"diffusers loads plain LoRA only, {name} is none: use comfyui or kohya"
            )
        if fold and part.alpha is not None:
            folded[name] = part.alpha.item()
            part = replace(part.times(part.scale), alpha=None)
        for suffix, tensor in part.tensors().items():
            tensors[f"{theirs}.{SUFFIXES[dialect].get(suffix, suffix)}"] = tensor
    return dict(sorted(tensors.items())), folded


def write_lora(
    path: str | os.PathLike,
    parts: Mapping[str, Part],
    dialect: str,
    *,
    metadata: Mapping[str, str] | None = None,
    fold_alpha: bool = False,
) -> None:
    """Write a LoRA file atomically; see the module docstring for dialects and folding.

    Raises `UserError` for values that are not finite, or when the disk refuses.
    """
    tensors, folded = named_tensors(parts, dialect, fold_alpha=fold_alpha)
    bad = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise UserError(f"{path} is not written: {bad[0]} holds numbers that are not finite")
    metadata = {k: v for k, v in (metadata or {}).items() if k != FOLDED}
    metadata.pop(FOLDED_DTYPE, None)
    if folded:
        metadata[FOLDED] = json.dumps(folded)
        dtype = next(part.alpha.dtype for part in parts.values() if part.alpha is not None)
        if dtype != torch.float32:
            metadata[FOLDED_DTYPE] = str(dtype).removeprefix("torch.")
    save_safetensors(tensors, path, with_hashes(tensors, metadata))


def unfold(parts: Mapping[str, Part], metadata: Mapping[str, str]) -> dict[str, Part]:
    """Give a folded file its alphas back, from its metadata; other parts stay as they are.

    Raises `UserError` when that metadata is damaged.
    """
    try:
        alphas = {n: float(a) for n, a in json.loads(metadata.get(FOLDED, "{}")).items()}
        dtype = getattr(torch, metadata.get(FOLDED_DTYPE, "float32"))
        torch.tensor(1.0, dtype=dtype)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the metadata {FOLDED} of the LoRA is damaged ({error})") from None
    restored = {}
    for name, part in parts.items():
        alpha = alphas.get(name)
        if part.alpha is None and alpha:
            scale = alpha / (part.rank or alpha)
            part = replace(part.times(1 / scale), alpha=torch.tensor(alpha, dtype=dtype))
        restored[name] = part
    return restored


@torch.no_grad()
def merge_lora(
    dit: nn.Module,
    path: str | os.PathLike,
    multiplier: float = 1.0,
    *,
    llm_adapter: nn.Module | None = None,
    text_encoder: nn.Module | None = None,
) -> int:
    """W ← W with the file built in at a strength (parts.py), in float32, back to W's dtype.

    Weights are replaced, not written over: those of a mapped file or of a caller's state dict stay
    as they are.

    Returns:
        How many modules were passed over, as they belong to a model that is not given.

    Raises:
        UserError: the file does not fit a model; nothing is changed then.
    """
    parts, _, _ = read_lora(path)
    owners = {names.TEXT_ENCODER: text_encoder and text_encoder.model, names.ADAPTER: llm_adapter}
    absent = tuple(prefix for prefix, owner in owners.items() if owner is None)
    models = {"": dit} | {prefix: owner for prefix, owner in owners.items() if prefix not in absent}
    modules = {p + n: module for p, model in models.items() for n, module in model.named_modules()}
    given = {name: part for name, part in parts.items() if not name.startswith(absent)}
    for name, part in given.items():
        module = modules.get(name)
        if module is None or module.weight.shape != part.shape:
            raise UserError(f"{path}: {name} does not fit this DiT: it is made for another size")
    for name, part in given.items():
        weight = modules[name].weight
        part = part.map(lambda x, device=weight.device: x.to(device))
        weight.data = adapted_weight(weight, part, multiplier).to(weight)
    return len(parts) - len(given)
