"""Where a run was taken: machine, card and its state, versions, commit.

With nvidia-ml-py installed (the `bench` extra) the clocks, power limit and temperature of the card
are in it.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from anima_fast.measure.card_state import CardState
from anima_fast.measure.tuning import version

# The checkout that this program runs from, or the folder of an installed package.
ROOT = Path(__file__).resolve().parents[2]
# What decides the digits of a number, beside the code: other values are another environment.
DECISIVE = ("machine", "processor", "instructions", "card", "numpy", "torch", "triton")


def environment() -> dict[str, Any]:
    """The environment of a run file; values that do not exist here are left out."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **commit(ROOT),
        "anima_fast": importlib.metadata.version("anima-fast"),
        "python": platform.python_version(),
        "os": platform.system(),
        "machine": platform.machine(),
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        **{name: version(name) for name in ("numpy", "torch", "triton")},
        **_card(),
    }
    return {name: value for name, value in found.items() if value is not None}


def processor() -> str:
    """The model of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


def commit(root: Path) -> dict[str, Any]:
    """`commit` and `dirty` (files of the commit are changed) of a checkout; {} outside of one."""
    if not (root / ".git").exists():
        return {}
    head, changed = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "-uno")
    return {"commit": head[:12], "dirty": bool(changed)} if head else {}


def _git(root: Path, *words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _card() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "card": properties.name,
        "capability": 10 * properties.major + properties.minor,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **CardState().describe(),
    }


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What of `DECISIVE` differs between two environments, as "torch 2.12.0 -> 2.13.0"."""
    return [
        f"{name} {a.get(name, 'none')} -> {b.get(name, 'none')}"
        for name in DECISIVE
        if a.get(name) != b.get(name)
    ]
