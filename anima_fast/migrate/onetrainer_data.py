"""OneTrainer's concepts as a dataset file of ours, and its samples as prompts of previews.

A concept is a folder. Several resolutions mean there that each image gets one of them at random;
here each resolution is a dataset with all images, so epochs are fewer by as much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from anima_fast.errors import UserError
from anima_fast.migrate.ledger import Ledger, is_rows
from anima_fast.migrate.onetrainer_concept import Concept, read_resolutions
from anima_fast.migrate.paths import Paths
from anima_fast.migrate.rows import DEFAULT
from anima_fast.migrate.source import Source, parse_file

# OneTrainer's widest bucket is 4:1, twice the side by half of it.
STRETCH, STEP = 2, 64
RESOLUTION, EPOCHS = "512", 100
CONCEPTS_FILE, SAMPLES_FILE = "training_concepts/concepts.json", "training_samples/samples.json"
# Key of a sample -> the mark of a preview's prompt.
MARKS = {
    "negative_prompt": "n", "width": "w", "height": "h", "seed": "d", "diffusion_steps": "s",
    "cfg_scale": "l",
}  # fmt: skip


def convert_concepts(source: Source, ledger: Ledger) -> None:
    """Settle the concepts, in the configuration or in a file of their own, and the data's keys."""
    concepts, prefix = _rows(source, ledger, "concepts", "concept_file_name", CONCEPTS_FILE)
    resolutions = read_resolutions(str(ledger.get("resolution", RESOLUTION)))
    ledger.add("caption_extension", ".txt", "the only one there")
    if concepts is None:
        _as_options(ledger, resolutions)
        return
    if len(resolutions) > 1:
        why = "a dataset each, with all images; there each image gets one of them at random"
        ledger.explain("resolution", why)
    for key in ("resolution", "batch_size", "aspect_ratio_bucketing"):
        ledger.place(key, "the dataset file")
    if not ledger.get("resolution"):
        ledger.add("resolution", RESOLUTION, DEFAULT)
    paths = Paths.find([str(c.get("path", "")) for c in concepts], source.folders)
    datasets: dict[str, dict[str, Any]] = {}
    counts = set()
    for i, row in enumerate(concepts):
        concept = Concept(row, f"{prefix}[{i}].", ledger, paths)
        if not concept.is_used():
            continue
        sizes, subsets = concept.resolutions() or resolutions, concept.subsets()
        counts.add(len(sizes))
        for size in sizes:
            entry = _entry(ledger, size)
            datasets.setdefault(repr(entry), {**entry, "subsets": []})["subsets"] += subsets
        concept.close()
    if not datasets:
        raise UserError("no concept is switched on and for training: there is nothing to train on")
    ledger.dataset = {"general": {"caption_extension": ".txt"}, "datasets": [*datasets.values()]}
    _epochs(ledger, counts, len(resolutions))
    if ledger.on("masked_training"):
        ledger.drop("masked_training", "its masks lie beside the images as NAME-masklabel.png")
        ledger.todo.append(
            "masked training: move every NAME-masklabel.png to a folder of its own as NAME.png, "
            "name that folder in conditioning_data_dir of the subsets, and set masked_loss = true"
        )


def _epochs(ledger: Ledger, counts: set[int], usual: int) -> None:
    """An epoch has every image at all of its resolutions here, so there are fewer epochs."""
    shared = usual if usual in counts else max(counts)
    if shared > 1:
        fewer = max(1, math.ceil(ledger.whole("epochs", EPOCHS) / shared))
        why = f"an epoch has every image at {shared} resolutions here, so it is as much longer"
        ledger.take("epochs", "max_train_epochs", fewer, why, default=why)
    if len(counts) > 1:
        ledger.todo.append(
            f"the number of epochs is that of concepts with {shared} resolutions: adapt "
            "num_repeats of the others, as an epoch has an image at all of its resolutions here"
        )


def _rows(
    source: Source, ledger: Ledger, name: str, file_key: str, default_file: str
) -> tuple[list[Mapping[str, Any]] | None, str]:
    """Concepts or samples, and what their keys begin with in the ledger; None when not found."""
    packed = source.config.get(name)
    if is_rows(packed):
        ledger.drop(file_key, f"the {name} stand in this file")
        return packed, name
    ledger.drop(name, "it is empty")
    found = source.find(ledger.text(file_key, default_file))
    if found is None:
        ledger.drop(file_key, "it was not found")
        return None, ""
    rows = parse_file(found)
    if not is_rows(rows) and rows != []:
        raise UserError(f"{found.name} is no list of {name}")
    ledger.place(file_key, f"the {name} in it")
    ledger.extend({name: rows}, f"{found.name}: ")
    return rows, f"{found.name}: {name}"


def _as_options(ledger: Ledger, resolutions: list[list[int]]) -> None:
    """Without concepts: the data's keys as the options that are a dataset file's defaults."""
    named = ledger.text("concept_file_name", CONCEPTS_FILE)
    ledger.todo.append(
        f"the concepts in {named} were not found: give --cwd FOLDER, OneTrainer's folder, or "
        "write dataset_config by hand"
    )
    if len(resolutions) > 1:
        ledger.todo.append(f"only the first resolution is set, of {ledger.get('resolution')}")
    entry = _entry(ledger, resolutions[0])
    ledger.options["resolution"] = str(entry.pop("resolution")).strip("[]").replace(" ", "")
    ledger.options["train_batch_size"] = entry.pop("batch_size")
    ledger.options |= entry
    for key, option in (("resolution", "resolution"), ("batch_size", "train_batch_size"),
                        ("aspect_ratio_bucketing", "enable_bucket")):  # fmt: skip
        ledger.place(key, option)


def _entry(ledger: Ledger, size: list[int]) -> dict[str, Any]:
    """The keys of a dataset at one resolution."""
    width, height = size
    entry: dict[str, Any] = {"resolution": width if width == height else size}
    entry["batch_size"] = max(1, ledger.whole("batch_size", 1))
    # Fixed sizes have no buckets there either.
    if not ledger.get("aspect_ratio_bucketing", True) or width != height:
        rounded = [round(v / 16) * 16 for v in size]
        return entry | {
            "enable_bucket": False, "resolution": rounded[0] if width == height else rounded,
        }  # fmt: skip
    entry["enable_bucket"] = True
    entry["min_bucket_reso"] = max(STEP, width // STRETCH // STEP * STEP)
    entry["max_bucket_reso"] = math.ceil(width * STRETCH / STEP) * STEP
    return entry


def convert_samples(source: Source, ledger: Ledger) -> None:
    """Settle the samples, in the configuration or a file of their own, and when they are made."""
    file_key = "sample_definition_file_name"
    samples, prefix = _rows(source, ledger, "samples", file_key, SAMPLES_FILE)
    prompts = []
    for i, sample in enumerate(samples or []):
        if sample.get("enabled", True) and sample.get("prompt"):
            prompts.append(_line(sample))
            if _is_random(sample):
                ledger.drop(f"{prefix}[{i}].seed", "a random seed is drawn, there and here")
            for name in (*MARKS, "prompt", "random_seed"):
                ledger.place(f"{prefix}[{i}].{name}", "sample_prompt")
        for key in ledger.open_keys(f"{prefix}[{i}]."):
            ledger.drop(key, "it is switched off, or has no counterpart here")
    unit = ledger.text("sample_after_unit", "MINUTE")
    every = max(1, ledger.whole("sample_after", 10))
    if not prompts or unit == "NEVER":
        return
    ledger.put("sample_prompt", prompts, "the samples")
    option = "sample_every_n_steps" if unit == "STEP" else "sample_every_n_epochs"
    number, why = (every, "") if unit in ("STEP", "EPOCH") else (1, "previews come by epochs here")
    ledger.take(
        "sample_after", option, number, why, default=f"{DEFAULT}; {why}" if why else DEFAULT
    )


def _is_random(sample: Mapping[str, Any]) -> bool:
    return bool(sample.get("random_seed")) or int(sample.get("seed") or 0) < 0


def _line(sample: Mapping[str, Any]) -> str:
    """A prompt with its settings behind it, without a random seed."""
    parts = [" ".join(str(sample["prompt"]).split())]
    for key, mark in MARKS.items():
        value = sample.get(key)
        if value not in (None, "") and not (key == "seed" and _is_random(sample)):
            parts.append(f"--{mark} {' '.join(str(value).split())}")
    return " ".join(parts)
