"""LoRA, LoHa and LoKr files in three dialects: reading and writing.

| dialect | module | down, up | scale |
|---|---|---|---|
| kohya | `lora_unet_blocks_0_self_attn_q_proj` | `lora_down`, `lora_up` | `.alpha` |
| comfyui | `diffusion_model.blocks.0.self_attn.q_proj` | `lora_A`, `lora_B` | `.alpha` |
| diffusers | `transformer.transformer_blocks.0.attn1.to_q` | `lora_A`, `lora_B` | none |

LoHa, LoKr and DoRA have the same suffixes in every dialect; diffusers does not load them. Names of
LyCORIS' wrapper and of PEFT are read too (names.py), not written. No `.alpha` means alpha = rank.

Folding multiplies alpha / rank into one matrix (the up matrix of a LoRA) and records the alphas in
the metadata, so that unfolding restores the file: bit for bit when alpha / rank is a power of two,
otherwise up to the rounding of one multiplication.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anima_fast.adapters import names
from anima_fast.adapters.deltas import Delta, delta_of
from anima_fast.adapters.metadata import with_hashes
from anima_fast.errors import UserError
from anima_fast.files import save_safetensors
from anima_fast.models.adapter_kinds import ADAPTER_KINDS, MAGNITUDES, MARKS
from anima_fast.models.checkpoint import Checkpoint, detect_kind, wrong_kind

FOLDED = "anima_fast.folded_alphas"
FOLDED_DTYPE = "anima_fast.folded_alphas_dtype"
# The suffixes of a LoRA's matrices; all other tensors have the same suffix in every dialect.
SUFFIXES = {
    "kohya": {"down": "lora_down.weight", "up": "lora_up.weight"},
    "comfyui": {"down": "lora_A.weight", "up": "lora_B.weight"},
    "diffusers": {"down": "lora_A.weight", "up": "lora_B.weight"},
}
# Some tools keep lora_down/lora_up in dotted names; both spellings mean the same.
OURS = {theirs: ours for own in SUFFIXES.values() for ours, theirs in own.items()}
PEFT_MAGNITUDES = "lora_magnitude_vector"


@dataclass(frozen=True)
class NetworkKeys:
    """The keys of a network file, sorted; no dialect: it has no network of this model.

    `modules`: {dotted module name: {suffix as in the file: key}}; `unknown`: keys of no module.
    """

    dialect: str | None
    modules: dict[str, dict[str, str]]
    unknown: list[str]

    @classmethod
    def sort(cls, keys: Iterable[str]) -> NetworkKeys:
        """Sort the keys of a file."""
        keys = list(keys)
        dialect = names.detect_dialect(keys)
        found = cls(dialect, {}, [])
        for key in keys:
            module, suffix = split_key(key)
            name = names.from_dialect(module, dialect) if module and dialect else None
            if name is None:
                found.unknown.append(key)
            else:
                found.modules.setdefault(name, {})[suffix] = key
        return found


def read_tensors(
    path: str | os.PathLike, ignored: list[str] | None = None
) -> tuple[dict[str, dict[str, Tensor]], str, dict[str, str]]:
    """A network file as {dotted module name: {suffix: tensor}}, its dialect and its metadata.

    Suffixes are `down`, `up`, `alpha`, or those of other networks unchanged. Raises `UserError`
    when the file is no LoRA of this model, is incomplete, or has keys of modules that no Anima
    model has; with a list `ignored`, such keys are added to it instead.
    """
    checkpoint = Checkpoint.open(path)
    keys = NetworkKeys.sort(checkpoint.shapes)
    dialect = keys.dialect
    if dialect is None and detect_kind(checkpoint) not in ("lora", "unknown"):
        raise wrong_kind(checkpoint, "an Anima LoRA")
    if dialect is None:
        raise UserError(f"{path} is not an Anima LoRA: none of its keys has a known prefix")
    if ignored is not None:
        ignored += keys.unknown
    elif keys.unknown:
        raise UserError(
            f"{path}: {len(keys.unknown)} keys belong to no module of Anima "
            f"({', '.join(keys.unknown[:3])}): it is a LoRA of another model, or damaged"
        )
    modules: dict[str, dict[str, Tensor]] = {}
    for name, own in keys.modules.items():
        tensors = modules[name] = {}
        for suffix, key in own.items():
            tensor, ours = checkpoint.get(key), our_suffix(suffix)
            # PEFT stores magnitudes as a vector; elsewhere those of the outputs are [out, 1].
            vector = ours == MAGNITUDES and suffix != ours
            tensors[ours] = tensor.reshape(-1, 1) if vector else tensor
        if not is_complete(tensors):
            raise UserError(f"{path}: {name} is incomplete, it has only {', '.join(tensors)}")
        if "alpha" in tensors and tensors["alpha"].numel() != 1:
            raise UserError(f"{path}: the alpha of {name} is not one number: the file is damaged")
    return modules, dialect, checkpoint.metadata


def is_complete(suffixes: Collection[str]) -> bool:
    """Whether a module with tensors of these suffixes has all matrices of some kind of network."""
    return any(kind.is_complete(suffixes) for kind in ADAPTER_KINDS)


def our_suffix(suffix: str) -> str:
    """A tensor's suffix as this package calls it: `down`, `up`, or unchanged."""
    # PEFT inserts the name of the adapter.
    suffix = suffix.replace(".default", "")
    return MAGNITUDES if suffix.startswith(PEFT_MAGNITUDES) else OURS.get(suffix, suffix)


def split_key(key: str) -> tuple[str, str]:
    """(module, suffix) of a key; ("", key) when the suffix is unknown."""
    for mark in (*MARKS, ".alpha", f".{MAGNITUDES}"):
        position = key.rfind(mark)
        if position > 0:
            return key[:position], key[position + 1 :]
    return "", key


def read_lora(
    path: str | os.PathLike, ignored: list[str] | None = None
) -> tuple[dict[str, Delta], str, dict[str, str]]:
    """A LoRA, LoHa or LoKr file as {dotted module name: Δ}, its dialect and its metadata.

    Raises `UserError` as `read_tensors` does, and for matrices that fit no layer or each other.
    """
    modules, dialect, metadata = read_tensors(path, ignored)
    deltas = {}
    for name, tensors in modules.items():
        try:
            deltas[name] = delta_of(tensors)
        except ValueError as error:
            raise UserError(
                f"{path}: the matrices of {name} cannot be used: {error}; it is a LoRA of another "
                "kind, or damaged"
            ) from None
    return deltas, dialect, metadata


def named_tensors(
    deltas: Mapping[str, Delta], dialect: str, *, fold_alpha: bool = False
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors of a file in a dialect, and the alphas that were folded, by dotted name."""
    if dialect not in names.DIALECTS:
        raise ValueError(f"dialect {dialect!r}, expected one of {', '.join(names.DIALECTS)}")
    fold = fold_alpha or dialect == "diffusers"
    tensors, folded = {}, {}
    for name, delta in deltas.items():
        theirs = names.to_dialect(name, dialect)
        if theirs is None:
            raise UserError(f"{name} has no name in the {dialect} dialect: use comfyui or kohya")
        if dialect == "diffusers" and not delta.is_plain_lora:
            raise UserError(f"diffusers loads plain LoRA only, {name} is not: use comfyui or kohya")
        if fold and delta.alpha is not None:
            folded[name] = delta.alpha.item()
            delta = replace(delta.times(delta.scale), alpha=None)
        for suffix, tensor in delta.tensors().items():
            tensors[f"{theirs}.{SUFFIXES[dialect].get(suffix, suffix)}"] = tensor
    return dict(sorted(tensors.items())), folded


def write_lora(
    path: str | os.PathLike,
    deltas: Mapping[str, Delta],
    dialect: str,
    *,
    metadata: Mapping[str, str] | None = None,
    fold_alpha: bool = False,
) -> None:
    """Write a file atomically; `UserError` for values that are not finite, or a full disk."""
    tensors, folded = named_tensors(deltas, dialect, fold_alpha=fold_alpha)
    bad = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise UserError(f"{path} is not written: {bad[0]} holds numbers that are not finite")
    metadata = {k: v for k, v in (metadata or {}).items() if k not in (FOLDED, FOLDED_DTYPE)}
    if folded:
        metadata[FOLDED] = json.dumps(folded)
        dtype = next(d.alpha.dtype for d in deltas.values() if d.alpha is not None)
        if dtype != torch.float32:
            metadata[FOLDED_DTYPE] = str(dtype).removeprefix("torch.")
    save_safetensors(tensors, path, with_hashes(tensors, metadata))


def unfold(deltas: Mapping[str, Delta], metadata: Mapping[str, str]) -> dict[str, Delta]:
    """Give a folded file its alphas back, from its metadata; `UserError` when that is damaged."""
    try:
        alphas = {n: float(a) for n, a in json.loads(metadata.get(FOLDED, "{}")).items()}
        dtype = getattr(torch, metadata.get(FOLDED_DTYPE, "float32"))
        torch.tensor(1.0, dtype=dtype)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the metadata {FOLDED} of the LoRA is damaged ({error})") from None
    restored = {}
    for name, delta in deltas.items():
        alpha = alphas.get(name)
        if delta.alpha is None and alpha:
            scale = alpha / (delta.rank or alpha)
            delta = replace(delta.times(1 / scale), alpha=torch.tensor(alpha, dtype=dtype))
        restored[name] = delta
    return restored
