"""OneTrainer's concepts as a dataset file of ours.

A concept is a folder. Several resolutions mean there that each image gets one of them at random;
here each resolution is a dataset with all images, so epochs are fewer by as much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from anima_fast.errors import UserError
from anima_fast.migrate.ledger import Ledger
from anima_fast.migrate.onetrainer_concept import Concept, read_resolutions
from anima_fast.migrate.onetrainer_tables import DEFAULTS
from anima_fast.migrate.paths import Paths
from anima_fast.migrate.source import Source, parse_file

# OneTrainer's widest bucket is 4:1, twice the side by half of it.
STRETCH, STEP = 2, 64
DEFAULT_FILE = "training_concepts/concepts.json"


def convert_concepts(source: Source, ledger: Ledger, command: str) -> None:
    """Settle the concepts, in the configuration or in a file of their own, and the data's keys."""
    concepts, prefix = _concepts(source, ledger)
    resolutions = read_resolutions(str(ledger.get("resolution", DEFAULTS["resolution"])))
    if concepts is None:
        _as_options(ledger, resolutions)
        return
    _settle_shared(ledger, resolutions)
    paths = Paths.find([str(c.get("path", "")) for c in concepts], source.folders)
    datasets: dict[str, dict[str, Any]] = {}
    counts = set()
    for i, concept in enumerate(concepts):
        place = Concept(concept, f"{prefix}[{i}].", ledger, paths)
        if not place.is_used():
            continue
        sizes = place.resolutions() or resolutions
        counts.add(len(sizes))
        for size in sizes:
            entry = _entry(ledger, size)
            found = datasets.setdefault(repr(entry), {**entry, "subsets": []})
            found["subsets"] += place.subsets()
        place.close()
    if not datasets:
        raise UserError("no concept is switched on and for training: there is nothing to train on")
    ledger.dataset = {"general": {"caption_extension": ".txt"}, "datasets": [*datasets.values()]}
    ledger.add("caption_extension", ".txt", "the only one there")
    shared = len(resolutions) if len(resolutions) in counts else max(counts)
    _epochs(ledger, shared)
    if len(counts) > 1:
        ledger.todo.append(
            f"the number of epochs is that of concepts with {shared} resolutions: adapt "
            "num_repeats of the others, as an epoch has an image at all of its resolutions here"
        )
    _masks(ledger)


def _concepts(source: Source, ledger: Ledger) -> tuple[list[Mapping[str, Any]] | None, str]:
    """The concepts and what their keys begin with in the ledger; None when they are not found."""
    key, packed = "concept_file_name", source.config.get("concepts")
    if isinstance(packed, list) and packed:
        if ledger.has(key):
            ledger.drop(key, "the concepts stand in this file")
        return packed, "concepts"
    if ledger.has("concepts"):
        ledger.drop("concepts", "it is empty")
    named = str(ledger.get(key, "") or DEFAULT_FILE)
    found = next((f / named for f in source.folders if (f / named).is_file()), None)
    if found is None:
        if ledger.has(key):
            ledger.drop(key, "it was not found")
        ledger.todo.append(
            f"the concepts in {named} were not found: give --cwd FOLDER, OneTrainer's folder, or "
            "write dataset_config by hand"
        )
        return None, ""
    concepts = parse_file(found)
    if not isinstance(concepts, list) or not all(isinstance(c, Mapping) for c in concepts):
        raise UserError(f"{found.name} is no list of concepts")
    if ledger.has(key):
        ledger.take_elsewhere(key, "a dataset file of ours")
    prefix = f"{found.name}: concepts"
    ledger.extend({"concepts": concepts}, prefix.removesuffix("concepts"))
    return concepts, prefix


def _as_options(ledger: Ledger, resolutions: list[list[int]]) -> None:
    """Without concepts: the data's keys as the options that are a dataset file's defaults."""
    ledger.add("caption_extension", ".txt", "the only one there")
    entry = _entry(ledger, resolutions[0])
    size = entry["resolution"]
    ledger.options["resolution"] = str(size) if isinstance(size, int) else f"{size[0]},{size[1]}"
    for key, option in (("batch_size", "train_batch_size"), ("enable_bucket", "enable_bucket"),
                        ("min_bucket_reso",) * 2, ("max_bucket_reso",) * 2):  # fmt: skip
        if key in entry:
            ledger.options[option] = entry[key]
    for key, option in (("resolution", "resolution"), ("batch_size", "train_batch_size"),
                        ("aspect_ratio_bucketing", "enable_bucket")):  # fmt: skip
        if ledger.has(key):
            ledger.take_elsewhere(key, option)
    if len(resolutions) > 1:
        ledger.todo.append(f"only the resolution {size} is set, of {ledger.get('resolution')}")


def _settle_shared(ledger: Ledger, resolutions: list[list[int]]) -> None:
    if ledger.has("resolution") and len(resolutions) > 1:
        why = "a dataset each, with all images; there each image gets one of them at random"
        ledger.change("resolution", None, None, why)
    elif ledger.has("resolution"):
        ledger.take_elsewhere("resolution", "resolution of the dataset")
    else:
        ledger.add("resolution", DEFAULTS["resolution"], "OneTrainer's default")
    for key, where in (("batch_size", "batch_size"), ("aspect_ratio_bucketing", "enable_bucket")):
        if ledger.has(key):
            ledger.take_elsewhere(key, f"{where} of the dataset")


def _entry(ledger: Ledger, size: list[int]) -> dict[str, Any]:
    width, height = size
    entry: dict[str, Any] = {"resolution": width if width == height else size}
    entry["batch_size"] = max(1, int(ledger.number("batch_size", 1)))
    side = math.sqrt(width * height)
    # Fixed sizes have no buckets there either.
    if not ledger.get("aspect_ratio_bucketing", True) or width != height:
        entry["enable_bucket"] = False
        rounded = [round(v / 16) * 16 for v in size]
        entry["resolution"] = rounded[0] if width == height else rounded
        return entry
    entry["enable_bucket"] = True
    entry["min_bucket_reso"] = max(STEP, int(side / STRETCH) // STEP * STEP)
    entry["max_bucket_reso"] = math.ceil(side * STRETCH / STEP) * STEP
    return entry


def _epochs(ledger: Ledger, resolutions: int) -> None:
    if resolutions < 2:
        return
    epochs = int(ledger.number("epochs", DEFAULTS["epochs"]))
    fewer = max(1, math.ceil(epochs / resolutions))
    why = f"an epoch has every image at {resolutions} resolutions here, so it is as much longer"
    if ledger.has("epochs"):
        ledger.change("epochs", "max_train_epochs", fewer, why)
    else:
        ledger.add("max_train_epochs", fewer, why)


def _masks(ledger: Ledger) -> None:
    key = "masked_training"
    if not ledger.has(key):
        return
    if not ledger.get(key):
        ledger.drop(key, "it is off")
        return
    ledger.drop(key, "its masks lie beside the images as NAME-masklabel.png")
    ledger.todo.append(
        "masked training: move every NAME-masklabel.png to a folder of its own as NAME.png, name "
        "that folder in conditioning_data_dir of the subsets, and set masked_loss = true"
    )
