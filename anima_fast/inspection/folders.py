"""What a folder holds: a resume state, of this program or of sd-scripts, or something else."""

from __future__ import annotations

import json
import time
from pathlib import Path

from anima_fast.errors import UserError
from anima_fast.inspection.header import size_text
from anima_fast.models.checkpoint import PICKLES
from anima_fast.training.resume import find_states, is_foreign_state
from anima_fast.training.state_files import FORMAT, NETWORK_FILE, STATE_FILE, read_record

EXPECTED = "expected a model, LoRA or cache file, a Hugging Face folder of Qwen3, or a resume state"
SHOWN = 4


def describe_resume_state(folder: Path) -> dict | None:
    """A resume state of this program or of sd-scripts; None when a folder is neither.

    Raises `UserError` when it is damaged.
    """
    if is_foreign_state(folder):
        return _foreign_state(folder)
    named = folder.name.removesuffix(".prev").endswith("-state")
    if (folder / STATE_FILE).exists() or (named and (folder / NETWORK_FILE).exists()):
        return _state(folder)
    return None


def _state(folder: Path) -> dict:
    """Where a run stood; checksums of the other files are compared when a run resumes."""
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
    return {
        "kind": "resume_state",
        "title": f"resume state after step {position.get('step')}, {done} whole "
        f"epoch{'s' * (done != 1)} done",
        "facts": facts,
        "programs": {"anima-fast": "yes", "sd-scripts": "no"},
        "notes": [f"the trained network is a LoRA file: {folder / NETWORK_FILE}"],
    }


def _foreign_state(folder: Path) -> dict:
    """A resume state of sd-scripts; only its network is of use here."""
    try:
        record = json.loads((folder / "train_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}
    record = record if isinstance(record, dict) else {}
    names = {"step": "current_step", "epoch": "current_epoch"}
    facts = {label: record.get(name, "not told") for label, name in names.items()}
    return {
        "kind": "sd_scripts_state",
        "title": "resume state of sd-scripts",
        "facts": facts,
        "programs": {
            "anima-fast": "yes, the network only: optimizer, schedule and steps start anew",
            "sd-scripts": "yes",
        },
        "notes": [f"the trained network is a LoRA file: {folder / 'model.safetensors'}"],
    }


def is_language_model(folder: Path) -> bool:
    """Whether a folder's config.json is that of a model of transformers, or cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    return not isinstance(config, dict) or "model_type" in config


def unknown_folder(folder: Path) -> UserError:
    """The error for a folder that is nothing itself, with what in it can be asked about."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        return UserError(f"cannot read {folder}: {error.strerror or error}; check the path")
    suffixes = (".safetensors", ".npz", *PICKLES)
    found = [state.name for state in find_states(folder)]
    found += [p.name for p in entries if p.suffix.lower() in suffixes and p.is_file()]
    if not found:
        return UserError(f"{folder} is a folder with nothing that inspect reads: {EXPECTED}")
    shown = ", ".join(found[:SHOWN]) + (", ..." if len(found) > SHOWN else "")
    return UserError(f"{folder} is a folder of files or states: give one of them ({shown})")
