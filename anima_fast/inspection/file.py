"""`anima-fast inspect`: what any file or folder of this program holds, and who reads it.

`describe` tells the kind from the content and hands the file to one of the `inspect_*` modules.
Headers are read, never weights, so a model of 4 GB is answered at once. `render` is its text.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anima_fast.console import one_line
from anima_fast.errors import UserError
from anima_fast.inspection.caches import describe_cache, describe_npz
from anima_fast.inspection.header import dtype_names, dtype_summary, highlights, shorten, size_text
from anima_fast.inspection.lora import describe_lora
from anima_fast.inspection.models import (
    describe_adapter,
    describe_dit,
    describe_qwen3,
    describe_vae,
    qwen3_files,
)
from anima_fast.models.checkpoint import PICKLES, Checkpoint, detect_kind

# The options that take a file, by kind.
OPTIONS = {
    "dit": "train --pretrained_model_name_or_path, sample --dit",
    "llm_adapter": "--llm_adapter_path",
    "qwen3": "--qwen3",
    "vae": "--vae",
    "lora": "train --network_weights or --base_weights, sample --lora",
    "resume_state": "train --resume",
    "sd_scripts_state": "train --resume",
}
PROGRAMS = ("ComfyUI", "Forge Neo, SwarmUI", "diffusers", "sd-scripts", "anima-fast")
SUFFIXES = (".safetensors", ".npz", *PICKLES)
FIRST_NAMES = 8
WIDEST = 100


def describe(path: str | Path) -> dict:
    """What a file or folder is, as JSON values.

    Returns:
        file, kind (a key of `OPTIONS`, a cache or "unknown"), title, facts {label: value or
        {name: value}}, option (None when no option takes it), programs {name: "yes" or "no", with
        the reason}, metadata, notes.

    Raises:
        UserError: missing, damaged, cut off, a pickle with code, or nothing that is read here.
    """
    path = Path(path)
    try:
        found = _find(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    kind, programs = found["kind"], found["programs"]
    size = {"size": size_text(found["size"])} if "size" in found else {}
    usable = programs.get("anima-fast", "no").startswith("yes")
    return {
        "file": str(path),
        "kind": kind,
        "title": found["title"],
        "facts": found["facts"] | size,
        "option": (found.get("option") or OPTIONS.get(kind)) if usable else None,
        "programs": {name: programs[name] for name in PROGRAMS if name in programs},
        "metadata": found.get("metadata", {}),
        "notes": found["notes"],
    }


def _find(path: Path) -> dict:
    if path.is_dir():
        return _folder(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no regular file: give a model, LoRA or cache file")
    if path.exists() and path.stat().st_size == 0:
        raise UserError(f"{path} is empty: copy or download it again")
    if path.exists() and path.suffix.lower() == ".npz":
        return {**describe_npz(path), "size": path.stat().st_size}
    return _tensors(path)


def _folder(path: Path) -> dict:
    # Imported here: files need nothing of the training code.
    from anima_fast.inspection.folders import (
        describe_resume_state,
        is_language_model,
        unknown_folder,
    )

    if found := describe_resume_state(path):
        return found
    if is_language_model(path):
        found = describe_qwen3(path)
        names: dict[str, str] = {}
        for file in qwen3_files(path):
            names |= dtype_names(Checkpoint.open(file))
        size = sum(file.stat().st_size for file in qwen3_files(path))
        found["facts"]["dtype"] = dtype_summary(names)
        return {"kind": "qwen3", **found, "size": size}
    raise unknown_folder(path)


def _tensors(path: Path) -> dict:
    try:
        checkpoint = Checkpoint.open(path)
    except UserError as error:
        if path.exists() and path.suffix.lower() not in SUFFIXES:
            raise UserError(
                f"{path} is no file that inspect reads: expected a model, LoRA or cache file "
                f"({', '.join(SUFFIXES)})"
            ) from error
        raise
    if not checkpoint.shapes:
        raise UserError(f"{path} holds no tensors: copy or download it again")
    kind = detect_kind(checkpoint)
    if kind == "lora":
        found = describe_lora(checkpoint)
    elif kind in ("latent_cache", "text_cache"):
        found = describe_cache(checkpoint, kind)
    elif kind == "qwen3":
        found = describe_qwen3(path)
    elif kind == "unknown":
        found = _unknown(checkpoint)
    else:
        known = {"dit": describe_dit, "llm_adapter": describe_adapter, "vae": describe_vae}
        found = known[kind](checkpoint)
    found["facts"]["dtype"] = dtype_summary(dtype_names(checkpoint))
    found.setdefault("metadata", highlights(checkpoint.metadata))
    return {"kind": kind, **found, "size": path.stat().st_size}


def _unknown(checkpoint: Checkpoint) -> dict:
    names = list(checkpoint.shapes)[:FIRST_NAMES]
    shapes = {name: str(list(checkpoint.shape(name))) for name in names}
    more = len(checkpoint.shapes) > len(names)
    metadata = {
        key: shorten(value) for key, value in list(checkpoint.metadata.items())[:FIRST_NAMES]
    }
    return {
        "title": "unknown: no model, LoRA or cache of Anima",
        "facts": {
            "tensors": len(checkpoint.shapes),
            "first_tensors" if more else "names": shapes,
        },
        "programs": {"anima-fast": "no"},
        "metadata": metadata,
        "notes": [],
    }


def render(described: Mapping[str, Any], width: int | None = None) -> str:
    """What `describe` found as lines of text, as wide as the terminal (at most 100 columns)."""
    width = min(width or shutil.get_terminal_size((80, 24)).columns, WIDEST)
    lines = [one_line(described["title"]), one_line(described["file"]), ""]
    lines += _rows(described["facts"], width)
    if described["option"]:
        lines += ["", *_wrap("use it with: ", described["option"], width)]
    lines += ["", "loads in", *_rows(described["programs"], width, indent=2)]
    if described["metadata"]:
        lines += ["", "metadata", *_rows(described["metadata"], width, indent=2)]
    for note in described["notes"]:
        lines += ["", *_wrap("note: ", note, width)]
    return "\n".join(lines)


def _rows(values: Mapping[str, Any], width: int, indent: int = 0) -> list[str]:
    """Labels in one column, values wrapped beside them; a table of values has one line each."""
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
    # Paths and names are never broken: they are there to be copied.
    wrapped = textwrap.wrap(
        one_line(text),
        max(width - len(start), 20),
        break_long_words=False,
        break_on_hyphens=False,
    )
    first, *rest = wrapped or [""]
    return [f"{start}{first}".rstrip(), *(" " * len(start) + line for line in rest)]
