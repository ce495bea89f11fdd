"""Prompts as they are typed, and pictures with the text that says how they were made."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from anima_fast.files import atomic_write

if TYPE_CHECKING:
    from anima_fast.sampling.jobs import Job

ESCAPES = re.compile(r"\\n|\\t|(?:\\u[0-9a-fA-F]{4})+")


def unescape(prompt: str) -> str:
    r"""Replace \n, \t and \uXXXX by what they stand for; all other text stays as it is."""

    def replace(match: re.Match) -> str:
        word = match[0]
        if word in (r"\n", r"\t"):
            return "\n" if word == r"\n" else "\t"
        units = bytes.fromhex(word.replace(r"\u", ""))
        try:
            # Pairs of surrogates make one character; a lone one is no text.
            return units.decode("utf-16-be")
        except UnicodeDecodeError:
            return word

    return ESCAPES.sub(replace, prompt)


def to_image(pixels: Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] as a picture, rounded to the nearest of 256 levels."""
    levels = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())


def describe(job: Job, model: str, loras: Sequence[str] = ()) -> str:
    """How a picture was made, in the three-part text that image programs read.

    model: path of the DiT. loras: paths of the LoRA files that `job.weights` belong to.
    """
    facts = {
        "Steps": job.steps,
        "Sampler": "Euler",
        "CFG scale": f"{job.cfg:g}",
        "Seed": job.seed,
        "Size": f"{job.width}x{job.height}",
        "Shift": f"{job.shift:g}",
        "Model": _quoted(Path(model).stem),
    }
    if job.strength != 1:
        facts["Denoising strength"] = f"{job.strength:g}"
    if loras:
        pairs = zip(loras, job.weights, strict=True)
        facts["LoRA"] = _quoted("; ".join(f"{Path(path).stem}:{w:g}" for path, w in pairs))
    lines = [unescape(job.text)]
    if job.cfg != 1:
        lines.append(f"Negative prompt: {unescape(job.negative)}")
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in facts.items())])


def _quoted(text: str) -> str:
    """Commas separate the facts; one in a value needs quotes, as A1111 writes them."""
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',"\n') else text


def save_png(path: Path, image: Image.Image, parameters: str, prompt: str | None = None) -> None:
    """Write a PNG atomically, with text chunks that image programs read.

    parameters: for A1111 and its like. prompt: ComfyUI's nodes as JSON.
    """
    info = PngImagePlugin.PngInfo()
    # Text that is not Latin-1 becomes an international chunk by itself.
    info.add_text("parameters", parameters)
    if prompt is not None:
        info.add_text("prompt", prompt)
    with atomic_write(path) as file:
        image.save(file, "PNG", pnginfo=info)
