"""Prompts with their settings, as sd-scripts writes them, and the pictures that are made of them.

A text file has one prompt a line; `#` begins a comment; settings follow the text:

    --n negative prompt   --w width   --h height   --d seed   --s steps   --l guidance   --fs shift

A TOML file has `[prompt]` with settings for all and `[[prompt.subset]]` with those of each prompt,
which win; a JSON file is a list of such tables or of text lines. Settings that are not given are
those of ComfyUI's template for Anima (30 steps, guidance 4, shift 3), not those of sd-scripts.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from anima_fast.errors import UserError
from anima_fast.files import parse_config
from anima_fast.options.output import PreviewOptions
from anima_fast.options.sample import SampleOptions

# Flag -> field, with its type.
FLAGS = {
    "n": ("negative", str), "w": ("width", int), "h": ("height", int), "d": ("seed", int),
    "s": ("steps", int), "l": ("cfg", float), "fs": ("shift", float),
}  # fmt: skip
# Numbers that a setting may have; of sides, other ones are rounded.
GOOD: dict[str, Callable[[float], bool]] = {
    "steps": lambda value: 1 <= value <= 10000,
    "cfg": lambda value: 0 <= value < float("inf"),
    "shift": lambda value: 0 < value < float("inf"),
    "seed": lambda value: 0 <= value < 2**63,
}
# Key of a table -> flag.
KEYS = {
    "negative_prompt": "n", "width": "w", "height": "h", "seed": "d", "sample_steps": "s",
    "scale": "l", "flow_shift": "fs",
}  # fmt: skip
# Settings of other models, and the sampler, which is always Euler here.
IGNORED = ("g", "ss", "cn", "ctr", "ctd", "l2", "cg", "f", "am", "ow", "of", "rsh")
IGNORED_KEYS = ("sample_sampler", "guidance_scale", "controlnet_image", "enum", "prompt_dict")
SIDE = 1024
LEAST_SIDE = 64
MULTIPLE = 16
ESCAPES = re.compile(r"\\n|\\t|(?:\\u[0-9a-fA-F]{4})+")


@dataclass(frozen=True)
class Prompt:
    """A prompt with its settings.

    Attributes:
        text, negative: what to show and what to avoid, escapes not yet replaced.
        width, height: in pixels, multiples of 16.
        seed: None means drawn each time.
        steps, cfg, shift: of the sampler; cfg 1 makes no second pass.
        ignored: settings that have no effect on Anima.

    Raises `UserError` for textual inversion.
    """

    text: str
    negative: str = ""
    width: int = 1024
    height: int = 1024
    seed: int | None = None
    steps: int = 30
    cfg: float = 4.0
    shift: float = 3.0
    ignored: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if "embedding:" in self.text or "embedding:" in self.negative:
            raise UserError(
                "textual inversion is not supported for Anima: remove embedding:... from the prompt"
            )

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts that need encoding."""
        return (self.text,) if self.cfg == 1 else (self.text, self.negative)


def read_prompts(path: str | Path, defaults: Prompt | None = None) -> list[Prompt]:
    """The prompts of a .txt, .toml or .json file; `defaults` are settings that they do not give.

    Raises `UserError` for a file that cannot be read or holds none, or a wrong setting, with its
    line.
    """
    prompts = list(_read(Path(path), defaults or Prompt("")))
    if not prompts:
        raise UserError(f"{path} holds no prompts: write one per line")
    return prompts


def _read(path: Path, defaults: Prompt) -> Iterable[Prompt]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read the prompts {path}: {error.strerror or error}") from None
    suffix = path.suffix.lower()
    if suffix not in (".txt", ".toml", ".json"):
        raise UserError(f"{path}: prompts must be in a .txt, .toml or .json file: rename it")
    if suffix == ".txt":
        lines = ((i, line.strip()) for i, line in enumerate(text.splitlines(), 1))
        return [
            parse_prompt(line, defaults, f"{path}, line {i}")
            for i, line in lines
            if line and not line.startswith("#")
        ]
    return _from_tables(parse_config(text, path, suffix[1:].upper()), defaults, str(path))


def parse_prompt(line: str, defaults: Prompt | None = None, where: str = "prompt") -> Prompt:
    """One prompt followed by its settings.

    Raises `UserError` for a setting that cannot be read.
    """
    # A flag is one to three letters between spaces or before "=": dashes inside words are text.
    text, *found = re.split(r"(?:^|\s)--([a-z][a-z0-9]{0,2})(?==|\s|$)", line, flags=re.I)
    prompt = replace(defaults or Prompt(""), text=text.strip())
    for name, value in zip(found[::2], found[1::2], strict=True):
        prompt = _with(prompt, name.lower(), value.removeprefix("=").strip(), where)
    return prompt


def unescape(prompt: str) -> str:
    r"""Replace \n, \t and \uXXXX by their characters; all other text stays unchanged."""

    def replace(match: re.Match) -> str:
        word = match[0]
        if word in (r"\n", r"\t"):
            return "\n" if word == r"\n" else "\t"
        units = bytes.fromhex(word.replace(r"\u", ""))
        try:
            # Two surrogates make one character; a lone one is not text.
            return units.decode("utf-16-be")
        except UnicodeDecodeError:
            return word

    return ESCAPES.sub(replace, prompt)


def say_ignored(prompts: Sequence[Prompt], say: Callable[[str], None]) -> None:
    """Report settings that have no effect."""
    ignored = sorted({name for prompt in prompts for name in prompt.ignored})
    if ignored:
        say(f"without effect on Anima, in the prompts: {', '.join(ignored)}")


def collect_prompts(options: PreviewOptions) -> list[Prompt]:
    """The prompts of the file and of the command line; raises `UserError` for wrong ones."""
    prompts = read_prompts(options.sample_prompts) if options.sample_prompts else []
    return prompts + [parse_prompt(text, where="--sample_prompt") for text in options.sample_prompt]


def _from_tables(content: Any, defaults: Prompt, where: str) -> Iterable[Prompt]:
    if isinstance(content, Mapping):
        shared = content.get("prompt", content)
        if not isinstance(shared, Mapping):
            raise UserError(
                f"{where}: expected a list of prompts, or a table [prompt] with [[prompt.subset]]"
            )
        entries = shared.get("subset", [])
        rest = {key: value for key, value in shared.items() if key != "subset"}
        if not entries and "prompt" in rest:
            entries = [{}]
    else:
        entries, rest = content, {}
    if not isinstance(entries, list):
        raise UserError(f"{where}: expected a list of prompts")
    for i, entry in enumerate(entries, 1):
        place = f"{where}, prompt {i}"
        if isinstance(entry, str):
            yield parse_prompt(entry, defaults, place)
        elif isinstance(entry, Mapping):
            yield _from_table({**rest, **entry}, defaults, place)
        else:
            raise UserError(f"{place}: expected a table or a line of text")


def _from_table(table: Mapping[str, Any], defaults: Prompt, where: str) -> Prompt:
    if not isinstance(table.get("prompt"), str):
        raise UserError(f"{where}: prompt is missing: give the text")
    prompt = replace(defaults, text=table["prompt"].strip())
    for key, value in table.items():
        # A null of JSON means: not given.
        if key in KEYS and value is not None:
            prompt = _with(prompt, KEYS[key], str(value), where)
        elif key in IGNORED_KEYS:
            prompt = replace(prompt, ignored=(*prompt.ignored, key))
        elif key not in ("prompt", *KEYS):
            raise UserError(f"{where}: {key} is unknown: use prompt, {', '.join(KEYS)}")
    return prompt


def _with(prompt: Prompt, flag: str, value: str, where: str) -> Prompt:
    """The prompt with one more setting."""
    if flag in IGNORED:
        return replace(prompt, ignored=(*prompt.ignored, f"--{flag}"))
    if flag not in FLAGS:
        known = ", ".join(f"--{name}" for name in FLAGS)
        raise UserError(f"{where}: --{flag} is unknown: use {known}")
    name, kind = FLAGS[flag]
    try:
        parsed = kind(value)
    except ValueError:
        raise UserError(f"{where}: --{flag} {value[:40]!r} is not a number") from None
    if name in ("width", "height"):
        parsed = max(LEAST_SIDE, parsed // MULTIPLE * MULTIPLE)
        if parsed > 16384:
            raise UserError(f"{where}: --{flag} {value} is out of range: use at most 16384")
    if name in GOOD and not GOOD[name](parsed):
        raise UserError(f"{where}: --{flag} {value} is out of range")
    return replace(prompt, **{name: parsed})


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
    def of(cls, prompt: Prompt, seed: int, strength: float = 1.0) -> Job:
        """The picture of a prompt."""
        return cls(**{**vars(prompt), "seed": seed, "strength": strength})


def make_jobs(
    options: SampleOptions,
    image_size: tuple[int, int] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Job]:
    """The pictures of all prompts of `sample`, `count` of each with consecutive seeds.

    `image_size` is width and height of the picture to start from. Raises `UserError` for prompts
    that cannot be read or are not supported.
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
    return [
        Job.of(prompt, (first if prompt.seed is None else prompt.seed) + i, options.strength)
        for prompt in prompts
        for i in range(options.count)
    ]


def batches(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    """Neighbours that differ in seed and title only, at most `size` in each batch."""
    found: list[list[Job]] = []
    for job in jobs:
        last = found[-1] if found else []
        if 0 < len(last) < size and replace(last[0], seed=job.seed, title=job.title) == job:
            last.append(job)
        else:
            found.append([job])
    return found
