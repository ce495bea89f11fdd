"""The files of a resume state: nested optimizer state as safetensors and JSON, and checksums.

No pickle anywhere: a state folder from somebody else cannot run code. `state.json` is written last
and holds the SHA-256 of every other file and of itself, so that damage is found before anything is
loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anima_fast.errors import UserError
from anima_fast.files import save_safetensors, sha256_file, write_json

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
    packed = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return unpack(packed, tensors_of(folder / f"{name}.safetensors"))


def tensors_of(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Tensors of a safetensors file (all of them without `names`), copied into memory."""
    from safetensors import safe_open

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
        record = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
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
    import importlib.metadata

    found = {"torch": torch.__version__}
    for name in ("anima-fast", "bitsandbytes"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
