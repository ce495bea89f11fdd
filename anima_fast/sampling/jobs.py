"""What is to be rendered: one `Job` a picture, from the options of `anima-fast sample`."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from anima_fast.errors import UserError
from anima_fast.sampling.prompts import Prompt, read_prompts, say_ignored

if TYPE_CHECKING:
    from anima_fast.options.sample import SampleOptions

SIDE = 1024
MULTIPLE = 16


@dataclass(frozen=True)
class Job:
    """One picture.

    Attributes:
        text, negative: prompts, escapes not yet replaced.
        width, height: in pixels.
        strength: of image to image; 1 starts from noise.
        weights: of the LoRA files, in their order; 0 leaves one out.
        title: of the cell in a grid.
    """

    text: str
    negative: str
    seed: int
    steps: int
    cfg: float
    shift: float
    width: int
    height: int
    strength: float = 1.0
    weights: tuple[float, ...] = ()
    title: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts that need encoding."""
        return (self.text,) if self.cfg == 1 else (self.text, self.negative)

    def goes_with(self, other: Job) -> bool:
        """Whether both can be made in one batch: they differ in seed and title only."""
        return replace(self, seed=other.seed, title=other.title) == other


def make_jobs(
    options: SampleOptions,
    weights: Sequence[float],
    image_size: tuple[int, int] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Job]:
    """The pictures of all prompts, `count` of each with seeds that follow each other.

    Args:
        options: of the command.
        weights: of the LoRA files.
        image_size: width and height of the picture to start from.
        say: gets notices.

    Raises:
        UserError: a file of prompts that cannot be read, or prompts that are not supported.
    """
    if options.prompt and options.prompts:
        raise UserError("--prompt and --prompts exclude each other: put the text into the file")
    first = secrets.randbelow(2**32) if options.seed is None else options.seed
    width, height = image_size or (SIDE, SIDE)
    width, height = (max(MULTIPLE, side // MULTIPLE * MULTIPLE) for side in (width, height))
    defaults = Prompt(
        options.prompt,
        options.negative_prompt,
        options.width or width,
        options.height or height,
        None,
        options.steps,
        options.cfg,
        options.shift,
    )
    prompts = read_prompts(options.prompts, defaults) if options.prompts else [defaults]
    say_ignored(prompts, say)
    return [
        Job(
            prompt.text,
            prompt.negative,
            (first if prompt.seed is None else prompt.seed) + i,
            prompt.steps,
            prompt.cfg,
            prompt.shift,
            prompt.width,
            prompt.height,
            options.strength,
            tuple(weights),
        )
        for prompt in prompts
        for i in range(options.count)
    ]


def batches(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    """Neighbours that can be made together, at most `size` each."""
    found: list[list[Job]] = []
    for job in jobs:
        if found and len(found[-1]) < size and found[-1][0].goes_with(job):
            found[-1].append(job)
        else:
            found.append([job])
    return found
