"""`anima-fast doctor`: what this machine has, and what each missing piece would bring.

Only what makes training impossible counts as a failure: no PyTorch, one that is too old, or a
missing required library. Training without a card works, slowly, so that is a warning.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

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
    "skimage": ('pip install "anima-fast[demo]"', "photographs for `anima-fast demo`"),
}  # fmt: skip
_DISTRIBUTIONS = {
    "PIL": "pillow", "skimage": "scikit-image", "flash_attn": "flash-attn",
    "lion_pytorch": "lion-pytorch",
}  # fmt: skip


def examine(models_dir: str | Path | None = None) -> dict[str, Any]:
    """The report as plain values.

    Args:
        models_dir: the models folder to look into (default: the one that `download` fills).
    Returns:
        sections `system`, `torch`, `cards`, `libraries`, `extras`, `models`, `disk`, with the
        lists `problems` (training cannot run) and `warnings`, and `can_train`.
    """
    folder = models_folder(models_dir)
    problems: list[str] = []
    warnings: list[str] = []
    libraries = {name: version_of(name) for name in REQUIRED}
    report = {
        "system": system_report(),
        "torch": torch_report(problems, warnings),
        "cards": card_report(warnings),
        "libraries": libraries,
        "extras": {name: version_of(name) for name in EXTRAS},
        "models": models_report(folder),
        "disk": disk_report(folder, warnings),
    }
    for name, version in libraries.items():
        if version is None:
            problems.append(f"{_DISTRIBUTIONS.get(name, name)} is missing: pip install anima-fast")
    return report | {"problems": problems, "warnings": warnings, "can_train": not problems}


def system_report() -> dict[str, Any]:
    """Python, operating system and memory."""
    return {
        "python": platform.python_version(),
        "os": platform.platform(),
        "driver": _driver_version(),
        "memory_gib": _memory_gib(),
    }


def torch_report(problems: list[str], warnings: list[str]) -> dict[str, Any] | None:
    """PyTorch and its CUDA version; None when it cannot be imported."""
    try:
        import torch
    except (ImportError, OSError) as error:
        # OSError: a shared library of another version (seen with mixed CUDA wheels).
        problems.append(f"PyTorch cannot be imported ({error}): see https://pytorch.org for wheels")
        return None
    version = torch.__version__
    if is_older(version, OLDEST_TORCH):
        oldest = ".".join(map(str, OLDEST_TORCH))
        problems.append(
            f"PyTorch {version} is too old: before {oldest} attention gives NaN losses; upgrade it"
        )
    if not torch.cuda.is_available():
        why = (
            "this PyTorch is built for the CPU: install a CUDA build from https://pytorch.org"
            if torch.version.cuda is None
            else "no NVIDIA card or driver was found"
        )
        warnings.append(f"no CUDA: training runs on the CPU, slowly ({why})")
    return {"version": version, "cuda": torch.version.cuda, "threads": torch.get_num_threads()}


def is_older(version: str, oldest: tuple[int, int]) -> bool:
    """Whether a version such as 2.13.0+cu130 comes before (2, 5)."""
    numbers = [int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit()]
    return len(numbers) == 2 and tuple(numbers) < oldest


def card_report(warnings: list[str]) -> list[dict[str, Any]]:
    """Name, memory and capability of every CUDA card."""
    if importlib.util.find_spec("torch") is None:
        return []
    try:
        import torch
    except (ImportError, OSError):
        return []
    cards = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        cards.append({
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(total / 2**30, 1),
            "free_gib": round(free / 2**30, 1),
        })  # fmt: skip
        if properties.major < 8:
            warnings.append(f"{properties.name} has no bfloat16: use --mixed_precision fp16")
    return cards


def version_of(module: str) -> str | None:
    """The installed version of a module, None when it is absent; nothing is imported."""
    if importlib.util.find_spec(module) is None:
        return None
    names = [_DISTRIBUTIONS.get(module, module)]
    if module == "triton":
        names.append("triton-windows")
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
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


def _driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    versions = done.stdout.strip().splitlines()
    return versions[0] if versions else None


def _memory_gib() -> float | None:
    try:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        # Windows has no sysconf.
        return None
    return round(pages / 2**30, 1)


def doctor_text(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    system, torch, models = report["system"], report["torch"], report["models"]
    memory = f", {system['memory_gib']} GiB memory" if system["memory_gib"] else ""
    lines = [f"Python {system['python']} on {system['os']}{memory}"]
    if torch:
        lines.append(f"PyTorch {torch['version']}, CUDA {torch['cuda'] or 'none'}")
    lines.append(f"NVIDIA driver: {system['driver'] or 'not found'}")
    lines += [
        f"card: {c['name']}, {c['memory_gib']} GiB ({c['free_gib']} free), sm_{c['capability']}"
        for c in report["cards"]
    ]
    lines += ["", "extras:"]
    for name, version in report["extras"].items():
        install, brings = EXTRAS[name]
        state = version if version else f"missing: {install}"
        lines.append(f"  {name:15} {brings}: {state}")
    lines += ["", f"models in {models['folder']}:"]
    lines.append(f"  DiT: {', '.join(models['dit']) or 'none'}")
    for name in ("text_encoder", "vae", *TOKENIZERS):
        lines.append(f"  {name}: {'found' if models[name] else 'missing (anima-fast download)'}")
    disk = report["disk"]
    lines += [f"free space: {disk['models_free_gb']} GB there, {disk['here_free_gb']} GB here", ""]
    lines += [f"warning: {text}" for text in report["warnings"]]
    lines += [f"problem: {text}" for text in report["problems"]]
    lines.append("training can run" if report["can_train"] else "training cannot run")
    return "\n".join(lines)
