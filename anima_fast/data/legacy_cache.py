"""Caches that sd-scripts has left next to the images: read, never written.

    STEM_WWWWxHHHH_anima.npz (W, H: size of the image file)
        latents_{h}x{w}, latents_flipped_{h}x{w}: [16, h, w] or [16, 1, h, w] fp32
        alpha_mask_{h}x{w}: [H, W] fp32 0..1
    STEM_anima_te.npz
        prompt_embeds [512, C], attn_mask, t5_input_ids, t5_attn_mask [512]
        caption_dropout_rate: ignored, dropout is decided at train time

Neither file says which image, caption or model it was made from.
"""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anima_fast.data.cache import CacheError, LatentEntry, TextEntry
from anima_fast.data.items import ImageItem
from anima_fast.models.vae import LATENT_CHANNELS, LATENT_SCALE

# What numpy raises for changed bytes: its header is Python source in a zip file.
_DAMAGE = (
    OSError, ValueError, KeyError, EOFError, SyntaxError, MemoryError, RuntimeError,
    tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_TEXT_NAMES = ("prompt_embeds", "attn_mask", "t5_input_ids", "t5_attn_mask")


def latents_path(item: ImageItem) -> Path:
    """Where sd-scripts keeps the latents of an image."""
    width, height = item.size
    return item.path.with_name(f"{item.path.stem}_{width:04d}x{height:04d}_anima.npz")


def text_path(image: Path) -> Path:
    """Where sd-scripts keeps the text encoding of an image's caption."""
    return image.with_name(f"{image.stem}_anima_te.npz")


def read_latents(path: Path, item: ImageItem) -> LatentEntry:
    """The latents for the item's bucket.

    Raises `CacheError` when the file is damaged, was made for another size or lacks the mirrored
    latents or the alpha mask that the item's subset asks for.
    """
    width, height = item.bucket
    h, w = height // LATENT_SCALE, width // LATENT_SCALE
    try:
        with np.load(path, allow_pickle=False) as archive:
            latents = _latent(archive, f"latents_{h}x{w}", h, w)
            flipped = alpha = None
            if item.subset.flip_aug:
                flipped = _latent(archive, f"latents_flipped_{h}x{w}", h, w)
            if item.subset.alpha_mask:
                alpha = _alpha(archive, f"alpha_mask_{h}x{w}", height, width)
    except _DAMAGE as error:
        raise CacheError(_reason(error)) from error
    return LatentEntry(latents, flipped, alpha)


def read_text(path: Path) -> tuple[TextEntry, int]:
    """Qwen3 states [N, C] and T5 ids [S] without padding, and the count N of Qwen3 tokens.

    Raises `CacheError` when the file is damaged or incomplete.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            states, mask, ids, t5_mask = (np.asarray(archive[name]) for name in _TEXT_NAMES)
            if states.ndim != 2 or len(states) != mask.size or ids.shape != t5_mask.shape:
                raise ValueError(f"prompt_embeds of shape {states.shape}")
            count = int(mask.astype(bool).sum())
            kept = torch.from_numpy(np.ascontiguousarray(states[:count], np.float32))
            ids = torch.from_numpy(np.asarray(ids.reshape(-1)[t5_mask.reshape(-1) != 0], np.int64))
    except _DAMAGE as error:
        raise CacheError(_reason(error)) from error
    if not torch.isfinite(kept).all():
        raise CacheError("its prompt_embeds are not finite")
    return TextEntry(source_states=kept, t5_ids=ids), count


def _latent(archive: np.lib.npyio.NpzFile, name: str, h: int, w: int) -> Tensor:
    array = np.asarray(archive[name], np.float32)
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    if array.shape != (LATENT_CHANNELS, h, w):
        raise ValueError(f"{name} has the shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} is not finite")
    return torch.from_numpy(np.ascontiguousarray(array))


def _alpha(archive: np.lib.npyio.NpzFile, name: str, height: int, width: int) -> Tensor:
    array = np.asarray(archive[name], np.float32)
    if array.shape != (height, width):
        raise ValueError(f"{name} has the shape {array.shape}")
    return torch.from_numpy(np.rint(np.nan_to_num(array) * 255).clip(0, 255).astype(np.uint8))


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it holds no {str(error.args[0]).split(' ')[0]}" if error.args else "incomplete"
    return " ".join(str(error).split())[:120] or type(error).__name__
