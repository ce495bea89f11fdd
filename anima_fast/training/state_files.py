"""The files of resume states, which of them are whole, and which one `--resume` means.

Nested optimizer state is kept as safetensors and JSON. No pickle anywhere: a state folder from
somebody else cannot run code. `state.json` is written last and holds the SHA-256 of every other
file and of itself, so that damage is found before anything is loaded.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from anima_fast.errors import UserError
from anima_fast.files import save_safetensors, sha256_file, write_json

logger = logging.getLogger("anima_fast")

STATE_FILE = "state.json"
NETWORK_FILE = "network.safetensors"
FORMAT = 1


def pack(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Turn nested state into JSON; its tensors go into `tensors` under their path.

    Containers become `{"dict": [[key, value], ...]}`, `{"list": [...]}` or `{"tuple": [...]}`, so
    that integer keys and tuples survive; a tensor becomes `{"tensor": name}`. `unpack` restores it
    bit for bit. Raises `UserError` for an object that neither JSON nor safetensors can hold.
    """
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {"tensor": path}
    if isinstance(value, dict):
        return {"dict": [[k, pack(v, tensors, f"{path}/{k}")] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [pack(v, tensors, f"{path}/{i}") for i, v in enumerate(value)]}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UserError(
        f"the optimizer keeps a {type(value).__name__} in its state ({path.strip('/')}), which a "
        "resume state cannot hold: use another --optimizer_type, or --autosave_minutes 0 without "
        "--save_state"
    )


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Restore nested state from what `pack` returned."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unpack(item, tensors) for key, item in content}
    items = [unpack(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)


def write_packed(folder: Path, name: str, value: Any) -> None:
    """Write nested state as `NAME.json` and `NAME.safetensors`."""
    tensors: dict[str, Tensor] = {}
    write_json(folder / f"{name}.json", pack(value, tensors))
    save_safetensors(tensors, folder / f"{name}.safetensors")


def read_packed(folder: Path, name: str) -> Any:
    """Read what `write_packed` wrote."""
    return unpack(read_json(folder / f"{name}.json"), tensors_of(folder / f"{name}.safetensors"))


def read_json(path: Path) -> Any:
    """The content of a file of an intact state."""
    return json.loads(path.read_text(encoding="utf-8"))


def tensors_of(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Tensors of a safetensors file (all of them without `names`), copied into memory."""
    with safe_open(path, framework="pt") as file:
        # Copied, not mapped: the file may be replaced while the run that resumed from it goes on.
        return {
            name: file.get_tensor(name).clone()
            for name in (file.keys() if names is None else names)
        }


def seal(folder: Path, record: dict) -> None:
    """Write `state.json`: the record and the checksum of every file in the folder."""
    sums = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
    # Through JSON once, so that the checksum covers what a reader will get.
    record = json.loads(json.dumps({"format": FORMAT, **record, "files": sums}))
    write_json(folder / STATE_FILE, {**record, "checksum": _checksum(record)})


def read_record(folder: Path) -> tuple[dict, str | None]:
    """The content of `state.json` and what is wrong with it (None: nothing)."""
    try:
        record = read_json(folder / STATE_FILE)
        checksum = record.pop("checksum")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}, f"{STATE_FILE} cannot be read"
    if checksum != _checksum(record):
        return {}, f"{STATE_FILE} was altered"
    return record, None


def damage(folder: Path) -> str | None:
    """What is wrong with a state folder, in a few words; None if every file is intact."""
    record, problem = read_record(folder)
    if problem:
        return problem
    if record["format"] != FORMAT:
        return f"its format is {record['format']}, this version reads {FORMAT}"
    for name, expected in record["files"].items():
        try:
            found = sha256_file(folder / name)
        except OSError:
            return f"{name} is missing or unreadable"
        if found != expected:
            return f"the checksum of {name} differs"
    return None


def _checksum(record: dict) -> str:
    text = json.dumps(record, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def versions() -> dict[str, str]:
    """Versions of the libraries on which bit-identical continuation depends."""
    found = {"torch": torch.__version__}
    for name in ("anima-fast", "bitsandbytes"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def find_states(output_dir: str | os.PathLike, stem: str | None = None) -> list[Path]:
    """State folders of a name (of all without `stem`), newest first, damaged ones included.

    The run that has saved last comes first, and of its states the one with the most steps: a clock
    may have gone back in between.
    """
    names = re.escape(stem) if stem else ".+"
    if stem in (None, "last"):
        names += "|epoch|at|last"
    # The replaced state is called `.NAME.old` for an instant, and keeps that name if killed then.
    pattern = re.compile(
        rf"\.?(?:{names})(?:-\d{{6}}|-step\d{{8}}|-autosave)?-state(?:\.prev|\.old)?"
    )
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if pattern.fullmatch(path.name)]
    ages = {path: _age(path) for path in filter(Path.is_dir, found)}
    last: dict[str, float] = {}
    for run, _, saved_at in ages.values():
        last[run] = max(saved_at, last.get(run, saved_at))

    def order(path: Path) -> tuple:
        run, step, saved_at = ages[path]
        return last[run], run, step, saved_at, path.name

    return sorted(ages, key=order, reverse=True)


def resolve_resume(
    value: str | None, output_dir: str | os.PathLike | None, stem: str | None = None
) -> Path | None:
    """The state folder that `--resume` means; None if the run starts from the beginning.

    Args:
        value: a state folder, an output folder (its newest intact state), "auto" (the newest
            intact state of this run, if there is one), or None.
        output_dir, stem: of this run.

    Raises:
        UserError: the folder does not exist or holds no state, or every state is damaged.
    """
    if not value:
        return None
    if value == "auto":
        if not output_dir:
            return None
        states = find_states(output_dir, stem)
        return _newest_intact(states, Path(output_dir)) if states else None
    folder = Path(value)
    if not folder.exists():
        # A kill between the two renames of a save leaves the previous state under one of these.
        for name in (f".{folder.name}.old", f"{folder.name}.prev"):
            if damage(folder.with_name(name)) is None:
                return folder.with_name(name)
    if not folder.is_dir():
        raise UserError(
            f"--resume {value} does not exist: give a state folder (NAME-state) or auto"
        )
    if (folder / STATE_FILE).exists() or is_foreign_state(folder):
        return folder
    states = find_states(folder, stem) or find_states(folder)
    if states:
        return _newest_intact(states, folder)
    raise UserError(
        f"--resume {value} holds no resume state: states are folders named NAME-state, made by "
        "--save_state or by the autosave"
    )


def state_record(folder: str | os.PathLike) -> dict | None:
    """What a state says of its run (`state.json`); None for a state of sd-scripts.

    Raises `UserError` when the state is damaged.
    """
    folder = Path(folder)
    return None if is_foreign_state(folder) else intact_record(folder)


def is_foreign_state(folder: Path) -> bool:
    """Whether a folder is a training state of sd-scripts."""
    own = (folder / STATE_FILE).exists()
    marks = ("train_state.json", "optimizer.bin")
    return (
        not own
        and (folder / "model.safetensors").exists()
        and any((folder / mark).exists() for mark in marks)
    )


def intact_record(folder: Path) -> dict:
    """The record of a state whose checksums are right."""
    problem = damage(folder)
    if problem is None:
        return read_record(folder)[0]
    states = find_states(folder.parent)
    place = states.index(folder) if folder in states else 0
    older = [p for p in states[place:] + states[:place] if p != folder and damage(p) is None]
    remedy = (
        f"go on from the newest whole state beside it with --resume {older[0]}"
        if older
        else "there is no whole state beside it, so start again without --resume"
    )
    raise UserError(f"the resume state {folder} is damaged ({problem}): {remedy}")


def _newest_intact(states: list[Path], folder: Path) -> Path:
    for state in states:
        problem = damage(state)
        if problem is None:
            return state
        logger.warning("resume state %s is damaged (%s): trying the one before", state, problem)
    raise UserError(
        f"every resume state in {folder} is damaged: start again without --resume, or from a saved "
        "file (a LoRA with --network_weights, a model with --pretrained_model_name_or_path)"
    )


def _age(folder: Path) -> tuple[str, int, float]:
    """Run, step and time of saving.

    A state whose record cannot be read, or of a version that did not name runs, is a run of its
    own, as old as the folder or the record says.
    """
    record, problem = read_record(folder)
    if problem:
        return str(folder), 0, folder.stat().st_mtime
    run = record.get("run")
    step = record["position"]["step"] if run else 0
    return run or str(folder), step, record["saved_at"]
