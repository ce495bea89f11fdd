"""The survey of a dataset as values that serialise to JSON."""

from __future__ import annotations

from pathlib import Path

from anima_fast.data import health
from anima_fast.data.cache_folders import printable
from anima_fast.data.findings import lost, scale
from anima_fast.reports.dataset.survey import Survey


def records(survey: Survey) -> dict:
    """Everything that the tables and the page show, uncapped.

    Returns:
        plan: numbers of the run. subsets, buckets: as in `dataset.json`. images: one entry for each
        use of a file by a dataset. The others are named as what they hold.
    """
    plan, length = survey.plan, survey.length
    return {
        "dataset": survey.title,
        "plan": {
            "images": len({item.path for item in survey.items}),
            "uses_per_epoch": sum(item.repeats for item in plan.items),
            "batches_per_epoch": plan.batches_per_epoch,
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
            "exact": [[_name(path) for path in group] for group in survey.exact],
            "near": [[_name(path) for path in group] for group in survey.near],
        },
        "masks": [
            {"file": _name(mask.image), "mask": mask.source, "trained": round(mask.area, 4)}
            for mask in survey.masks
        ],
        "tags": [list(entry) for entry in survey.tags.most_common()],
        "tag_spellings": [[list(entry) for entry in group] for group in survey.spellings],
        "problems": [
            {
                "kind": problem.kind,
                "file": printable(problem.file),
                "text": problem.text,
                "stops": problem.stops,
            }
            for problem in survey.problems
        ],
        "notices": survey.notices,
    }


def _images(survey: Survey) -> list[dict]:
    uses = survey.uses()
    entries = []
    for item, text in zip(survey.items, survey.texts, strict=True):
        lengths = None if survey.tokens is None else survey.tokens.lengths[text]
        entries.append(
            {
                "file": _name(item.path),
                "subset": item.subset.where,
                "use": uses[id(item)],
                "size": list(item.size),
                "resized": list(item.resized),
                "bucket": list(item.bucket),
                "cut_off": round(lost(item), 4),
                "scale": round(scale(item), 4),
                "repeats": item.repeats,
                "caption": text,
                "qwen3_tokens": None if lengths is None else lengths.qwen,
                "t5_tokens": None if lengths is None else lengths.t5,
            }
        )
    return entries


def _tokens(survey: Survey) -> dict:
    if survey.tokens is None:
        return {"counted": False, "reason": survey.token_note}
    return {
        "counted": True,
        "limits": list(survey.tokens.limits),
        "whole": survey.tokens.whole,
        "long": [
            {
                "file": _name(caption.file),
                "tokens": caption.tokens,
                "lost": 0 if survey.tokens.whole else caption.beyond,
                "lost_text": survey.lost_text.get(str(caption.file), ""),
            }
            for caption in survey.tokens.long
        ],
    }


def _name(path: Path) -> str:
    return printable(str(path))
