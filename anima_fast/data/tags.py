"""How often each tag is in the captions, and tags that are one word spelt differently."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anima_fast.data.items import ImageItem

_BLANK = re.compile(r"[\s_]+")
# More words than this are a sentence: no other spelling is looked for.
_MOST_WORDS = 6


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
