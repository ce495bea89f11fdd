"""What a cache file holds: own latents and text encodings, and those of sd-scripts (.npz)."""

from __future__ import annotations

import re
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anima_fast.data.cache import CACHE_VERSION, LATENT_SCALE
from anima_fast.errors import UserError
from anima_fast.inspection.description import SEE_NOTE, Description
from anima_fast.models.checkpoint import Checkpoint, detect_kind

# Of an own cache: what it is, what its key is made from, and tensors that it must hold, one set
# of these.
OWN = {
    "latent_cache": (
        "latents of one image, cached by this program",
        "image bytes, bucket, resizing and crop, VAE file, dtype, flip_aug, alpha_mask",
        [{"latents"}],
    ),
    "text_cache": (
        "encoding of one caption, cached by this program",
        "caption, Qwen3, LLM adapter and tokenizer files, token limits, dtype",
        [{"context"}, {"source_states", "t5_ids"}],
    ),
}
FORMS = {
    "context": "context: what the DiT reads, after the LLM adapter",
    "states": "Qwen3 states and T5 ids: what the LLM adapter reads",
}
# Entries of the metadata about the origin of a cache file.
ORIGINS = ("image", "image_size", "bucket", "vae", "caption", "encoder", "dtype")
# RuntimeError: an encrypted member or an unknown compression, which a flipped bit can suggest.
_DAMAGE = (
    OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error,
    tokenize.TokenError,
)  # fmt: skip
_TEXT_NAMES = ("prompt_embeds", "attn_mask", "t5_input_ids", "t5_attn_mask")


def describe_cache(checkpoint: Checkpoint) -> Description:
    """Origin, key and shapes of a cache file of this program.

    Raises `UserError` when it lacks what a file of its kind holds.
    """
    title, keyed_by, needed = OWN[detect_kind(checkpoint)]
    metadata, shapes = checkpoint.metadata, checkpoint.shapes
    if not any(names <= shapes.keys() for names in needed):
        raise UserError(
            f"{checkpoint.name} is a cache file without its tensors: delete it, the next run "
            "encodes again"
        )
    facts: dict[str, Any] = {name: metadata[name] for name in ORIGINS if name in metadata}
    if "dtype" in facts:
        facts["computed_in"] = facts.pop("dtype").removeprefix("torch.")
    if form := FORMS.get(metadata.get("form", "")):
        facts["form"] = form
    facts |= {"tensors": _tensors(shapes), "key": metadata.get("key", "none"), "keyed_by": keyed_by}
    notes = []
    if metadata.get("version") != str(CACHE_VERSION):
        notes.append(
            f"made by cache version {metadata.get('version')}, this program uses {CACHE_VERSION}: "
            "the next run encodes again"
        )
    programs = {"anima-fast": SEE_NOTE if notes else "yes, found by its key"}
    return Description(title, facts, programs, notes)


def describe_npz(path: Path) -> Description:
    """What sd-scripts has cached in an .npz file.

    Headers are read, and of a text cache the two masks. Raises `UserError` when the file is
    damaged, holds Python objects (which could run code) or is not such a cache.
    """
    try:
        # np.load hands anything else to its readers of single arrays and pickles.
        if not zipfile.is_zipfile(path):
            raise ValueError("cut off, or no .npz file")
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: _array_header(archive, name) for name in archive.files}
            if any(dtype.hasobject for _, dtype in arrays.values()):
                raise ValueError("it holds Python objects")
            shapes = {name: shape for name, (shape, _) in arrays.items()}
            if set(_TEXT_NAMES) <= shapes.keys():
                found = _npz_text(path, archive, shapes)
            elif any(name.startswith("latents_") for name in shapes):
                found = _npz_latents(path, shapes)
            else:
                found = None
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(
            f"{path} is not a readable cache ({reason}): delete it, the next run encodes again"
        ) from error
    if found is None:
        held = ", ".join(sorted(arrays)[:3])
        raise UserError(
            f"{path} is not a cache of images or captions (it holds {held}): "
            "expected *_anima.npz or *_anima_te.npz of sd-scripts"
        )
    dtypes = {str(dtype) for _, dtype in arrays.values()}
    found.facts |= {
        "tensors": _tensors(shapes),
        "dtype": ", ".join(sorted(dtypes)),
        "keyed_by": "its file name only: the file does not say which contents it was made from",
    }
    return found


def _npz_latents(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Description:
    matches = (re.fullmatch(r"latents_(\d+)x(\d+)", name) for name in shapes)
    buckets = [f"{LATENT_SCALE * int(m[2])}x{LATENT_SCALE * int(m[1])}" for m in matches if m]
    if not buckets:
        raise ValueError("its names give no latent size")
    named = re.fullmatch(r".+_0*(\d+)x0*(\d+)_anima", path.stem)
    facts: dict[str, Any] = {"image_size": f"{named[1]}x{named[2]}"} if named else {}
    facts["bucket"] = ", ".join(buckets)
    for part, prefix in (("flipped", "latents_flipped_"), ("alpha_mask", "alpha_mask_")):
        facts[part] = "yes" if any(name.startswith(prefix) for name in shapes) else "no"
    state = "yes" if named else "no: its name must be STEM_WWWWxHHHH_anima.npz"
    return Description(
        "latents of one image, cached by sd-scripts",
        facts,
        {"anima-fast": state, "sd-scripts": state},
        kind="sd_scripts_latent_cache",
    )


def _npz_text(
    path: Path, archive: np.lib.npyio.NpzFile, shapes: Mapping[str, tuple[int, ...]]
) -> Description:
    # A few hundred numbers each.
    qwen, t5 = (int(np.count_nonzero(archive[name])) for name in ("attn_mask", "t5_attn_mask"))
    state = "yes"
    if not path.stem.endswith("_anima_te"):
        state = "no: its name must be STEM_anima_te.npz"
    elif "caption_dropout_rate" not in shapes:
        state = "no: it lacks caption_dropout_rate"
    return Description(
        "encoding of one caption, cached by sd-scripts",
        {"tokens": f"{qwen} of Qwen3, {t5} of T5", "width": shapes["prompt_embeds"][-1]},
        {"anima-fast": state, "sd-scripts": state},
        kind="sd_scripts_text_cache",
    )


def _array_header(archive: np.lib.npyio.NpzFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an array, without its data."""
    assert archive.zip is not None
    with archive.zip.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, dtype = read(file)
    return shape, dtype


def _tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    return {name: str(list(shapes[name])) for name in sorted(shapes)}
