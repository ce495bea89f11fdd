"""Content-addressed caches of latents and text encodings: one safetensors file for each.

    <image folder>/.anima_cache/STEM-<16 hex of key>.latents.safetensors
    <image folder>/.anima_cache/<key>.text.safetensors

The key is a SHA-256 over everything that the contents depend on (image bytes, sizes, caption,
model files, dtypes, `CACHE_VERSION`), so an edited image or caption gets a new file and nothing
else does. The file's metadata repeats the key and names its origin. Only real text rows are stored.
`cache_folders.py` decides where the files are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import torch
from safetensors.torch import load
from torch import Tensor

from anima_fast import files
from anima_fast.data.items import ImageItem
from anima_fast.errors import UserError
from anima_fast.models.vae import LATENT_CHANNELS, LATENT_SCALE

# Part of every key: raise it when the way of encoding changes.
CACHE_VERSION = 1

T = TypeVar("T")


class CacheError(Exception):
    """A cache file that cannot be used; the message says why. Never reaches the user as it is."""


@dataclass(frozen=True)
class LatentEntry:
    """One image: latents [16, h, w] fp32, the same of the mirrored image, alpha [H, W] uint8.

    Fields are named as the tensors of the file are, here and in `TextEntry`.
    """

    FORMAT: ClassVar[str] = "anima_fast.latents"
    latents: Tensor
    latents_flipped: Tensor | None = None
    alpha_mask: Tensor | None = None


@dataclass(frozen=True)
class TextEntry:
    """One caption: context [S, C], or Qwen3 states [N, C] with T5 ids [S] int64. No padding."""

    FORMAT: ClassVar[str] = "anima_fast.text"
    context: Tensor | None = None
    source_states: Tensor | None = None
    t5_ids: Tensor | None = None


class Stored(Generic[T]):
    """A cache entry: kept in memory, or read from its file at every access."""

    def __init__(self, path: Path, read: Callable[[Path], T], value: T | None = None) -> None:
        self.path, self._read, self._value = path, read, value

    def get(self) -> T:
        """The entry; `UserError` when its file was damaged or removed during the run."""
        if self._value is not None:
            return self._value
        try:
            return self._read(self.path)
        except CacheError as error:
            raise UserError(
                f"cache file {self.path} cannot be used ({error}): delete it and run again"
            ) from error


def digest(parts: Mapping[str, object]) -> str:
    """SHA-256 (hex) of named values; the order of the names does not matter."""
    text = json.dumps({"version": CACHE_VERSION, **parts}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def latent_key(item: ImageItem, *, image_sha256: str, vae: str, dtype: torch.dtype) -> str:
    """Key of an item's latent file, with the content hash of the VAE that computes in `dtype`."""
    subset = item.subset
    return digest(
        {
            "kind": "latents",
            "image": image_sha256,
            "bucket": item.bucket,
            "resized": item.resized,
            "interpolation": subset.resize_interpolation or "default",
            "crop": "center",
            "vae": vae,
            "dtype": str(dtype),
            "flip": subset.flip_aug,
            "alpha": subset.alpha_mask,
            **({"turned": True} if item.is_turned else {}),
        }
    )


def model_identity(path: str | Path) -> str:
    """Content hash of a model file, or of weights and configuration of a folder, if it exists."""
    path = Path(path)
    try:
        if not path.is_dir():
            return files.cached_sha256(path)
        parts = [file for file in path.iterdir() if file.suffix in (".safetensors", ".json")]
        return digest({part.name: files.cached_sha256(part) for part in parts})
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the path") from error


def write(path: Path, entry: LatentEntry | TextEntry, key: str, origin: dict[str, str]) -> None:
    """Write a cache file; `origin` is what `inspect` shows (image and sizes, caption, models)."""
    tensors = {name: tensor for name, tensor in vars(entry).items() if tensor is not None}
    metadata = {"format": entry.FORMAT, "version": str(CACHE_VERSION), "key": key, **origin}
    files.save_safetensors(tensors, path, metadata)


def check_latents(path: Path, key: str, item: ImageItem) -> None:
    """Raise `CacheError` unless the file is complete and its header that of the item's latents."""
    header = _checked_header(path, LatentEntry.FORMAT, key)
    width, height = item.bucket
    latent = [LATENT_CHANNELS, height // LATENT_SCALE, width // LATENT_SCALE]
    shapes = {"latents": latent}
    if item.subset.flip_aug:
        shapes["latents_flipped"] = latent
    if item.subset.alpha_mask:
        shapes["alpha_mask"] = [height, width]
    for name, shape in shapes.items():
        if header.get(name, {}).get("shape") != shape:
            raise CacheError(f"it holds no {name} of shape {shape}")


def check_text(path: Path, key: str, form: str) -> None:
    """Raise `CacheError` unless the file is complete and holds a text in that form."""
    header = _checked_header(path, TextEntry.FORMAT, key)
    wanted = ("context",) if form == "context" else ("source_states", "t5_ids")
    if any(name not in header for name in wanted):
        raise CacheError(f"it holds no {' and '.join(wanted)}")


def read_latents(path: Path) -> LatentEntry:
    """Read a latent file; `CacheError` when it is damaged or not finite."""
    tensors = _read(path, LatentEntry)
    if "latents" not in tensors:
        raise CacheError("it holds no latents")
    return LatentEntry(**tensors)


def read_text(path: Path) -> TextEntry:
    """Read a text file; `CacheError` when it is damaged or not finite."""
    entry = TextEntry(**_read(path, TextEntry))
    if entry.context is None and (entry.source_states is None or entry.t5_ids is None):
        raise CacheError("it holds no text encoding")
    return entry


def _checked_header(path: Path, format: str, key: str) -> dict:
    try:
        header = files.read_safetensors_header(path)
    except UserError as error:
        raise CacheError(str(error)) from error
    metadata = header.get("__metadata__") or {}
    if metadata.get("format") != format or metadata.get("key") != key:
        raise CacheError("it belongs to other contents")
    return header


def _read(path: Path, kind: type[LatentEntry | TextEntry]) -> dict[str, Tensor]:
    try:
        # Bytes, not a memory map: Windows cannot replace a file that is mapped.
        tensors = load(path.read_bytes())
    except OSError as error:
        raise CacheError(error.strerror or str(error)) from error
    # The safetensors library raises its own exception types for damaged files.
    except Exception as error:
        raise CacheError(f"damaged: {error}") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CacheError(f"its {name} is not finite")
    return {part.name: tensors[part.name] for part in fields(kind) if part.name in tensors}
