"""From the text next to an image to the prompt of one training step.

Order: choose the line; add prefix and suffix; drop the caption; resolve wildcards
`{a|b}` (`{{` and `}}` are literal braces); then, on the tags between separators: warm-up (only the
first tags early in training), shuffle, tag dropout; last, the secondary separator becomes the
ordinary one. Tags before `keep_tokens_separator` (or the first `keep_tokens`) and after its second
occurrence keep their places.

The rules are those of sd-scripts except in three points: prefix and suffix go around every line
that can be chosen, not around the block of lines; `keep_tokens_separator` is always removed from
the text, even when nothing is shuffled; and the parts that are not random apply with cached text
outputs too. All randomness comes from the generator that is passed in.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

from anima_fast.data.seeding import seeded
from anima_fast.data.subset import Subset

_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")
_NEWLINE = re.compile(r"\r\n|\r|\n")
# Draws made in search of a new rendering before the search counts as exhausted.
_TRIES = 20

# Step and length of a token warm-up in progress.
Warmup = tuple[int, float] | None
# A caption cut at its separators: fixed head, flexible middle, fixed tail.
Tags = tuple[list[str], list[str], list[str]]


@dataclass(frozen=True)
class Caption:
    """The raw text of an image: lines of a caption file, or caption and tags of a metadata file.

    `file` is the caption file, None for an image without one and for entries of a metadata file;
    `blank` says that the file is there and empty.
    """

    text: str = ""
    tags: str = ""
    file: Path | None = field(default=None, compare=False)
    blank: bool = field(default=False, compare=False)

    def unused_lines(self, subset: Subset) -> int:
        """Lines that are never trained, as only the first counts without wildcards."""
        return 0 if subset.enable_wildcard else max(0, len(_filled_lines(self.text)) - 1)

    def lines(self, subset: Subset) -> list[str]:
        """The candidates: every non-empty line with wildcards on, else the first; at least one."""
        found = _filled_lines(self.text)
        if not subset.enable_wildcard:
            found = found[:1]
        separator = subset.caption_separator
        if tags := separator.join(_filled_lines(self.tags)):
            found = [line + separator + tags for line in found] or [tags]
        return found or [""]


def render(
    caption: Caption, subset: Subset, *, rng: random.Random, epoch: int, step: int, max_steps: int
) -> str:
    """The prompt of one use of an image, "" when the caption is dropped.

    rng: the only source of randomness. epoch: counts from 1. step: optimizer steps done so far, of
    `max_steps`; only token warm-up reads them.
    """
    if is_dropped(subset, rng, epoch):
        return ""
    warmup = subset.token_warmup_step
    if warmup < 1:
        warmup = math.floor(warmup * max_steps)
    return _render_text(caption, subset, rng, (step, warmup) if step < warmup else None)


def variants(caption: Caption, subset: Subset, k: int, seed: int) -> list[str]:
    """Up to `k` renderings to encode once: all random parts except caption dropout and warm-up.

    One text when nothing is random. With tag dropout exactly `k` texts, drawn independently so that
    each has its right frequency (they may repeat). Otherwise distinct texts, `k` of them or as many
    as there are. A pure function of its arguments.
    """
    rng = seeded("variants", seed, caption.text, caption.tags)
    first = _render_text(caption, subset, rng)
    if k <= 1 or not is_random(subset, caption):
        return [first]
    if subset.caption_tag_dropout_rate > 0:
        return [first] + [_render_text(caption, subset, rng) for _ in range(k - 1)]
    found = {first: None}
    for _ in range(_TRIES * k):
        if len(found) == k:
            break
        found[_render_text(caption, subset, rng)] = None
    return list(found)


def is_dropped(subset: Subset, rng: random.Random, epoch: int) -> bool:
    """Whether this use trains without a caption (epochs count from 1).

    Draws from `rng` only when `caption_dropout_rate` is above 0 and the epoch does not decide.
    """
    every = subset.caption_dropout_every_n_epochs
    if every > 0 and epoch % every == 0:
        return True
    return subset.caption_dropout_rate > 0 and rng.random() < subset.caption_dropout_rate


def is_random(subset: Subset, caption: Caption) -> bool:
    """Whether two renderings can differ (caption dropout and warm-up aside)."""
    lines = caption.lines(subset)
    if len(set(lines)) > 1:
        return True
    text = _around(lines[0], subset)
    if subset.enable_wildcard:
        groups = (match[1] for match in _BRACES.finditer(text) if match[1])
        if any(len(set(group.split("|"))) > 1 for group in groups):
            return True
        text = _expand(text, random.Random(0))
    head, flexible, tail = _split_tags(text, subset)
    if subset.shuffle_caption and len(set(flexible)) > 1:
        return True
    # Dropping an empty tag shows only in the separators between it and others.
    is_lone = len(head + flexible + tail) < 2
    can_drop = any(flexible) or (bool(flexible) and not is_lone)
    return subset.caption_tag_dropout_rate > 0 and can_drop


def has_empty_tag(caption: Caption, subset: Subset) -> bool:
    """Whether an empty tag is among those that are shuffled or dropped."""
    if not (subset.shuffle_caption or subset.caption_tag_dropout_rate):
        return False
    tags = [_split_tags(_around(line, subset), subset) for line in caption.lines(subset)]
    return any("" in flexible and any(head + flexible) for head, flexible, _ in tags)


def _split_tags(text: str, subset: Subset) -> Tags:
    """Cut a text at its separators.

    With `keep_tokens_separator` in the text, head and tail are what it encloses and empty tags are
    removed; otherwise the head is the first `keep_tokens` tags and empty tags stay.
    """

    def cut(part: str) -> list[str]:
        return [tag.strip() for tag in part.split(subset.caption_separator)]

    keep = subset.keep_tokens_separator
    if keep and keep in text:
        head, flexible, *rest = text.split(keep)
        tail = subset.caption_separator.join(rest)
        head_tags, flexible_tags, tail_tags = (filter(None, cut(p)) for p in (head, flexible, tail))
        return list(head_tags), list(flexible_tags), list(tail_tags)
    tags = cut(text.strip())
    return tags[: subset.keep_tokens], tags[subset.keep_tokens :], []


def _render_text(
    caption: Caption, subset: Subset, rng: random.Random, warmup: Warmup = None
) -> str:
    lines = caption.lines(subset)
    text = _around(rng.choice(lines) if len(lines) > 1 else lines[0], subset)
    if subset.enable_wildcard:
        text = _expand(text, rng)
    is_arranged = subset.shuffle_caption or subset.caption_tag_dropout_rate > 0 or warmup
    keep = subset.keep_tokens_separator
    if is_arranged or (keep and keep in text):
        text = _arrange(_split_tags(text, subset), subset, rng, warmup)
    if subset.secondary_separator:
        text = text.replace(subset.secondary_separator, subset.caption_separator)
    return text


def _filled_lines(text: str) -> list[str]:
    return [line.strip() for line in _NEWLINE.split(text) if line.strip()]


def _around(line: str, subset: Subset) -> str:
    parts = (subset.caption_prefix, line, subset.caption_suffix)
    return " ".join(part for part in parts if part)


def _expand(text: str, rng: random.Random) -> str:
    """Replace each `{a|b}` by one alternative and `{{`, `}}` by single braces."""

    def chosen(match: re.Match) -> str:
        if match[1] is None:
            return match[0][0]
        alternatives = match[1].split("|")
        return rng.choice(alternatives) if len(alternatives) > 1 else alternatives[0]

    return _BRACES.sub(chosen, text)


def _arrange(tags: Tags, subset: Subset, rng: random.Random, warmup: Warmup) -> str:
    head, flexible, tail = tags
    if warmup:
        step, length = warmup
        least = subset.token_warmup_min
        flexible = flexible[: math.floor(step * (len(flexible) - least) / length) + least]
    if subset.shuffle_caption:
        rng.shuffle(flexible)
    if (rate := subset.caption_tag_dropout_rate) > 0:
        flexible = [tag for tag in flexible if rng.random() >= rate]
    separator = subset.caption_separator
    glue = separator if separator[-1].isspace() else separator + " "
    return glue.join([*head, *flexible, *tail])
