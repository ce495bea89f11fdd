"""The picture that image to image starts from."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from anima_fast.data.images import to_8bit
from anima_fast.errors import UserError
from anima_fast.memory.free import free_memory
from anima_fast.models.vae_checkpoint import load_vae

if TYPE_CHECKING:
    from anima_fast.options.sample import SampleOptions


def picture_size(path: str) -> tuple[int, int]:
    """Width and height of a picture, turned upright; `UserError` when it cannot be read."""
    return _open(path).size


def load_start(
    options: SampleOptions, sizes: Collection[tuple[int, int]], device: torch.device
) -> dict[tuple[int, int], Tensor]:
    """Latents [1, 16, 1, h, w] float32 on the CPU for each (width, height) in pixels.

    The picture is scaled to cover the size and its centre is taken. The VAE is loaded and freed.
    """
    picture = _open(options.init_image)
    vae = load_vae(options.vae, device=device, dtype=torch.float32)
    found = {}
    for size in sizes:
        fitted = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
        array = np.asarray(fitted, np.float32) / 127.5 - 1
        pixels = torch.from_numpy(array.transpose(2, 0, 1).copy())[None].to(device)
        latents = vae.encode(pixels, chunk_rows=options.vae_chunk_size)
        found[size] = latents[:, :, None].float().cpu()
    del vae
    free_memory(device, keep_cached=False)
    return found


def _open(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return to_8bit(ImageOps.exif_transpose(image)).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"--init_image {path} does not exist: check the path") from None
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"--init_image {path} is no readable picture ({reason})") from None
