"""What the header of a model file tells `inspect` beside names and shapes: dtypes and metadata."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from anima_fast.files import read_safetensors_header
from anima_fast.models.checkpoint import PICKLES, Checkpoint

# Dtypes as safetensors spells them.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# Metadata that is worth a line, with the name it gets.
HIGHLIGHTS = {
    "modelspec.title": "title",
    "modelspec.author": "author",
    "modelspec.trigger_phrase": "trigger_phrase",
    "modelspec.date": "date",
    "modelspec.merged_from": "merged_from",
    "ss_base_model_version": "base_model",
    "ss_sd_model_name": "trained_on",
    "ss_network_module": "network_module",
    "ss_network_args": "network_args",
    "ss_steps": "steps",
    "ss_epoch": "epoch",
    "ss_seed": "seed",
    "ss_learning_rate": "learning_rate",
    "ss_optimizer": "optimizer",
    "ss_num_train_images": "train_images",
    "ss_training_comment": "comment",
    "sshs_model_hash": "sshs_model_hash",
}
LONGEST_VALUE = 160


def dtype_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Dtype of every tensor as PyTorch spells it, from the file's header."""
    if checkpoint.path.suffix.lower() in PICKLES:
        dtypes = {key: checkpoint.dtype(key) for key in checkpoint.shapes}
    else:
        header = read_safetensors_header(checkpoint.path)
        codes = {key: header[key]["dtype"] for key in checkpoint.shapes}
        dtypes = {key: DTYPES.get(code, code.lower()) for key, code in codes.items()}
    return {key: str(dtype).removeprefix("torch.") for key, dtype in dtypes.items()}


def dtype_summary(names: Mapping[str, str]) -> str:
    """The dtypes of a file: "bfloat16", or "bfloat16 (280 tensors), float32 (3 tensors)"."""
    counts = Counter(names.values()).most_common()
    if len(counts) == 1:
        return counts[0][0]
    return ", ".join(f"{name} ({n} tensor{'s' * (n > 1)})" for name, n in counts)


def without_data(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The tensors of a file on the meta device; those of unknown dtypes as integers."""
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    names = dtype_names(checkpoint)
    return {
        key: torch.empty(shape, dtype=known.get(names[key], torch.uint8), device="meta")
        for key, shape in checkpoint.shapes.items()
    }


def size_text(size: int) -> str:
    """Bytes as people read them: "4.18 GB"."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} bytes"


def highlights(metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries of a file's metadata that are worth a line, shortened, under short names."""
    found = {}
    for key, label in HIGHLIGHTS.items():
        value = metadata.get(key)
        if value not in (None, "", "None", "{}"):
            found[label] = shorten(value)
    return found


def shorten(value: str) -> str:
    """A metadata value, cut where it is long."""
    return value if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE]}..."
