"""Pictures as files: names, the settings in their text chunks, and the one to start from.

A PNG says how it was made twice: in the chunk `parameters` as A1111 and its like write it, and in
the chunk `prompt` as ComfyUI's nodes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from anima_fast.data.images import to_8bit
from anima_fast.errors import UserError
from anima_fast.files import atomic_write, check_folder
from anima_fast.memory.free import free_memory
from anima_fast.models.vae_checkpoint import load_vae
from anima_fast.sampling.prompts import Job, unescape

# The shift that ComfyUI gives the model by default.
OWN_SHIFT = 3.0


class PicturePaths:
    """Names of the files of a command; several are numbered on from those that exist.

    `output` is a .png file, or a folder (one that exists, or a name without an ending); there will
    be `count` pictures, perhaps cells of a grid. Raises `UserError` for a name that is not a
    picture, or a folder that cannot be written.
    """

    def __init__(self, output: str, count: int, *, grid: bool = False) -> None:
        path = Path(output)
        self.is_folder = path.is_dir() or not path.suffix or output.endswith(("/", "\\"))
        if not self.is_folder and path.suffix.lower() != ".png":
            raise UserError(f"--output {output}: give the name of a .png file or of a folder")
        self.folder = path if self.is_folder else path.parent
        self.path, self.single = path, count == 1 and not grid and not self.is_folder
        self.stem = "" if self.is_folder else f"{path.stem}_"
        check_folder(self.folder)
        self.first = self._next(rf"{re.escape(self.stem)}(\d+)\.png")
        self.first_grid = self._next(rf"{re.escape(self.stem)}grid(\d+)\.png")

    def picture(self, number: int) -> Path:
        """The file of a picture."""
        if self.single:
            return self.path
        return self.folder / f"{self.stem}{self.first + number:04d}.png"

    def grid(self, number: int) -> Path:
        """The file of a grid; a single one of a named file has that name."""
        if not self.is_folder and number == 0:
            return self.path
        return self.folder / f"{self.stem}grid{self.first_grid + number:04d}.png"

    def _next(self, pattern: str) -> int:
        names = (re.fullmatch(pattern, path.name) for path in self.folder.glob("*.png"))
        return max((int(match[1]) + 1 for match in names if match), default=0)


def picture_size(path: str) -> tuple[int, int]:
    """Width and height of a picture, turned upright; `UserError` when it cannot be read."""
    return _open(path).size


def load_start(
    path: str,
    vae: str,
    sizes: Collection[tuple[int, int]],
    *,
    device: torch.device,
    chunk_rows: int | None = None,
) -> dict[tuple[int, int], Tensor]:
    """Latents [1, 16, 1, h, w] float32 on the CPU for each (width, height) in pixels.

    The picture is scaled to cover the size and its centre is taken. The VAE is loaded and freed.
    """
    picture = _open(path)
    model = load_vae(vae, device=device, dtype=torch.float32)
    found = {}
    for size in sizes:
        fitted = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
        array = np.asarray(fitted, np.float32) / 127.5 - 1
        pixels = torch.from_numpy(array.transpose(2, 0, 1).copy())[None].to(device)
        latents = model.encode(pixels, chunk_rows=chunk_rows)
        found[size] = latents[:, :, None].float().cpu()
    del model
    free_memory(device, keep_cached=False)
    return found


def _open(path: str) -> Image.Image:
    """The picture to start from, turned upright, in RGB."""
    try:
        with Image.open(path) as image:
            return to_8bit(ImageOps.exif_transpose(image)).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"--init_image {path} does not exist: check the path") from None
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"--init_image {path} is not a readable picture ({reason})") from None


def to_image(pixels: Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] as a picture, rounded to the nearest of 256 levels."""
    levels = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())


def save_png(path: Path, image: Image.Image, parameters: str, prompt: str | None = None) -> None:
    """Write a PNG atomically, with text chunks that image programs read.

    parameters: for A1111 and its like. prompt: ComfyUI's nodes as JSON.
    """
    info = PngImagePlugin.PngInfo()
    # PIL writes text that is not Latin-1 as an international chunk.
    info.add_text("parameters", parameters)
    if prompt is not None:
        info.add_text("prompt", prompt)
    with atomic_write(path) as file:
        image.save(file, "PNG", pnginfo=info)


def generation_parameters(job: Job, model: str, loras: Sequence[str] = ()) -> str:
    """The settings of a picture as A1111 and its like write them, in three parts of text.

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


def comfyui_prompt(
    job: Job,
    *,
    dit: str,
    qwen3: str,
    vae: str,
    loras: Sequence[str] = (),
    init_image: str | None = None,
    weighted: bool = True,
) -> str:
    """The JSON of ComfyUI's nodes, so that dropping the PNG into ComfyUI rebuilds the graph.

    The nodes are those of ComfyUI's template for Anima in the API form ({number: {class_type,
    inputs}}). Model files are named without folders: ComfyUI asks for those that it does not have.
    `job.weights` belong to `loras`, where 0 omits one. `weighted`: parentheses were read as
    weights, as ComfyUI always does.
    """
    nodes: dict[str, dict[str, Any]] = {}

    def add(kind: str, **inputs: Any) -> list:
        number = str(len(nodes) + 1)
        nodes[number] = {"class_type": kind, "inputs": inputs}
        return [number, 0]

    model = add("UNETLoader", unet_name=Path(dit).name, weight_dtype="default")
    clip = add("CLIPLoader", clip_name=Path(qwen3).name, type="stable_diffusion", device="default")
    decoder = add("VAELoader", vae_name=Path(vae).name)
    for path, weight in zip(loras, job.weights, strict=True):
        if weight:
            strengths = {"strength_model": weight, "strength_clip": weight}
            name = Path(path).name
            model = add("LoraLoader", lora_name=name, model=model, clip=clip, **strengths)
            clip = [model[0], 1]
    if job.shift != OWN_SHIFT:
        model = add("ModelSamplingAuraFlow", model=model, shift=job.shift)
    texts = [unescape(text) for text in (job.text, job.negative)]
    if not weighted:
        texts = [re.sub(r"[()]", r"\\\g<0>", text) for text in texts]
    positive, negative = (add("CLIPTextEncode", text=text, clip=clip) for text in texts)
    size = {"width": job.width, "height": job.height}
    if job.strength != 1 and init_image:
        image = add("LoadImage", image=Path(init_image).name)
        image = add("ImageScale", image=image, upscale_method="lanczos", crop="center", **size)
        latent = add("VAEEncode", pixels=image, vae=decoder)
    else:
        latent = add("EmptyLatentImage", **size, batch_size=1)
    samples = add(
        "KSampler", model=model, positive=positive, negative=negative, latent_image=latent,
        seed=job.seed, steps=job.steps, cfg=job.cfg, sampler_name="euler", scheduler="simple",
        denoise=job.strength,
    )  # fmt: skip
    image = add("VAEDecode", samples=samples, vae=decoder)
    add("SaveImage", images=image, filename_prefix="anima")
    # ASCII: ComfyUI reads the chunk as UTF-8, which plain text in a PNG is not.
    return json.dumps(nodes)
