"""`dataset.json` in the output folder: the dataset of a run in numbers, for `anima-fast watch`.

Written when training starts, from the plan alone. Lists of files are capped; the full count is
under the name plus `_total`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anima_fast.data.cache_folders import printable
from anima_fast.data.findings import has_no_caption, plan_problems
from anima_fast.files import write_json

if TYPE_CHECKING:
    from anima_fast.data.caption_tokens import CaptionTokens, LongCaption
    from anima_fast.data.items import DatasetPlan, ImageItem

NAME = "dataset.json"
# Entries of a list of files or problems, and of tags.
MOST_FILES, MOST_TAGS = 200, 200
_BLANK = re.compile(r"[\s_]+")
# More words than this are a sentence: no other spelling is looked for.
_MOST_WORDS = 6


def write_health(
    output_dir: str | Path, plan: DatasetPlan, tokens: CaptionTokens | None = None
) -> Path:
    """Write the summary into the run's folder; `tokens` once the captions are counted."""
    path = Path(output_dir) / NAME
    write_json(path, health(plan, tokens))
    return path


def health(plan: DatasetPlan, tokens: CaptionTokens | None = None) -> dict:
    """The summary: images, subsets, buckets, captions, problems and tags."""
    items = [*plan.items, *plan.validation_items]
    files = list({item.path: item for item in items}.values())
    missing = [str(item.path) for item in files if has_no_caption(item)]
    empty = [str(item.caption.file) for item in files if item.caption.blank]
    long = [] if tokens is None else [_long(caption) for caption in tokens.long]
    problems = [
        {"kind": problem.kind, "file": printable(problem.file), "text": problem.text}
        for problem in dict.fromkeys([*plan.problems, *plan_problems(plan, tokens)])
    ]
    problems += [{"kind": "notice", "file": "", "text": notice} for notice in plan.notices]
    tags = count_tags(files)
    return {
        "images": len(files),
        "uses": sum(item.repeats for item in plan.items),
        "validation": len(plan.validation_items),
        "batches_per_epoch": plan.batches_per_epoch,
        "subsets": subsets(plan),
        "buckets": buckets(plan.items),
        "captions": {
            "count": sum(bool(item.caption.text or item.caption.tags) for item in files),
            **capped("missing", [printable(file) for file in missing]),
            **capped("empty", [printable(file) for file in empty]),
            **capped("long", long),
        },
        **capped("problems", problems),
        "tags": [list(entry) for entry in tags.most_common(MOST_TAGS)],
        "tags_total": len(tags),
    }


def capped(name: str, entries: Sequence) -> dict:
    """The first entries of a list and how many there are."""
    return {name: list(entries[:MOST_FILES]), f"{name}_total": len(entries)}


def subsets(plan: DatasetPlan) -> list[dict]:
    """Each subset with its folder, numbers of images by use, and repeats."""
    found = []
    for dataset in plan.datasets:
        for subset in dataset.subsets:
            place = (subset.dataset_index, subset.index)
            trained, held_out, unused = (
                [i for i in items if (i.subset.dataset_index, i.subset.index) == place]
                for items in (plan.items, plan.validation_items, plan.unused)
            )
            found.append(
                {
                    "folder": printable(subset.image_dir or subset.metadata_file or ""),
                    "images": len(trained) + len(held_out) + len(unused),
                    "repeats": subset.num_repeats,
                    "dataset": subset.dataset_index,
                    "resolution": list(dataset.resolution),
                    "is_reg": subset.is_reg,
                    "uses": sum(item.repeats for item in trained),
                    "validation": len(held_out),
                    "unused": len(unused),
                }
            )
    return found


def buckets(items: Sequence[ImageItem]) -> list[dict]:
    """Images and uses (with repeats) of each bucket size of each dataset."""
    images: Counter = Counter()
    uses: Counter = Counter()
    for item in items:
        key = (item.dataset.index, item.bucket)
        images[key] += 1
        uses[key] += item.repeats
    return [
        {
            "width": size[0],
            "height": size[1],
            "images": images[index, size],
            "repeats": uses[index, size],
            "dataset": index,
        }
        for index, size in sorted(images)
    ]


def _long(caption: LongCaption) -> dict:
    return {"file": printable(str(caption.file)), "tokens": caption.tokens}


def count_tags(items: Iterable[ImageItem]) -> Counter[str]:
    """Captions that hold each tag, as it is spelt; a file that several datasets use counts once."""
    counts: Counter[str] = Counter()
    seen = set()
    for item in items:
        if item.path in seen:
            continue
        seen.add(item.path)
        lines = item.caption.lines(item.subset)
        parts = (tag.strip() for line in lines for tag in _split(line, item))
        counts.update(dict.fromkeys(tag for tag in parts if tag).keys())
    return counts


def spelling_variants(counts: Counter[str]) -> list[list[tuple[str, int]]]:
    """Groups of tags that differ only by case, spaces and underscores, the commonest first."""
    groups: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for tag, count in counts.most_common():
        plain = _BLANK.sub(" ", tag.casefold()).strip()
        if plain.count(" ") < _MOST_WORDS:
            groups[plain].append((tag, count))
    return [group for group in groups.values() if len(group) > 1]


def _split(line: str, item: ImageItem) -> list[str]:
    subset = item.subset
    for other in (subset.keep_tokens_separator, subset.secondary_separator):
        if other:
            line = line.replace(other, subset.caption_separator)
    return line.split(subset.caption_separator)
