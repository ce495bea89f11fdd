"""`anima-fast inspect`: what any file or folder of this program holds, and who reads it.

The kind is recognised from the content. Headers are read, never weights, so a model of 4 GB is
answered at once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anima_fast.errors import UserError
from anima_fast.inspection.caches import describe_cache, describe_npz
from anima_fast.inspection.description import (
    Description,
    dtype_names,
    dtype_summary,
    highlights,
    plural,
    shorten,
    size_text,
)
from anima_fast.inspection.lora import describe_lora
from anima_fast.inspection.models import (
    describe_adapter,
    describe_dit,
    describe_qwen3,
    describe_vae,
)
from anima_fast.models.checkpoint import PICKLES, Checkpoint, detect_kind
from anima_fast.models.text_encoder import weight_files
from anima_fast.training.state_files import (
    FORMAT,
    NETWORK_FILE,
    STATE_FILE,
    find_states,
    is_foreign_state,
    read_record,
)

PROGRAMS = ("ComfyUI", "Forge Neo, SwarmUI", "diffusers", "sd-scripts", "anima-fast")
SUFFIXES = (".safetensors", ".npz", *PICKLES)
FIRST_NAMES = 8
SHOWN = 4
NETWORK_NOTE = "the trained network is a LoRA file:"


def _describe_unknown(checkpoint: Checkpoint) -> Description:
    names = list(checkpoint.shapes)[:FIRST_NAMES]
    label = "first_tensors" if len(checkpoint.shapes) > len(names) else "names"
    shapes = {name: str(list(checkpoint.shapes[name])) for name in names}
    metadata = list(checkpoint.metadata.items())[:FIRST_NAMES]
    return Description(
        "unknown: no model, LoRA or cache of Anima",
        {"tensors": len(checkpoint.shapes), label: shapes},
        {"anima-fast": "no"},
        metadata={key: shorten(value) for key, value in metadata},
    )


# Of files of tensors, by their kind; those of others are only listed.
DESCRIBE: dict[str, Callable[[Checkpoint], Description]] = {
    "dit": describe_dit,
    "llm_adapter": describe_adapter,
    "qwen3": lambda checkpoint: describe_qwen3(Path(checkpoint.name)),
    "vae": describe_vae,
    "lora": describe_lora,
    "latent_cache": describe_cache,
    "text_cache": describe_cache,
}


def inspect_file(path: str | Path) -> dict:
    """What a file or folder is, as JSON values: those of `Description`, and its path as `file`.

    Raises `UserError` for one that is missing, damaged, cut off, a pickle with code, or nothing
    that is read here.
    """
    path = Path(path)
    try:
        found = _find(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    usable = found.programs.get("anima-fast", "no").startswith("yes")
    return {
        "file": str(path),
        "kind": found.kind,
        "title": found.title,
        "facts": found.facts,
        "option": found.option if usable else None,
        "programs": {name: found.programs[name] for name in PROGRAMS if name in found.programs},
        "metadata": found.metadata or {},
        "notes": found.notes,
    }


def _find(path: Path) -> Description:
    if path.is_dir():
        return _describe_folder(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file: give a model, LoRA or cache file")
    if path.exists() and path.stat().st_size == 0:
        raise UserError(f"{path} is empty: copy or download it again")
    if path.exists() and path.suffix.lower() == ".npz":
        found = describe_npz(path)
        found.facts["size"] = size_text(path.stat().st_size)
        return found
    checkpoint = _open(path)
    kind = detect_kind(checkpoint)
    found = DESCRIBE.get(kind, _describe_unknown)(checkpoint)
    if found.metadata is None:
        found.metadata = highlights(checkpoint.metadata)
    return _with_sizes(found, kind, [checkpoint], path)


def _with_sizes(
    found: Description, kind: str, checkpoints: list[Checkpoint], path: Path
) -> Description:
    """The description of files of tensors, with their kind, dtypes and size on the disk."""
    found.kind = kind
    dtypes = [dtype for one in checkpoints for dtype in dtype_names(one).values()]
    found.facts["dtype"] = dtype_summary(dtypes)
    found.facts["size"] = size_text(sum(file.stat().st_size for file in weight_files(path)))
    return found


def _open(path: Path) -> Checkpoint:
    try:
        checkpoint = Checkpoint.open(path)
    except UserError as error:
        if path.exists() and path.suffix.lower() not in SUFFIXES:
            raise UserError(
                f"{path} is not a file that inspect reads: expected a model, LoRA or cache file "
                f"({', '.join(SUFFIXES)})"
            ) from error
        raise
    if not checkpoint.shapes:
        raise UserError(f"{path} holds no tensors: copy or download it again")
    return checkpoint


def _describe_folder(folder: Path) -> Description:
    """A resume state, or a language model.

    Raises `UserError` for a damaged state, and for a folder that is neither.
    """
    if is_foreign_state(folder):
        return _foreign_state(folder)
    named = folder.name.removesuffix(".prev").endswith("-state")
    if (folder / STATE_FILE).exists() or (named and (folder / NETWORK_FILE).exists()):
        return _state(folder)
    config = folder / "config.json"
    content = _read_json(config)
    # One that cannot be read is for the reader of language models to refuse.
    if config.exists() and (not isinstance(content, dict) or "model_type" in content):
        found = describe_qwen3(folder)
        checkpoints = [Checkpoint.open(file) for file in weight_files(folder)]
        return _with_sizes(found, "qwen3", checkpoints, folder)
    raise _unknown_folder(folder)


def _state(folder: Path) -> Description:
    """The position of a run; checksums of the other files are compared when a run resumes."""
    record, problem = read_record(folder)
    files = record.get("files", {})
    missing = [name for name in files if not (folder / name).is_file()]
    if problem is None and record["format"] != FORMAT:
        problem = f"its format is {record['format']}, this version reads {FORMAT}"
    elif problem is None and missing:
        problem = f"{missing[0]} is missing"
    if problem:
        raise UserError(
            f"the resume state {folder} is damaged ({problem}): use another state, --resume auto "
            "takes the newest whole one"
        )
    position = record["position"]
    facts = {
        "step": position.get("step"),
        "epoch": position.get("epoch"),
        "batch_of_epoch": position.get("batch"),
        "seed": record["seed"],
        "optimizer": record["optimizer"],
        "saved_at": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["saved_at"])),
        "versions": record["versions"],
        "files": {name: size_text((folder / name).stat().st_size) for name in files},
    }
    losses = position.get("losses")
    if losses:
        facts["loss_average"] = f"{sum(losses) / len(losses):.4f}"
    done = max((position.get("epoch") or 1) - 1, 0)
    return Description(
        f"resume state after step {position.get('step')}, {plural(done, 'whole epoch')} done",
        facts,
        {"anima-fast": "yes", "sd-scripts": "no"},
        [f"{NETWORK_NOTE} {folder / NETWORK_FILE}"],
        "train --resume",
        kind="resume_state",
    )


def _foreign_state(folder: Path) -> Description:
    """A resume state of sd-scripts, of which only the network is used here."""
    record = _read_json(folder / "train_state.json")
    record = record if isinstance(record, dict) else {}
    names = {"step": "current_step", "epoch": "current_epoch"}
    return Description(
        "resume state of sd-scripts",
        {label: record.get(name, "not told") for label, name in names.items()},
        {
            "anima-fast": "yes, the network only: optimizer, schedule and steps start again",
            "sd-scripts": "yes",
        },
        [f"{NETWORK_NOTE} {folder / 'model.safetensors'}"],
        "train --resume",
        kind="sd_scripts_state",
    )


def _read_json(path: Path) -> Any:
    """The content of a JSON file, None when it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _unknown_folder(folder: Path) -> UserError:
    """The error for a folder that is nothing itself; it names what can be inspected in it."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        return UserError(f"cannot read {folder}: {error.strerror or error}; check the path")
    found = [state.name for state in find_states(folder)]
    found += [p.name for p in entries if p.suffix.lower() in SUFFIXES and p.is_file()]
    if not found:
        return UserError(
            f"{folder} is a folder with nothing that inspect reads: expected a model, LoRA or "
            "cache file, a Hugging Face folder of Qwen3, or a resume state"
        )
    shown = ", ".join(found[:SHOWN]) + (", ..." if len(found) > SHOWN else "")
    return UserError(f"{folder} is a folder of files or states: give one of them ({shown})")
