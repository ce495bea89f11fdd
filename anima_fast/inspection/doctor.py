"""`anima-fast doctor`: what this machine has, and what each missing piece would bring.

Only what makes training impossible counts as a failure: no PyTorch, one that is too old, or a
missing required library. Training without a card works, slowly, so that is a warning.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from anima_fast.measure.tuning import driver_version
from anima_fast.models.download import DIT_FOLDER, TEXT_ENCODER, TOKENIZERS, VAE, models_folder

# Attention before this version returns NaN for some shapes.
OLDEST_TORCH = (2, 5)
REQUIRED = ("safetensors", "transformers", "tokenizers", "numpy", "PIL", "huggingface_hub")

# Module -> (how to install it, what it brings).
EXTRAS = {
    "triton": (
        "pip install triton (Windows: triton-windows)", "--compile and fused kernels on a card"
    ),
    "bitsandbytes": ("pip install bitsandbytes", "8-bit optimizers on a card: less memory"),
    "flash_attn": ('pip install "anima-fast[flash]"', "--attn_mode flash"),
    "xformers": ('pip install "anima-fast[xformers]"', "--attn_mode xformers"),
    "sageattention": ('pip install "anima-fast[sage]"', "sample --attn_mode sageattn"),
    "tensorboard": ('pip install "anima-fast[tensorboard]"', "--log_with tensorboard"),
    "wandb": ('pip install "anima-fast[wandb]"', "--log_with wandb"),
    "prodigyopt": ('pip install "anima-fast[optimizers]"', "--optimizer_type Prodigy"),
    "schedulefree": ('pip install "anima-fast[optimizers]"', "schedule-free optimizers"),
    "lion_pytorch": ('pip install "anima-fast[optimizers]"', "--optimizer_type Lion on a CPU"),
    "pynvml": ('pip install "anima-fast[bench]"', "`bench run`: clocks, throttling"),
    "liger_kernel": ('pip install "anima-fast[bench]"', "`bench run`: Liger as a rival"),
    "skimage": ('pip install "anima-fast[demo]"', "photographs for `anima-fast demo`"),
}  # fmt: skip
_DISTRIBUTIONS = {
    "PIL": "pillow", "skimage": "scikit-image", "flash_attn": "flash-attn",
    "lion_pytorch": "lion-pytorch", "pynvml": "nvidia-ml-py", "liger_kernel": "liger-kernel",
}  # fmt: skip


def examine(models_dir: str | Path | None = None) -> dict[str, Any]:
    """The report as plain values; `problems` are those with which training cannot run.

    The models folder is the one that `download` fills, unless one is given.
    """
    folder = models_folder(models_dir)
    problems: list[str] = []
    warnings: list[str] = []
    report = {
        "system": {
            "python": platform.python_version(),
            "os": platform.platform(),
            "driver": driver_version(),
            "memory_gib": _memory_gib(),
        },
        **torch_report(problems, warnings),
        "libraries": {name: version_of(name) for name in REQUIRED},
        "extras": {name: version_of(name) for name in EXTRAS},
        "models": models_report(folder),
        "disk": disk_report(folder, warnings),
    }
    for name, version in report["libraries"].items():
        if version is None:
            problems.append(f"{_DISTRIBUTIONS.get(name, name)} is missing: pip install anima-fast")
    return report | {"problems": problems, "warnings": warnings, "can_train": not problems}


def torch_report(problems: list[str], warnings: list[str]) -> dict[str, Any]:
    """`torch`: its version and CUDA's, None when it cannot be imported; `cards`: those of CUDA."""
    try:
        import torch
    except (ImportError, OSError) as error:
        # OSError: a shared library of another version (seen with mixed CUDA wheels).
        problems.append(f"PyTorch cannot be imported ({error}): see https://pytorch.org for wheels")
        return {"torch": None, "cards": []}
    version = torch.__version__
    if is_older(version, OLDEST_TORCH):
        oldest = ".".join(map(str, OLDEST_TORCH))
        problems.append(
            f"PyTorch {version} is too old: before {oldest} attention gives NaN losses; upgrade it"
        )
    has_cuda = torch.cuda.is_available()
    if not has_cuda:
        why = (
            "this PyTorch is built for the CPU: install a CUDA build from https://pytorch.org"
            if torch.version.cuda is None
            else "no NVIDIA card or driver was found"
        )
        warnings.append(f"no CUDA: training runs on the CPU, slowly ({why})")
    cards = []
    for index in range(torch.cuda.device_count() if has_cuda else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        cards.append({
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(total / 2**30, 1),
            "free_gib": round(free / 2**30, 1),
            "auto": _auto(index),
        })  # fmt: skip
        if properties.major < 8:
            warnings.append(f"{properties.name} has no bfloat16: --mixed_precision auto is fp16")
    about = {"version": version, "cuda": torch.version.cuda, "threads": torch.get_num_threads()}
    return {"torch": about, "cards": cards}


def _auto(index: int) -> dict[str, str]:
    """What `--mixed_precision auto` takes on a card, and why; nothing is measured."""
    # Not at the top: torch may be missing.
    import torch

    from anima_fast.measure.arithmetic import machine, resolve
    from anima_fast.measure.sums import card_facts, known_sums

    card = torch.device("cuda", index)
    where = machine(card, "auto", short=lambda: known_sums(card_facts(card)))
    found = resolve("auto", "auto", where)
    return {
        "precision": found.precision,
        "sums": found.sums,
        "text": found.text,
        "reason": found.reason,
    }


def is_older(version: str, oldest: tuple[int, int]) -> bool:
    """Whether a version such as 2.13.0+cu130 comes before (2, 5)."""
    numbers = [int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit()]
    return len(numbers) == 2 and tuple(numbers) < oldest


def version_of(module: str) -> str | None:
    """The installed version of a module, None when it is absent; nothing is imported."""
    if importlib.util.find_spec(module) is None:
        return None
    # Of triton there is a second distribution.
    for name in (_DISTRIBUTIONS.get(module, module), f"{module}-windows"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "unknown"


def models_report(folder: Path) -> dict[str, Any]:
    """Which published files the models folder has."""
    dits = sorted(path.name for path in (folder / DIT_FOLDER).glob("*.safetensors"))
    found: dict[str, Any] = {"folder": str(folder), "dit": dits}
    for name, file in (("text_encoder", TEXT_ENCODER), ("vae", VAE)):
        found[name] = (folder / file).is_file()
    for name, (_, files) in TOKENIZERS.items():
        found[name] = all((folder / name / file).is_file() for file in files)
    return found


def disk_report(folder: Path, warnings: list[str]) -> dict[str, float]:
    """Free space in GB where models go and where the program runs."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = {
        "models_free_gb": round(shutil.disk_usage(existing).free / 1e9, 1),
        "here_free_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
    }
    if free["here_free_gb"] < 2:
        warnings.append(f"only {free['here_free_gb']} GB free here: caches and states need room")
    return free


def _memory_gib() -> float | None:
    try:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        # Windows has no sysconf.
        return None
    return round(pages / 2**30, 1)


def doctor_text(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    system, torch, models, disk = (report[key] for key in ("system", "torch", "models", "disk"))
    memory = f", {system['memory_gib']} GiB memory" if system["memory_gib"] else ""
    lines = [f"Python {system['python']} on {system['os']}{memory}"]
    if torch:
        lines.append(f"PyTorch {torch['version']}, CUDA {torch['cuda'] or 'none'}")
    lines += [
        f"NVIDIA driver: {system['driver'] or 'not found'}",
        *(
            f"card: {c['name']}, {c['memory_gib']} GiB ({c['free_gib']} free), "
            f"sm_{c['capability']}\n  --mixed_precision auto: {c['auto']['text']} "
            f"({c['auto']['reason']})"
            for c in report["cards"]
        ),
        "",
        "extras:",
        *(
            f"  {name:15} {EXTRAS[name][1]}: {version or f'missing: {EXTRAS[name][0]}'}"
            for name, version in report["extras"].items()
        ),
        "",
        f"models in {models['folder']}:",
        f"  DiT: {', '.join(models['dit']) or 'none'}",
        *(
            f"  {name}: {'found' if models[name] else 'missing (anima-fast download)'}"
            for name in ("text_encoder", "vae", *TOKENIZERS)
        ),
        f"free space: {disk['models_free_gb']} GB there, {disk['here_free_gb']} GB here",
        "",
        *(f"warning: {text}" for text in report["warnings"]),
        *(f"problem: {text}" for text in report["problems"]),
        "training can run" if report["can_train"] else "training cannot run",
    ]
    return "\n".join(lines)
