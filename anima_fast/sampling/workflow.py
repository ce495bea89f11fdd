"""A picture's settings as ComfyUI's nodes, so that dropping the PNG into ComfyUI rebuilds them.

The nodes are those of ComfyUI's template for Anima in the API form ({number: {class_type,
inputs}}), which ComfyUI reads from the chunk `prompt`. Model files are named without folders:
ComfyUI asks for those it does not find under that name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anima_fast.sampling.jobs import Job
from anima_fast.sampling.pictures import unescape

# The shift that ComfyUI gives the model by itself.
OWN_SHIFT = 3.0


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
    """The JSON of the chunk `prompt`.

    Args:
        job: the picture.
        dit, qwen3, vae, init_image: paths of the files.
        loras: those that `job.weights` belong to; weight 0 leaves one out.
        weighted: whether parentheses were read as weights; ComfyUI always does.
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
    texts = (unescape(text) for text in (job.text, job.negative))
    if not weighted:
        texts = (re.sub(r"[()]", r"\\\g<0>", text) for text in texts)
    positive, negative = (add("CLIPTextEncode", text=text, clip=clip) for text in texts)
    if job.strength != 1 and init_image:
        image = add("LoadImage", image=Path(init_image).name)
        size = {"width": job.width, "height": job.height}
        image = add("ImageScale", image=image, upscale_method="lanczos", crop="center", **size)
        latent = add("VAEEncode", pixels=image, vae=decoder)
    else:
        latent = add("EmptyLatentImage", width=job.width, height=job.height, batch_size=1)
    samples = add(
        "KSampler", model=model, positive=positive, negative=negative, latent_image=latent,
        seed=job.seed, steps=job.steps, cfg=job.cfg, sampler_name="euler", scheduler="simple",
        denoise=job.strength,
    )  # fmt: skip
    image = add("VAEDecode", samples=samples, vae=decoder)
    add("SaveImage", images=image, filename_prefix="anima")
    # ASCII: ComfyUI's page reads the chunk as UTF-8, which a PNG's plain text is not.
    return json.dumps(nodes)
