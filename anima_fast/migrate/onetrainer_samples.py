"""OneTrainer's samples as prompts of previews."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anima_fast.errors import UserError
from anima_fast.migrate.ledger import Ledger
from anima_fast.migrate.source import Source, parse_file

DEFAULT_FILE = "training_samples/samples.json"
# Key of a sample -> the mark of a preview's prompt.
MARKS = {
    "negative_prompt": "n", "width": "w", "height": "h", "seed": "d", "diffusion_steps": "s",
    "cfg_scale": "l",
}  # fmt: skip


def convert_samples(source: Source, ledger: Ledger) -> None:
    """Settle the samples, in the configuration or a file of their own, and when they are made."""
    samples, prefix = _samples(source, ledger)
    prompts = []
    for i, sample in enumerate(samples):
        used = sample.get("enabled", True) and sample.get("prompt")
        if used:
            prompts.append(_line(sample))
        for key in ledger.open_keys(f"{prefix}[{i}]."):
            name = key.rsplit(".", 1)[-1]
            if used and name == "seed" and _is_random(sample):
                ledger.drop(key, "a random seed is drawn, there and here")
            elif used and (name in MARKS or name in ("prompt", "random_seed")):
                ledger.take_elsewhere(key, "sample_prompt")
            else:
                ledger.drop(key, "it has no counterpart here" if used else "it is switched off")
    unit = str(ledger.get("sample_after_unit", "MINUTE"))
    every = max(1, int(ledger.number("sample_after", 10)))
    if not prompts or unit == "NEVER":
        return
    ledger.put("sample_prompt", prompts, "the samples")
    option = "sample_every_n_steps" if unit == "STEP" else "sample_every_n_epochs"
    number = every if unit in ("STEP", "EPOCH") else 1
    if ledger.has("sample_after") and number == every and unit in ("STEP", "EPOCH"):
        ledger.take("sample_after", option, number)
    elif ledger.has("sample_after"):
        ledger.change("sample_after", option, number, "previews come by steps or epochs here")
    else:
        ledger.add(option, number, "previews come by steps or epochs here, not by minutes")


def _samples(source: Source, ledger: Ledger) -> tuple[list[Mapping[str, Any]], str]:
    key, packed = "sample_definition_file_name", source.config.get("samples")
    if isinstance(packed, list) and packed:
        return [s for s in packed if isinstance(s, Mapping)], "samples"
    named = str(ledger.get(key, "") or DEFAULT_FILE)
    found = next((f / named for f in source.folders if (f / named).is_file()), None)
    if found is None:
        return [], ""
    samples = parse_file(found)
    if not isinstance(samples, list) or not all(isinstance(s, Mapping) for s in samples):
        raise UserError(f"{found.name} is no list of samples")
    if ledger.has(key):
        ledger.take_elsewhere(key, "sample_prompt")
    prefix = f"{found.name}: samples"
    ledger.extend({"samples": samples}, prefix.removesuffix("samples"))
    return samples, prefix


def _is_random(sample: Mapping[str, Any]) -> bool:
    return bool(sample.get("random_seed")) or int(sample.get("seed") or 0) < 0


def _line(sample: Mapping[str, Any]) -> str:
    """A prompt with its settings behind it; a random seed is none."""
    parts = [" ".join(str(sample["prompt"]).split())]
    for key, mark in MARKS.items():
        value = sample.get(key)
        if value not in (None, "") and not (key == "seed" and _is_random(sample)):
            parts.append(f"--{mark} {' '.join(str(value).split())}")
    return " ".join(parts)
