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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors.torch import load
from torch import Tensor

from anima_fast import files
from anima_fast.data.items import ImageItem
from anima_fast.errors import UserError
from anima_fast.models.vae import LATENT_CHANNELS, LATENT_SCALE

# Part of every key: raise it when the way of encoding changes.
CACHE_VERSION = 1
LATENTS_FORMAT, TEXT_FORMAT = "anima_fast.latents", "anima_fast.text"

T = TypeVar("T")


class CacheError(Exception):
    """A cache file that cannot be used; the message says why. Never reaches the user as it is."""


@dataclass(frozen=True)
class LatentEntry:
    """One image: latents [16, h, w] fp32, the same of the mirrored image, alpha [H, W] uint8."""

    latents: Tensor
    flipped: Tensor | None = None
    alpha: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The parts that exist, under their names in the file."""
        named = {"latents": self.latents, "latents_flipped": self.flipped, "alpha_mask": self.alpha}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True)
class TextEntry:
    """One caption: context [S, C], or Qwen3 states [N, C] with T5 ids [S] int64. No padding."""

    context: Tensor | None = None
    source_states: Tensor | None = None
    t5_ids: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The parts that exist, under their names in the file."""
        if self.context is not None:
            return {"context": self.context}
        return {"source_states": self.source_states, "t5_ids": self.t5_ids}


@dataclass(frozen=True)
class LatentSpec:
    """What the latent file of one image must hold. `size` is the bucket (width, height)."""

    key: str
    size: tuple[int, int]
    flip: bool
    alpha: bool

    def shapes(self) -> dict[str, list[int]]:
        """Shape of each tensor of the file."""
        width, height = self.size
        latent = [LATENT_CHANNELS, height // LATENT_SCALE, width // LATENT_SCALE]
        shapes = {"latents": latent}
        if self.flip:
            shapes["latents_flipped"] = latent
        if self.alpha:
            shapes["alpha_mask"] = [height, width]
        return shapes


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


def latent_spec(item: ImageItem, *, image_sha256: str, vae: str, dtype: torch.dtype) -> LatentSpec:
    """Key and contents of an item's latent file.

    image_sha256, vae: content hashes of the image file and of the VAE file, which computes in
    `dtype`.
    """
    subset = item.subset
    key = digest(
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
    return LatentSpec(key, item.bucket, subset.flip_aug, subset.alpha_mask)


def model_identity(path: str | Path) -> str:
    """Content hash of a model file, or of the weights and configuration of a model folder.

    Raises `UserError` when there is nothing at `path`.
    """
    path = Path(path)
    try:
        if not path.is_dir():
            return files.cached_sha256(path)
        parts = [file for file in path.iterdir() if file.suffix in (".safetensors", ".json")]
        return digest({part.name: files.cached_sha256(part) for part in parts})
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the path") from error


def write_latents(path: Path, entry: LatentEntry, spec: LatentSpec, origin: dict[str, str]) -> None:
    """Write a latent file; `origin` is what `inspect` shows (image name, sizes, VAE)."""
    _write(path, entry.tensors(), LATENTS_FORMAT, spec.key, origin)


def write_text(path: Path, entry: TextEntry, key: str, origin: dict[str, str]) -> None:
    """Write a text file; `origin` is what `inspect` shows (caption, encoder)."""
    _write(path, entry.tensors(), TEXT_FORMAT, key, origin)


def check_latents(path: Path, spec: LatentSpec) -> None:
    """Raise `CacheError` unless the file is complete and its header that of the wanted latents."""
    header = _checked_header(path, LATENTS_FORMAT, spec.key)
    for name, shape in spec.shapes().items():
        if header.get(name, {}).get("shape") != shape:
            raise CacheError(f"it holds no {name} of shape {shape}")


def check_text(path: Path, key: str, form: str) -> None:
    """Raise `CacheError` unless the file is complete and holds a text in that form."""
    header = _checked_header(path, TEXT_FORMAT, key)
    wanted = ("context",) if form == "context" else ("source_states", "t5_ids")
    if any(name not in header for name in wanted):
        raise CacheError(f"it holds no {' and '.join(wanted)}")


def read_latents(path: Path) -> LatentEntry:
    """Read a latent file; `CacheError` when it is damaged or not finite."""
    tensors = _read(path, ("latents",))
    return LatentEntry(
        tensors["latents"], tensors.get("latents_flipped"), tensors.get("alpha_mask")
    )


def read_text(path: Path) -> TextEntry:
    """Read a text file; `CacheError` when it is damaged or not finite."""
    tensors = _read(path, ())
    entry = TextEntry(*(tensors.get(name) for name in ("context", "source_states", "t5_ids")))
    if entry.context is None and (entry.source_states is None or entry.t5_ids is None):
        raise CacheError("it holds no text encoding")
    return entry


def _write(
    path: Path, tensors: dict[str, Tensor], format: str, key: str, origin: dict[str, str]
) -> None:
    metadata = {"format": format, "version": str(CACHE_VERSION), "key": key, **origin}
    files.save_safetensors(tensors, path, metadata)


def _checked_header(path: Path, format: str, key: str) -> dict:
    try:
        header = files.read_safetensors_header(path)
    except UserError as error:
        raise CacheError(str(error)) from error
    metadata = header.get("__metadata__") or {}
    if metadata.get("format") != format or metadata.get("key") != key:
        raise CacheError("it belongs to other contents")
    return header


def _read(path: Path, required: Sequence[str]) -> dict[str, Tensor]:
    try:
        # Bytes, not a memory map: Windows cannot replace a file that is mapped.
        tensors = load(path.read_bytes())
    except OSError as error:
        raise CacheError(error.strerror or str(error)) from error
    # The safetensors library raises its own exception types for damaged files.
    except Exception as error:
        raise CacheError(f"damaged: {error}") from error
    missing = [name for name in required if name not in tensors]
    if missing:
        raise CacheError(f"it holds no {', '.join(missing)}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CacheError(f"its {name} is not finite")
    return tensors
