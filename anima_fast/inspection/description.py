"""What `inspect` says about a file: the record that readers fill, facts of all files, the text."""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from anima_fast.console import one_line
from anima_fast.files import read_safetensors_header
from anima_fast.models.checkpoint import PICKLES, Checkpoint

SEE_NOTE = "no: see the note"
WIDEST = 100
# Dtypes as safetensors spells them.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# Metadata that is worth a line, with the name it gets.
HIGHLIGHTS = {
    "modelspec.title": "title", "modelspec.author": "author",
    "modelspec.trigger_phrase": "trigger_phrase", "modelspec.date": "date",
    "modelspec.merged_from": "merged_from", "ss_base_model_version": "base_model",
    "ss_sd_model_name": "trained_on", "ss_network_module": "network_module",
    "ss_network_args": "network_args", "ss_steps": "steps", "ss_epoch": "epoch",
    "ss_seed": "seed", "ss_learning_rate": "learning_rate", "ss_optimizer": "optimizer",
    "ss_num_train_images": "train_images", "ss_training_comment": "comment",
    "sshs_model_hash": "sshs_model_hash",
}  # fmt: skip
LONGEST_VALUE = 160


@dataclass
class Description:
    """A file or folder, as JSON values.

    facts: {label: value or {name: value}}. programs: {name: "yes" or "no", with the reason}. notes:
    what else to know. option: the options that take it. metadata: of the file's own; None takes the
    entries worth showing. kind: of a file of tensors, the word that `detect_kind` gives.
    """

    title: str
    facts: dict[str, Any]
    programs: dict[str, str]
    notes: list[str] = field(default_factory=list)
    option: str | None = None
    metadata: dict[str, str] | None = None
    kind: str = ""


def size_text(size: int) -> str:
    """Bytes as people read them: "4.18 GB"."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} bytes"


def plural(count: int, noun: str) -> str:
    """A count and its noun: "1 tensor", "3 tensors"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def dtype_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Dtype of every tensor as PyTorch spells it, from the file's header."""
    path = checkpoint.path
    if path is None or path.suffix.lower() in PICKLES:
        dtypes = {key: str(checkpoint.get(key).dtype) for key in checkpoint.shapes}
    else:
        header = read_safetensors_header(path)
        codes = {key: header[key]["dtype"] for key in checkpoint.shapes}
        dtypes = {key: str(DTYPES.get(code, code.lower())) for key, code in codes.items()}
    return {key: dtype.removeprefix("torch.") for key, dtype in dtypes.items()}


def dtype_summary(dtypes: Iterable[str]) -> str:
    """The dtypes of a file: "bfloat16", or "bfloat16 (280 tensors), float32 (3 tensors)"."""
    counts = Counter(dtypes).most_common()
    if len(counts) == 1:
        return counts[0][0]
    return ", ".join(f"{name} ({plural(count, 'tensor')})" for name, count in counts)


def without_data(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The tensors of a file on the meta device; those of unknown dtypes as integers."""
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    names = dtype_names(checkpoint)
    return {
        key: torch.empty(shape, dtype=known.get(names[key], torch.uint8), device="meta")
        for key, shape in checkpoint.shapes.items()
    }


def highlights(metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries of a file's metadata that are worth a line, shortened, under short names."""
    found = {label: metadata.get(key) for key, label in HIGHLIGHTS.items()}
    return {label: shorten(v) for label, v in found.items() if v not in (None, "", "None", "{}")}


def shorten(value: str) -> str:
    """A metadata value, cut where it is long."""
    return value if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE]}..."


def inspection_text(found: Mapping[str, Any], width: int | None = None) -> str:
    """What `file.inspect_file` returns as lines of text, as wide as the terminal (at most 100)."""
    width = min(width or shutil.get_terminal_size((80, 24)).columns, WIDEST)
    lines = [one_line(found["title"]), one_line(found["file"]), "", *_rows(found["facts"], width)]
    if found["option"]:
        lines += ["", *_wrap("use it with: ", found["option"], width)]
    lines += ["", "loads in", *_rows(found["programs"], width, indent=2)]
    if found["metadata"]:
        lines += ["", "metadata", *_rows(found["metadata"], width, indent=2)]
    for note in found["notes"]:
        lines += ["", *_wrap("note: ", note, width)]
    return "\n".join(lines)


def _rows(values: Mapping[str, Any], width: int, indent: int = 0) -> list[str]:
    """Labels in one column, values wrapped next to them; a table of values has one line each."""
    labels = {key: one_line(key.replace("_", " ")) for key in values}
    column = indent + max(map(len, labels.values()), default=0) + 2
    lines = []
    for key, value in values.items():
        start = " " * indent + labels[key].ljust(column - indent)
        if isinstance(value, Mapping):
            for i, (name, item) in enumerate(value.items()):
                lines += _wrap(start if i == 0 else " " * column, f"{name} {_text(item)}", width)
        else:
            lines += _wrap(start, _text(value, key), width)
    return lines


def _text(value: Any, key: str = "") -> str:
    return f"{value:,}" if key == "parameters" else str(value) or '""'


def _wrap(start: str, text: str, width: int) -> list[str]:
    # Paths and names are never broken, so that they can be copied.
    wrapped = textwrap.wrap(
        one_line(text), max(width - len(start), 20), break_long_words=False, break_on_hyphens=False
    )
    first, *rest = wrapped or [""]
    return [f"{start}{first}".rstrip(), *(" " * len(start) + line for line in rest)]
