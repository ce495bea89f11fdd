"""How many tokens the captions of a run have, and which of them are longer than the limits.

Anima's text has 512 rows. With `long_captions cut` what comes after them is not trained; with
`whole` every token is encoded and the rows grow beyond 512, as ComfyUI does with a long prompt.
Either way the user is told once, at the start.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from anima_fast.data import captions
from anima_fast.data.items import ImageItem
from anima_fast.data.layouts import some
from anima_fast.models.dit_config import TEXT_ROWS
from anima_fast.models.tokenizers import Tokenizers
from anima_fast.options.data import CaptionOptions
from anima_fast.options.run import AnyRun

# Files that a message names.
_NAMED = 10
# Renderings do not depend on the run's seed: another seed should not need new encodings.
_VARIANT_SEED = 0


@dataclass(frozen=True)
class Lengths:
    """Tokens of one text: of Qwen3, and of T5 with its end mark."""

    qwen: int
    t5: int

    @property
    def longest(self) -> int:
        """The larger of the two."""
        return max(self.qwen, self.t5)

    def beyond(self, limits: tuple[int, int]) -> int:
        """Tokens above the limits (Qwen3, T5), the larger count of the two."""
        return max(0, self.qwen - limits[0], self.t5 - limits[1])


@dataclass(frozen=True)
class LongCaption:
    """A caption above the limits: the file that holds it, its tokens, and those above them."""

    file: Path
    tokens: int
    beyond: int


@dataclass(frozen=True)
class CaptionTokens:
    """Token counts of all renderings of a run's captions, and the captions that are long.

    limits: tokens of Qwen3 and T5 above which a caption is long. whole: it is not cut off.
    """

    lengths: Mapping[str, Lengths]
    long: list[LongCaption]
    limits: tuple[int, int]
    whole: bool

    def notices(self) -> list[str]:
        """What the user should know: which captions are long, and what becomes of them."""
        if not self.long:
            return []
        qwen, t5 = self.limits
        limit = f"{qwen} tokens" if qwen == t5 else f"{qwen} Qwen3 or {t5} T5 tokens"
        who = "1 caption has" if len(self.long) == 1 else f"{len(self.long)} captions have"
        if self.whole:
            named = some([f"{c.file.name}: {c.tokens}" for c in self.long], _NAMED)
            return [f"{who} more than {limit}, encoded whole ({named})"]
        named = some([f"{c.file.name}: {c.tokens}, {c.beyond} lost" for c in self.long], _NAMED)
        return [
            f"{who} more than {limit}, cut off there ({named}): shorten them, or use "
            "--long_captions whole"
        ]


def renderings(items: Iterable[ImageItem], options: CaptionOptions) -> list[list[str]]:
    """The texts of each item's caption that are encoded once; see `captions.variants`."""
    k = options.caption_variants
    return [captions.variants(item.caption, item.subset, k, _VARIANT_SEED) for item in items]


def count_tokens(
    items: Sequence[ImageItem],
    texts: Sequence[Sequence[str]],
    tokenizers: Tokenizers,
    options: AnyRun,
) -> CaptionTokens:
    """Count the tokens of every text: the renderings of each item's caption.

    The longest rendering of a caption counts. Those that are encoded whole are long above Anima's
    own rows, others above the options' limits.
    """
    whole = options.long_captions == "whole"
    distinct = list(dict.fromkeys(text for rendered in texts for text in rendered))
    counts = zip(tokenizers.qwen_lengths(distinct), tokenizers.t5_lengths(distinct), strict=True)
    lengths = {text: Lengths(*pair) for text, pair in zip(distinct, counts, strict=True)}
    limits = (TEXT_ROWS, TEXT_ROWS) if whole else options.token_limits
    long: dict[Path, LongCaption] = {}
    for item, rendered in zip(items, texts, strict=True):
        worst = max((lengths[text] for text in rendered), key=lambda one: one.beyond(limits))
        if worst.beyond(limits):
            file = item.caption.file or item.path
            long[file] = LongCaption(file, worst.longest, worst.beyond(limits))
    ordered = sorted(long.values(), key=lambda caption: -caption.tokens)
    return CaptionTokens(lengths, ordered, limits, whole)
