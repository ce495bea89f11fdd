"""What to render: one `Job` for each picture, from the options of `anima-fast sample`."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from anima_fast.errors import UserError
from anima_fast.options.sample import SampleOptions
from anima_fast.sampling.prompts import MULTIPLE, Prompt, read_prompts, say_ignored

SIDE = 1024


@dataclass(frozen=True)
class Job(Prompt):
    """One picture: a prompt whose seed is drawn, and what only `sample` has.

    Attributes:
        strength: of image to image; 1 starts from noise.
        weights: of the LoRA files, in their order; 0 omits one.
        title: of the cell in a grid.
    """

    seed: int = 0
    strength: float = 1.0
    weights: tuple[float, ...] = ()
    title: str = ""

    @classmethod
    def of(cls, prompt: Prompt, seed: int, **more: Any) -> Job:
        """The picture of a prompt; `more` are strength and weights."""
        return cls(**{**vars(prompt), "seed": seed, **more})

    def goes_with(self, other: Job) -> bool:
        """Whether both fit into one batch: they differ in seed and title only."""
        return replace(self, seed=other.seed, title=other.title) == other


def make_jobs(
    options: SampleOptions,
    weights: Sequence[float],
    image_size: tuple[int, int] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Job]:
    """The pictures of all prompts, `count` of each with consecutive seeds.

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
        steps=options.steps,
        cfg=options.cfg,
        shift=options.shift,
    )
    prompts = read_prompts(options.prompts, defaults) if options.prompts else [defaults]
    say_ignored(prompts, say)
    shared: dict[str, Any] = {"strength": options.strength, "weights": tuple(weights)}
    return [
        Job.of(prompt, (first if prompt.seed is None else prompt.seed) + i, **shared)
        for prompt in prompts
        for i in range(options.count)
    ]


def batches(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    """Neighbours that can be rendered together, at most `size` in each batch."""
    found: list[list[Job]] = []
    for job in jobs:
        if found and len(found[-1]) < size and found[-1][0].goes_with(job):
            found[-1].append(job)
        else:
            found.append([job])
    return found
