"""Networks built into a checkpoint: `anima-fast merge CHECKPOINT`.

    W ← W + s₁Δ₁ + s₂Δ₂ + …      in float32, rounded once to the dtype of the output

Networks are built in one after the other, so a DoRA normalises the weight with those before it
included, as adapters that are stacked on a layer do. Weights are read, merged and written one at a
time. Names, prefix and other tensors stay, so whatever loads the old file loads the new one.
"""

from __future__ import annotations

import datetime
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from anima_fast import __version__
from anima_fast.adapters import names
from anima_fast.adapters.deltas import Delta, adapted_weight
from anima_fast.adapters.metadata import IMPLEMENTATION
from anima_fast.errors import UserError
from anima_fast.files import LazyTensor, save_safetensors
from anima_fast.kernels.op import wide
from anima_fast.models.dit_config import DitConfig
from anima_fast.progress import ItemProgress
from anima_fast.tools.checkpoints import FLOATS, MODELS, ModelFile, check_floats, model_of_module
from anima_fast.tools.networks import PRECISIONS, NetworkFile, check_output

KEEP = "keep"
MERGED = "anima_fast.merged_networks"
# Hashes of the tensors, which a merge changes.
STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


def merge_into_checkpoint(
    checkpoint: str | os.PathLike,
    networks: Sequence[tuple[str | os.PathLike, float]],
    output: str | os.PathLike,
    *,
    precision: str = "bf16",
    say: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """Write a checkpoint with networks built in; returns what was done, in lines.

    Args:
        checkpoint: a DiT (with or without bundled LLM adapter, or all-in-one), an LLM adapter or a
            text encoder.
        networks: (file, strength) in the order in which they are built in.
        output: file, replaced atomically.
        precision: bf16, fp16 or fp32 for the weights of the model, or keep; other tensors of the
            file keep their dtype.
        say: gets lines of progress.

    Raises `UserError` for files that do not fit, and weights that would not be finite.
    """
    if precision != KEEP and precision not in PRECISIONS:
        raise UserError(f"--precision {precision}: use {', '.join(PRECISIONS)} or {KEEP}")
    check_output(output, [checkpoint, *(path for path, _ in networks)])
    model = ModelFile.open(checkpoint)
    plan: dict[str, list[tuple[float, Delta]]] = {}
    lines: list[str] = []
    notes: list[str] = []
    read = [NetworkFile.read(path, strength) for path, strength in networks]
    for (path, strength), network in zip(networks, read, strict=True):
        keys = _keys(model, network, notes)
        for name, key in keys.items():
            plan.setdefault(key, []).append((strength, network.deltas[name]))
        lines.append(f"{path} at {strength:g}: {len(keys)} modules")
    with ItemProgress("merged", len(plan), "weights", say) as progress:
        tensors = _tensors(model, plan, precision, progress.advance)
        metadata = _metadata(model, read, Path(output).stem)
        save_safetensors(tensors, output, metadata, keep_order=True)
    return [*lines, *notes, f"wrote {output}: {len(plan)} weights changed"]


def _keys(model: ModelFile, network: NetworkFile, notes: list[str]) -> dict[str, str]:
    """{module: key} of the modules that belong to the file's models; notes name the others."""
    shapes, found = model.checkpoint.shapes, {}
    absent: Counter[str] = Counter()
    for name, delta in network.deltas.items():
        owner = model_of_module(name)
        if owner not in model.prefixes:
            absent[owner] += 1
            continue
        key = model.key(name)
        if key is None or tuple(shapes[key]) != delta.shape:
            raise _misfit(model, network, name, key)
        found[name] = key
    if not found:
        wanted = " and ".join(MODELS[owner] for owner in absent)
        raise UserError(
            f"{network.path} is for {wanted}, which {model.checkpoint.name} does not hold: give "
            "the file that does as CHECKPOINT"
        )
    notes += [
        f"note: {network.path.name}: {count} modules of {MODELS[owner]} are not merged, this "
        "checkpoint does not hold it; merge them into its own file"
        for owner, count in absent.items()
    ]
    return found


def _misfit(model: ModelFile, network: NetworkFile, name: str, key: str | None) -> UserError:
    out, into = network.deltas[name].shape
    if key is not None:
        shape = list(model.checkpoint.shapes[key])
        return UserError(
            f"{network.path} does not fit {model.checkpoint.name}: {name} is made for a weight "
            f"[{out}, {into}], the checkpoint has {shape}"
        )
    remedy = "it is made for another model"
    if name.startswith("blocks."):
        blocks = DitConfig.from_shapes(model.named("").shapes).num_blocks
        if int(name.split(".")[1]) >= blocks:
            remedy = f"this DiT has {blocks} blocks, the network more: `anima-fast remap` moves it"
    return UserError(
        f"{network.path} does not fit {model.checkpoint.name}, which has no {name}: {remedy}"
    )


def _tensors(
    model: ModelFile,
    plan: dict[str, list[tuple[float, Delta]]],
    precision: str,
    advance: Callable[[int], None],
) -> dict[str, LazyTensor]:
    """Every tensor of the output under its old name, computed when it is written."""
    checkpoint = model.checkpoint
    for key in plan:
        check_floats(checkpoint, key)
    # In an all-in-one file the text encoder keeps its dtype, like everything but the DiT.
    converted = {"", names.ADAPTER} if "" in model.prefixes else set(model.prefixes)
    tensors = {}
    for key, shape in checkpoint.shapes.items():
        dtype = checkpoint.get(key).dtype
        own = model.model_of_key(key) in converted and dtype in FLOATS
        target = PRECISIONS.get(precision, dtype) if own else dtype

        def read(key: str = key, dtype: torch.dtype = target) -> Tensor:
            found = _converted(model, key, plan.get(key, []), dtype)
            advance(1 if key in plan else 0)
            return found

        tensors[key] = LazyTensor(shape, target, read)
    return tensors


@torch.no_grad()
def _converted(
    model: ModelFile, key: str, deltas: list[tuple[float, Delta]], dtype: torch.dtype
) -> Tensor:
    weight = model.checkpoint.get(key)
    if not deltas and weight.dtype == dtype:
        return weight
    for strength, delta in deltas:
        weight = adapted_weight(wide(weight), delta, strength)
    found = weight.to(dtype)
    if not torch.isfinite(found).all():
        kind = str(dtype).removeprefix("torch.")
        raise UserError(
            f"{key} would hold numbers that are not finite in {kind}: use --precision fp32 or a "
            "smaller weight, and check the network file with `anima-fast inspect`"
        )
    return found


def entries(networks: Sequence[NetworkFile]) -> list[dict]:
    """What a merged file says about the networks in it."""
    return [
        {
            "file": network.path.name,
            "weight": network.strength,
            "network": "/".join(sorted(network.titles)),
            **{k: network.metadata[k] for k in ("sshs_model_hash",) if k in network.metadata},
        }
        for network in networks
    ]


def _metadata(model: ModelFile, networks: Sequence[NetworkFile], name: str) -> dict[str, str]:
    """The checkpoint's own metadata, and what was merged into it."""
    old = {k: v for k, v in model.checkpoint.metadata.items() if k not in STALE}
    listed = [*_earlier(old), *entries(networks)]
    merged = {**old, MERGED: json.dumps(listed, ensure_ascii=False)}
    if "" not in model.prefixes:
        return merged
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "anima-preview",
        "modelspec.implementation": IMPLEMENTATION,
        **merged,
        "modelspec.implementation_version": f"anima_fast/{__version__}",
        "modelspec.title": name,
        "modelspec.date": datetime.datetime.now().replace(microsecond=0).isoformat(),
        "modelspec.merged_from": ", ".join(
            [Path(model.checkpoint.name).stem, *(network.path.stem for network in networks)]
        ),
    }


def _earlier(metadata: dict[str, str]) -> list:
    """The entries of earlier merges; empty where there is no readable list."""
    try:
        found = json.loads(metadata.get(MERGED, "[]"))
    except ValueError:
        return []
    return found if isinstance(found, list) else []
