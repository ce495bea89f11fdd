"""How much memory is free, on a card and in the host, and whether an error means none is left."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import torch

# What CUDA and its libraries say when memory runs out outside torch's allocator: in pinned memory,
# a library's workspace, a recorded graph.
_SAY_SO = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the card is out of memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAY_SO)


def device_free(device: torch.device) -> int | None:
    """Bytes that are free on a card; None for another device."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0]


def host_free() -> int | None:
    """Bytes of host memory that programs can still take without swapping; None if unknown."""
    if os.name == "nt":
        return _windows_free()
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found = dict(line.split(":", 1) for line in lines if ":" in line)
        available, limit = int(found["MemAvailable"].split()[0]) * 1024, _limit()
        return available if limit is None else min(available, limit)
    except (OSError, KeyError, ValueError):
        return None


def _limit(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the control group of a container leaves; None without a limit."""
    try:
        limit = (folder / "memory.max").read_text(encoding="utf-8").strip()
        used = int((folder / "memory.current").read_text(encoding="utf-8"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # Files that were read long ago count as used, and make room when room is needed.
        used -= int(stat.get("inactive_file", 0))
        return None if limit == "max" else max(0, int(limit) - used)
    except (OSError, ValueError):
        return None


def _windows_free() -> int | None:
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = [
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *[
                (name, ctypes.c_ulonglong)
                for name in (
                    "total", "available", "page_total", "page_available", "virtual_total",
                    "virtual_available", "extended",
                )
            ],
        ]  # fmt: skip

    status = Status()
    status.length = ctypes.sizeof(Status)
    # Only Windows' ctypes has it.
    windll: Any = vars(ctypes)["windll"]
    if not windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return status.available


def free_memory(device: torch.device, *, keep_cached: bool) -> None:
    """Collect freed models; return their device memory to the driver unless `keep_cached`."""
    gc.collect()
    if device.type == "cuda" and not keep_cached:
        torch.cuda.empty_cache()


def peak_memory_mib(device: torch.device) -> float | None:
    """Peak memory so far in MiB: the CUDA allocator's, else the process's; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:
        # Windows has no resource module.
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Bytes on macOS, KiB on Linux.
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
