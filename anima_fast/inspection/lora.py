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
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import torch

from anima_fast.adapters import names
from anima_fast.adapters.deltas import Delta, delta_of
from anima_fast.adapters.formats import FOLDED, is_complete, our_suffix, split_key
from anima_fast.models.adapter_kinds import LOKR, LORA, MAGNITUDES, kind_of, module_of, title_of
from anima_fast.models.checkpoint import Checkpoint

MOST_VALUES = 5
PARTS = (("text_encoder", names.TEXT_ENCODER), ("llm_adapter", names.ADAPTER), ("dit", ""))


@dataclass
class LoRAFile:
    """A file's modules by dotted name, each {suffix: key}, and the keys of no module."""

    checkpoint: Checkpoint
    dialect: str | None
    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> LoRAFile:
        """Sort the keys of a file."""
        found = cls(checkpoint, names.detect_dialect(checkpoint.keys()))
        for key in checkpoint.shapes:
            module, suffix = split_key(key)
            name = names.from_dialect(module, found.dialect) if module and found.dialect else None
            if name is None:
                found.unknown.append(key)
            else:
                found.modules.setdefault(name, {})[suffix] = key
        return found

    @property
    def suffixes(self) -> set[str]:
        """All kinds of tensors in the file."""
        return {suffix for own in self.modules.values() for suffix in own}

    @property
    def network(self) -> str:
        """LoRA, LoHa, LoKr or DoRA."""
        return title_of(kind_of(self.suffixes), dora=self.dora)

    @property
    def dora(self) -> bool:
        """Whether it has magnitudes."""
        return MAGNITUDES in map(our_suffix, self.suffixes)

    @property
    def module(self) -> str:
        """The `network_module` that loads it in sd-scripts."""
        return module_of(kind_of(self.suffixes), dora=self.dora)

    @property
    def counts(self) -> dict[str, int]:
        """Modules by part of the model; parts without any are left out."""
        parts = (next(p for p, prefix in PARTS if name.startswith(prefix)) for name in self.modules)
        return dict(Counter(parts))

    @cached_property
    def parts(self) -> dict[str, Delta | None]:
        """Each module as a part without data; None where a tensor lacks or does not fit."""
        return {name: self._part(own) for name, own in self.modules.items()}

    def _part(self, own: Mapping[str, str]) -> Delta | None:
        shape = self.checkpoint.shape
        tensors = {our_suffix(s): torch.empty(shape(key), device="meta") for s, key in own.items()}
        if not is_complete(tensors) or ("alpha" in tensors and tensors["alpha"].numel() != 1):
            return None
        try:
            return delta_of(tensors)
        except ValueError:
            return None

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by module; a LoKr whose factors are both whole has none."""
        parts = ((name, part) for name, part in self.parts.items() if part is not None)
        return {name: part.rank for name, part in parts if part.rank}

    @property
    def alphas(self) -> dict[str, float]:
        """Stored alpha by module: the only tensors that are read."""
        get, shape = self.checkpoint.get, self.checkpoint.shape
        keys = {name: own["alpha"] for name, own in self.modules.items() if "alpha" in own}
        return {name: get(key).item() for name, key in keys.items() if prod(shape(key)) == 1}

    @property
    def folded(self) -> dict[str, float]:
        """Alphas that were multiplied into the weights, by module."""
        try:
            found = json.loads(self.checkpoint.metadata.get(FOLDED, "{}"))
            return {name: float(alpha) for name, alpha in found.items() if name in self.modules}
        except (ValueError, TypeError, AttributeError):
            return {}

    @property
    def width(self) -> int | None:
        """Width of the DiT that a network is made for; None when no module tells it."""
        for name, part in self.parts.items():
            # Inputs of these are as wide as the DiT.
            inner = name.startswith("blocks.") and name.endswith(("attn.q_proj", "mlp.layer1"))
            if inner and part is not None:
                return part.shape[1]
        return None

    @property
    def broken(self) -> list[str]:
        """Modules that lack a matrix, or whose tensors do not fit."""
        return [name for name, part in self.parts.items() if part is None]


def describe_lora(checkpoint: Checkpoint) -> dict:
    """Title, facts, programs and notes of a LoRA, LoHa or LoKr file, and the option that takes it.

    The option is None where those of every LoRA take it.
    """
    file = LoRAFile.read(checkpoint)
    if not file.modules:
        return {
            "title": "LoRA of another model: none of its names belongs to Anima",
            "facts": {"tensors": len(checkpoint.shapes), "first_name": min(checkpoint.shapes)},
            "programs": {"anima-fast": "no"},
            "notes": [],
        }
    notes = []
    if file.unknown:
        notes.append(
            f"tensors of no module of Anima: {len(file.unknown)}, the first is {file.unknown[0]}; "
            "--network_weights passes them over, sample, convert and --base_weights refuse the file"
        )
    if file.broken:
        notes.append(
            f"incomplete or damaged modules: {len(file.broken)}, the first is {file.broken[0]}; "
            "loading is refused, copy or download the file again"
        )
    if any(key.startswith(names.PEFT) for key in checkpoint.shapes) and not file.alphas:
        notes.append(
            "PEFT keeps lora_alpha in adapter_config.json: without .alpha in the file it counts as "
            "the rank here and elsewhere"
        )
    return {
        "title": f"{file.network} for Anima",
        "facts": _facts(file),
        "programs": programs(file),
        "notes": notes,
        "option": "train --network_weights" if file.unknown else None,
    }


def _facts(file: LoRAFile) -> dict:
    ranks, alphas = file.ranks, file.alphas
    blocks = {name.split(".")[1] for name in file.modules if name.startswith("blocks.")}
    keys = [k for own in file.modules.values() for s, k in own.items() if s != "alpha"]
    facts = {
        "names": file.dialect,
        "modules": {"total": len(file.modules), **file.counts},
        "dit_blocks": len(blocks),
        "dit_width": file.width or "not told",
        "rank": _spread(ranks.values()) or "none: both factors are stored whole",
        "alpha": _spread(alphas.values()) or "not stored: alpha = rank",
        "scale": _spread(alphas.get(n, rank) / rank for n, rank in ranks.items()) or "1",
        "parameters": sum(prod(file.checkpoint.shape(key)) for key in keys),
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
    return ", ".join(f"{value:g} ({_modules(n)})" for value, n in sorted(counts.items()))


def _modules(count: int) -> str:
    return f"{count} module{'s' * (count > 1)}"


def programs(file: LoRAFile) -> dict[str, str]:
    """What each program does with a file: "yes" or "no", and the reason or remedy."""
    module = f", with --network_module {file.module}" if file.network != LORA.title else ""
    if file.broken:
        return {"anima-fast": "no: see the note"}
    found = {
        "ComfyUI": _comfyui(file),
        "Forge Neo, SwarmUI": _comfyui(file),
        "diffusers": _diffusers(file),
        "sd-scripts": f"yes{module}" if file.dialect == "kohya" else "no: convert --to kohya",
        "anima-fast": "yes, for --network_weights only" if file.unknown else "yes",
    }
    if file.unknown:
        # It cannot be converted either.
        found = {name: re.sub(r"(:|,|, or) convert [^)]*", "", v) for name, v in found.items()}
    return found


def _comfyui(file: LoRAFile) -> str:
    if file.dialect in ("diffusers", names.OTHER):
        return "no: convert --to comfyui or kohya"
    if file.dialect == "kohya" and "text_encoder" in file.counts:
        return "yes (the text encoder part in versions since May 2026, or convert --to comfyui)"
    if file.network == LOKR.title and {*LOKR.wholes, "alpha"} <= file.suffixes:
        return "yes (it ignores alpha where both factors are stored whole)"
    return "yes"


def _diffusers(file: LoRAFile) -> str:
    if file.network != LORA.title:
        return "no: it reads plain LoRA only"
    if file.dialect in ("kohya", names.OTHER):
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
