"""What a LoRA, LoHa, LoKr or DoRA file holds, and which programs load it.

| program | kohya names | comfyui names | diffusers names | other names | LoHa, LoKr, DoRA |
|---|---|---|---|---|---|
| ComfyUI, Forge Neo, SwarmUI | yes | yes | no | no | yes |
| diffusers | no | only without `.alpha` | only without `.alpha` | no | no |
| sd-scripts (`--network_weights`) | yes | no | no | no | kohya names, with their own module |
| anima-fast | yes | yes | yes | yes | yes |

A file without `.alpha` means alpha = rank, so it means the same in every program that reads it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch

from anima_fast.adapters import names
from anima_fast.adapters.deltas import Delta, delta_of
from anima_fast.adapters.formats import FOLDED, NetworkKeys, is_complete, our_suffix
from anima_fast.inspection.description import SEE_NOTE, Description, plural
from anima_fast.models.adapter_kinds import LOKR, LORA, MAGNITUDES, kind_of, module_of, title_of
from anima_fast.models.checkpoint import Checkpoint

MOST_VALUES = 5
# The model of a module by how its name begins.
MODELS = (("text_encoder", names.TEXT_ENCODER), ("llm_adapter", names.ADAPTER), ("dit", ""))


class LoRAHeader:
    """A network file without its data: its keys by module, and what follows from their shapes.

    Attributes:
        suffixes: of all tensors in the file.
        title: LoRA, LoHa, LoKr or DoRA.
        module: the `network_module` that loads it in sd-scripts.
        counts: modules by model; models without any are left out.
        deltas: each module's Δ without data; None where a tensor is missing or does not fit.
        ranks: by module; a LoKr whose factors are both full has none.
        alphas: stored alpha by module: the only tensors that are read.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.keys = NetworkKeys.sort(checkpoint.shapes)
        modules = self.keys.modules
        self.suffixes = {suffix for own in modules.values() for suffix in own}
        kind, dora = kind_of(self.suffixes), MAGNITUDES in map(our_suffix, self.suffixes)
        self.title, self.module = title_of(kind, dora=dora), module_of(kind, dora=dora)
        self.counts = Counter(
            next(model for model, prefix in MODELS if name.startswith(prefix)) for name in modules
        )
        self.deltas = {name: self._delta(own) for name, own in modules.items()}
        self.ranks = {name: d.rank for name, d in self.deltas.items() if d is not None and d.rank}
        keys = {name: own["alpha"] for name, own in modules.items() if "alpha" in own}
        self.alphas = {
            name: checkpoint.get(key).item()
            for name, key in keys.items()
            if prod(checkpoint.shapes[key]) == 1
        }

    def _delta(self, own: Mapping[str, str]) -> Delta | None:
        shapes = self.checkpoint.shapes
        tensors = {our_suffix(s): torch.empty(shapes[k], device="meta") for s, k in own.items()}
        if not is_complete(tensors) or ("alpha" in tensors and tensors["alpha"].numel() != 1):
            return None
        try:
            return delta_of(tensors)
        except ValueError:
            return None

    @property
    def folded(self) -> dict[str, float]:
        """Alphas that were multiplied into the weights, by module."""
        try:
            found = json.loads(self.checkpoint.metadata.get(FOLDED, "{}"))
            return {
                name: float(alpha) for name, alpha in found.items() if name in self.keys.modules
            }
        except (ValueError, TypeError, AttributeError):
            return {}

    @property
    def width(self) -> int | None:
        """Width of the DiT that a network is made for; None when no module shows it."""
        for name, delta in self.deltas.items():
            # The inputs of these layers are as wide as the DiT.
            inner = name.startswith("blocks.") and name.endswith(("attn.q_proj", "mlp.layer1"))
            if inner and delta is not None:
                return delta.shape[1]
        return None

    @property
    def broken(self) -> list[str]:
        """Modules that lack a matrix, or whose tensors do not fit each other."""
        return [name for name, delta in self.deltas.items() if delta is None]


def describe_lora(checkpoint: Checkpoint) -> Description:
    """Kind, ranks and names of a LoRA, LoHa or LoKr file, and what every program does with it."""
    file = LoRAHeader(checkpoint)
    if not file.keys.modules:
        return Description(
            "LoRA of another model: none of its names belongs to Anima",
            {"tensors": len(checkpoint.shapes), "first_name": min(checkpoint.shapes)},
            {"anima-fast": "no"},
        )
    option = "train --network_weights or --base_weights, sample --lora"
    if file.keys.unknown:
        option = "train --network_weights"
    title = f"{file.title} for Anima"
    return Description(title, _facts(file), programs(file), _notes(file), option)


def _notes(file: LoRAHeader) -> list[str]:
    unknown, broken, notes = file.keys.unknown, file.broken, []
    if unknown:
        notes.append(
            f"tensors of no module of Anima: {len(unknown)}, the first is {unknown[0]}; "
            "--network_weights passes them over, sample, convert and --base_weights refuse the file"
        )
    if broken:
        notes.append(
            f"incomplete or damaged modules: {len(broken)}, the first is {broken[0]}; "
            "loading is refused, copy or download the file again"
        )
    if any(key.startswith(names.PEFT) for key in file.checkpoint.shapes) and not file.alphas:
        notes.append(
            "PEFT keeps lora_alpha in adapter_config.json: without .alpha in the file it counts as "
            "the rank here and elsewhere"
        )
    return notes


def _facts(file: LoRAHeader) -> dict[str, Any]:
    ranks, alphas, modules = file.ranks, file.alphas, file.keys.modules
    blocks = {name.split(".")[1] for name in modules if name.startswith("blocks.")}
    keys = [key for own in modules.values() for suffix, key in own.items() if suffix != "alpha"]
    facts = {
        "names": file.keys.dialect,
        "modules": {"total": len(modules), **file.counts},
        "dit_blocks": len(blocks),
        "dit_width": file.width or "not told",
        "rank": _spread(ranks.values()) or "none: both factors are stored whole",
        "alpha": _spread(alphas.values()) or "not stored: alpha = rank",
        "scale": _spread(alphas.get(n, rank) / rank for n, rank in ranks.items()) or "1",
        "parameters": sum(prod(file.checkpoint.shapes[key]) for key in keys),
    }
    if file.folded:
        facts["folded_alpha"] = f"{_spread(file.folded.values())} (in the weights already)"
    return facts


def _spread(values: Iterable[float]) -> str:
    """Distinct values and how often each occurs: "16" or "8 (40 modules), 16 (240 modules)"."""
    counts = Counter(values)
    if len(counts) < 2:
        return "".join(f"{value:g}" for value in counts)
    if len(counts) > MOST_VALUES:
        return f"{min(counts):g} to {max(counts):g} ({len(counts)} different values)"
    return ", ".join(f"{value:g} ({plural(n, 'module')})" for value, n in sorted(counts.items()))


def programs(file: LoRAHeader) -> dict[str, str]:
    """What each program does with a file: "yes" or "no", and the reason or remedy."""
    module = f", with --network_module {file.module}" if file.title != LORA.title else ""
    if file.broken:
        return {"anima-fast": SEE_NOTE}
    found = {
        "ComfyUI": _comfyui(file),
        "Forge Neo, SwarmUI": _comfyui(file),
        "diffusers": _diffusers(file),
        "sd-scripts": f"yes{module}" if file.keys.dialect == "kohya" else "no: convert --to kohya",
        "anima-fast": "yes, for --network_weights only" if file.keys.unknown else "yes",
    }
    if file.keys.unknown:
        # It cannot be converted either.
        found = {name: re.sub(r"(:|,|, or) convert [^)]*", "", v) for name, v in found.items()}
    return found


def _comfyui(file: LoRAHeader) -> str:
    if file.keys.dialect in ("diffusers", names.OTHER):
        return "no: convert --to comfyui or kohya"
    if file.keys.dialect == "kohya" and "text_encoder" in file.counts:
        return "yes (the text encoder part in versions since May 2026, or convert --to comfyui)"
    if file.title == LOKR.title and {*LOKR.full, "alpha"} <= file.suffixes:
        return "yes (it ignores alpha where both factors are stored whole)"
    return "yes"


def _diffusers(file: LoRAHeader) -> str:
    if file.title != LORA.title:
        return "no: it reads plain LoRA only"
    if file.keys.dialect in ("kohya", names.OTHER):
        # diffusers has no names for the text encoder.
        first = "" if "text_encoder" in file.counts else "--to diffusers, or "
        return f"no: convert {first}--to comfyui --fold_alpha"
    if "alpha" in file.suffixes:
        return "no: it refuses .alpha tensors, convert --to comfyui --fold_alpha"
    if "lora_down.weight" in file.suffixes:
        return "no: it expects lora_A and lora_B, convert --to comfyui --fold_alpha"
    if file.counts.keys() == {"text_encoder"}:
        return "no: it loads nothing for the text encoder"
    return "yes, without the text encoder part" if "text_encoder" in file.counts else "yes"
