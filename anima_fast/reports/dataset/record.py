"""A survey as one record of plain values: what the JSON, the tables and the page show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from anima_fast.data import health
from anima_fast.data.cache_folders import printable
from anima_fast.data.findings import lost, scale
from anima_fast.data.problems import KINDS
from anima_fast.reports.dataset.survey import Survey

# The JSON of the whole survey, and that of one image, caption or problem.
Record = dict[str, Any]


def make_record(survey: Survey) -> Record:
    """Everything that is known about a dataset, uncapped; it serialises to JSON.

    `plan` has the numbers of the run, `subsets` and `buckets` are as in `dataset.json`, `images`
    has an entry for each use of a file by a dataset.
    """
    plan, length = survey.plan, survey.length
    record = {
        "dataset": survey.title,
        "plan": {
            "images": len({item.path for item in survey.items}),
            "uses_per_epoch": sum(item.repeats for item in plan.items),
            "batches_per_epoch": plan.batches_per_epoch,
            "batch_sizes": list(dict.fromkeys(d.batch_size for d in plan.datasets)),
            "steps_per_epoch": length.updates_per_epoch if plan.batches_per_epoch else 0,
            "accumulation": length.accumulation,
            "epochs": length.epochs,
            "steps": length.steps,
            "validation_images": len(plan.validation_items),
            "unused_regularisation_images": len(plan.unused),
        },
        "subsets": health.subsets(plan),
        "buckets": health.buckets(plan.items),
        "images": _images(survey),
        "tokens": _tokens(survey),
        "duplicates": {
            kind: [[str(path) for path in group] for group in groups]
            for kind, groups in survey.duplicates.items()
        },
        "masks": [{**mask, "trained": round(mask["trained"], 4)} for mask in survey.masks],
        "tags": [list(entry) for entry in survey.tags.most_common()],
        "tag_spellings": [[list(entry) for entry in group] for group in survey.spellings],
        "problems": [
            {"kind": one.kind, "file": one.file, "text": one.text, "stops": one.stops}
            for one in survey.problems
        ],
        "notices": survey.plan.notices,
        "decoded": bool(survey.looks),
    }
    return _printable(record)


def _images(survey: Survey) -> list[Record]:
    plan = survey.plan
    uses = {id(item): "regularisation" if item.is_reg else "training" for item in plan.items}
    uses |= {id(item): "validation" for item in plan.validation_items}
    entries = []
    for item, text in zip(survey.items, survey.texts, strict=True):
        lengths = None if survey.tokens is None else survey.tokens.lengths[text]
        entries.append(
            {
                "file": str(item.path),
                "dataset": item.dataset.index,
                "subset": item.subset.where,
                "use": uses.get(id(item), "unused"),
                "size": list(item.size),
                "resized": list(item.resized),
                "bucket": list(item.bucket),
                "cut_off": round(lost(item), 4),
                "scale": round(scale(item), 4),
                "repeats": item.repeats,
                "caption": text,
                "caption_file": str(item.caption.file) if item.caption.file else None,
                "qwen3_tokens": None if lengths is None else lengths.qwen,
                "t5_tokens": None if lengths is None else lengths.t5,
            }
        )
    return entries


def _tokens(survey: Survey) -> Record:
    if survey.tokens is None:
        return {"counted": False, "reason": survey.token_note}
    return {
        "counted": True,
        "limits": list(survey.tokens.limits),
        "whole": survey.tokens.whole,
        "long": [
            {
                "file": str(caption.file),
                "tokens": caption.tokens,
                "lost": 0 if survey.tokens.whole else caption.beyond,
                "lost_text": survey.lost_text.get(str(caption.file), ""),
            }
            for caption in survey.tokens.long
        ],
    }


def _printable(value: Any) -> Any:
    """The value with every text as valid Unicode, which names and captions need not be."""
    if isinstance(value, dict):
        return {name: _printable(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_printable(entry) for entry in value]
    return printable(value) if isinstance(value, str) else value


def facts(record: Record) -> dict[str, str]:
    """The first lines of the tables and of the page, by name."""
    plan = record["plan"]
    uses = Counter(image["use"] for image in record["images"])
    images = f"{uses['training']} for training"
    for name in ("regularisation", "validation"):
        if uses[name]:
            images += f", {uses[name]} for {name}"
    if uses["unused"]:
        images += f", {uses['unused']} regularisation images unused"
    found = {"images": images}
    if plan["batches_per_epoch"]:
        sizes = ", ".join(map(str, plan["batch_sizes"]))
        found |= {
            "uses in an epoch": f"{plan['uses_per_epoch']} (images times repeats)",
            "batches in an epoch": f"{plan['batches_per_epoch']} (batch size {sizes})",
            "steps in an epoch": f"{plan['steps_per_epoch']} (accumulation {plan['accumulation']})",
            "the run": f"{plan['steps']} steps, {plan['epochs']} epochs",
        }
    return found | {"tokens": _token_summary(record)}


def _token_summary(record: Record) -> str:
    """One sentence about the lengths of the captions."""
    tokens = record["tokens"]
    if not tokens["counted"]:
        return tokens["reason"]
    if not record["images"]:
        return "no caption"
    qwen = [image["qwen3_tokens"] for image in record["images"]]
    t5 = [image["t5_tokens"] for image in record["images"]]
    over = f"{len(tokens['long'])} above {max(tokens['limits'])}"
    return (
        f"{sum(t5) / len(t5):.0f} of T5 on average, most {max(qwen)} of Qwen3, {max(t5)} of T5; "
        f"{over}"
    )


def token_histogram(record: Record, most: int = 12) -> list[tuple[str, int, int]]:
    """Captions by length: (range of tokens, captions by Qwen3's count, by T5's).

    The ranges are as wide as it takes for `most` of them to hold 95 % of the captions; longer
    captions go into two more rows, up to the limit of the text and above it.
    """
    if not record["tokens"]["counted"] or not record["images"]:
        return []
    lengths = [(image["qwen3_tokens"], image["t5_tokens"]) for image in record["images"]]
    limit = max(record["tokens"]["limits"])
    usual = sorted(max(pair) for pair in lengths)[(len(lengths) - 1) * 95 // 100]
    width = next(w for w in (4 * 2**i for i in range(30)) if usual < w * most)
    last = min((usual // width + 1) * width, limit)
    edges = [*range(0, last, width), last, limit + 1, 2**62]
    rows = []
    for low, high in pairwise(dict.fromkeys(edges)):
        qwen, t5 = (sum(low <= pair[i] < high for pair in lengths) for i in (0, 1))
        name = f"{low}-{high - 1}" if high <= limit + 1 else f"above {limit}"
        if low < last or qwen or t5:
            rows.append((name, qwen, t5))
    return rows


def largest_crops(record: Record) -> list[Record]:
    """Images that lose at least one percent to the crop, the largest loss first."""
    cropped = [image for image in record["images"] if image["cut_off"] >= 0.01]
    return sorted(cropped, key=lambda image: image["cut_off"], reverse=True)


def size_text(size: Sequence[int]) -> str:
    """Width and height of an image or a bucket: "96x64"."""
    return f"{size[0]}x{size[1]}"


def problem_groups(record: Record) -> list[Record]:
    """Problems by kind, with title and remedy of each; those that stop training come first."""
    found = []
    for kind, about in sorted(KINDS.items(), key=lambda entry: not entry[1].stops):
        if problems := [one for one in record["problems"] if one["kind"] == kind]:
            title = about.title[0].upper() + about.title[1:]
            group = {"kind": kind, "title": title, "remedy": about.remedy, "stops": about.stops}
            found.append({**group, "problems": problems})
    return found


def described(problem: Record) -> str:
    """The name of a problem's file and what is wrong with it."""
    return ": ".join(part for part in (Path(problem["file"]).name, problem["text"]) if part)
