"""Grids: one or two settings that vary over the columns and rows of a labelled picture."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from anima_fast.errors import UserError
from anima_fast.sampling.prompts import MULTIPLE, Job

# Type, smallest and largest value of settings that are numbers.
NUMBERS: dict[str, tuple[Callable[[str], float], float, float]] = {
    "seed": (int, 0, 2**63 - 1),
    "steps": (int, 1, 10_000),
    "width": (int, MULTIPLE, 16384),
    "height": (int, MULTIPLE, 16384),
    "cfg": (float, 0, 1e6),
    "shift": (float, 1e-6, 1e6),
    "strength": (float, 1e-3, 1),
    "weight": (float, -1e6, 1e6),
}
GAP = 8
# Smallest height of letters, and their height as a share of a cell's width: a sheet of large cells
# is looked at from further away.
FONT_SIZE, FONT_PART = 16, 1 / 24


@dataclass(frozen=True)
class Axis:
    """A setting and its values.

    `index` is the LoRA file of weight1, weight2, ..., counted from 0, and for `lora` the first file
    of the axis; None stands for all files.
    """

    name: str
    values: tuple[Any, ...]
    index: int | None = None

    def apply(self, job: Job, value: Any) -> Job:
        """The job with this setting at a value."""
        if self.name == "prompt":
            return replace(job, text=job.text.replace(self.values[0], str(value)))
        if self.name == "lora":
            first = self.index or 0
            chosen = first + self.values.index(value)
            weights = (w if i == chosen or i < first else 0.0 for i, w in enumerate(job.weights))
            return replace(job, weights=tuple(weights))
        if self.name == "weight":
            weights = (value if self.index in (None, i) else w for i, w in enumerate(job.weights))
            return replace(job, weights=tuple(weights))
        return replace(job, **{self.name: value})

    def label(self, value: Any) -> str:
        """What is written next to a column or row."""
        if self.name == "prompt":
            return str(value)
        if self.name == "lora":
            return Path(str(value)).stem
        number = "" if self.index is None else self.index + 1
        return f"seed {value}" if self.name == "seed" else f"{self.name}{number} {value:g}"


def read_axes(words: Sequence[str], loras: int, texts: Sequence[str]) -> list[Axis]:
    """The axes of `--grid`, columns first; `UserError` for what is wrong with them.

    Args:
        words: such as weight=0,0.5,1, seed=1,2,3, prompt=cat|dog, lora=a.safetensors,b.safetensors.
        loras: number of LoRA files given by --lora.
        texts: the prompts, in which the first alternative of a prompt axis must be.
    """
    if len(words) > 2:
        raise UserError(f"--grid has {len(words)} axes: a picture has two, columns and rows")
    axes = [_axis(word, loras, texts) for word in words]
    if len(axes) == 2 and (axes[0].name, axes[0].index) == (axes[1].name, axes[1].index):
        raise UserError(f"--grid has {axes[0].name} twice: give another second axis")
    names = [axis.name for axis in axes]
    if "weight" in names and not loras and "lora" not in names:
        raise UserError("--grid weight needs a --lora")
    return axes


def _axis(word: str, loras: int, texts: Sequence[str]) -> Axis:
    name, equals, text = word.partition("=")
    name = name.strip()
    if not equals or not text.strip():
        raise UserError(f"--grid {word[:60]}: expected name=value,value, such as seed=1,2,3")
    if name == "prompt":
        values = tuple(part.strip() for part in text.split("|"))
        for prompt in texts:
            if not values[0] or values[0] not in prompt:
                raise UserError(
                    f"--grid prompt: {prompt[:60]!r} does not contain {values[0]!r}, which the "
                    "others replace: write prompt=WORD IN THE PROMPT|another|another"
                )
        return Axis(name, values)
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    if name == "lora":
        return Axis(name, parts, loras)
    index = None
    if name.startswith("weight") and name != "weight":
        number = name.removeprefix("weight")
        if not number.isdigit() or not 1 <= int(number) <= loras:
            raise UserError(f"--grid {name}: there are {loras} LoRA files, counted from weight1")
        name, index = "weight", int(number) - 1
    if name not in NUMBERS:
        known = ", ".join([*NUMBERS, "weight1", "prompt", "lora"])
        raise UserError(f"--grid {name} is unknown: use {known}")
    return Axis(name, tuple(_number(name, part) for part in parts), index)


def _number(name: str, text: str) -> float:
    kind, low, high = NUMBERS[name]
    try:
        value = kind(text)
    except ValueError:
        raise UserError(f"--grid {name}: {text[:40]!r} is not a number of this kind") from None
    # Written so that a NaN is refused too.
    if not low <= value <= high:
        raise UserError(f"--grid {name}: {text} is out of range: use {low:g} to {high:g}")
    if name in ("width", "height") and value % MULTIPLE:
        raise UserError(f"--grid {name}: {text} is not a multiple of {MULTIPLE}")
    return value


def expand(job: Job, axes: Sequence[Axis]) -> list[list[Job]]:
    """Rows of jobs: one column for each value of the first axis, one row for each of the second."""
    columns = [(axes[0], value) for value in axes[0].values]
    rows = [[(axes[1], value)] for value in axes[1].values] if len(axes) > 1 else [[]]
    return [[_cell(job, [column, *row]) for column in columns] for row in rows]


def _cell(job: Job, settings: Sequence[tuple[Axis, Any]]) -> Job:
    # Axes of one file are applied last: an axis of all files would overwrite them.
    for axis, value in sorted(settings, key=lambda setting: setting[0].index is not None):
        job = axis.apply(job, value)
    return replace(job, title=", ".join(axis.label(value) for axis, value in settings))


def compose(rows: Sequence[Sequence[Image.Image]], axes: Sequence[Axis]) -> Image.Image:
    """One sheet of all cells with a label for each column and row; cells keep their sizes."""
    widths = [max(row[i].width for row in rows) for i in range(len(rows[0]))]
    heights = [max(image.height for image in row) for row in rows]
    letter = max(FONT_SIZE, round(max(widths) * FONT_PART))
    font, side, space = ImageFont.load_default(letter), 9 * letter, letter // 4

    def wrapped(text: str, width: int) -> list[str]:
        # Lines that fit a width in pixels, by the average width of a letter.
        return textwrap.wrap(text, max(6, int(width / (letter * 0.56)))) or [""]

    tops = [wrapped(axes[0].label(v), w) for v, w in zip(axes[0].values, widths, strict=True)]
    sides = [wrapped(axes[1].label(v), side) for v in axes[1].values] if len(axes) > 1 else []
    # As wide as the longest line, not as the limit that it was wrapped at.
    widest = max((font.getlength(line) for lines in sides for line in lines), default=-GAP)
    left = math.ceil(widest) + 2 * GAP
    top = max(map(len, tops)) * round(1.4 * letter) + 2 * GAP
    size = (left + sum(widths) + GAP * len(widths), top + sum(heights) + GAP * len(heights))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    x = left
    for lines, width in zip(tops, widths, strict=True):
        draw.multiline_text((x, GAP), "\n".join(lines), fill="black", font=font, spacing=space)
        x += width + GAP
    y = top
    for i, row in enumerate(rows):
        if sides:
            draw.multiline_text(
                (GAP, y), "\n".join(sides[i]), fill="black", font=font, spacing=space
            )
        x = left
        for image, width in zip(row, widths, strict=True):
            sheet.paste(image, (x, y))
            x += width + GAP
        y += heights[i] + GAP
    return sheet
